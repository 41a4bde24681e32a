"""Checkpoints of the Hugging Face hub, and folders as it stores them.

A model there is a folder: weights as ``model.safetensors`` or ``pytorch_model.bin``, and a
``config.json`` that tells of the network.
"""

from __future__ import annotations

import os

from ..errors import MissingPackageError
from .official_files import CONFIG_FILE, CheckpointFileError

__all__ = ["HUB", "local_file"]

HUB = "hf://"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def local_file(path: str | os.PathLike[str]) -> str:
    """The file that has the weights.

    Args:
        path: ``hf://OWNER/NAME``, with ``@REVISION`` behind it or not, which is downloaded, once;
            a folder; or anything else, which is returned as it is.

    Raises:
        CheckpointFileError: the hub, or the folder, has no such model.
        MissingPackageError: huggingface_hub is not installed.
    """
    path = os.fspath(path)
    if path.startswith(HUB):
        return _download(path)
    if not path or not os.path.isdir(path):
        return path
    for name in _WEIGHTS:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return file
    raise CheckpointFileError(
        f"the folder {path} has neither {' nor '.join(_WEIGHTS)}: name the checkpoint itself"
    )


def _download(path: str) -> str:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingPackageError(
            f'{path} needs an optional package: pip install "huggingface_hub"; or download the '
            "model's folder and name that"
        ) from error
    model, _, revision = path[len(HUB) :].partition("@")
    for name in _WEIGHTS:
        try:
            file = huggingface_hub.hf_hub_download(model, name, revision=revision or None)
            huggingface_hub.hf_hub_download(model, CONFIG_FILE, revision=revision or None)
            return file
        except LocalEntryNotFoundError as error:
            raise _unreachable(path, error) from error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _unreachable(path, error) from error
    raise CheckpointFileError(
        f"{path} has no {CONFIG_FILE} with {' or '.join(_WEIGHTS)}: download its weights, and "
        "name the file"
    )


def _unreachable(path: str, error: Exception) -> CheckpointFileError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return CheckpointFileError(
        f"{path} cannot be downloaded ({type(error).__name__}: {reason.strip()}); the name is that "
        "of a model as hf://OWNER/NAME, and without a network a local folder serves as well"
    )
