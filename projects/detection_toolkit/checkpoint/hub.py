"""Checkpoints of the Hugging Face hub, and folders as it stores them.

A model there is a folder: weights as ``model.safetensors`` or ``pytorch_model.bin``, and a
``config.json`` that tells of the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from iopath.common.file_io import get_cache_dir

from ..errors import MissingPackageError
from ..texts import shown
from .official_files import CONFIG_FILE, CheckpointFileError

__all__ = ["HUB", "is_downloaded", "local_file"]

HUB = "hf://"
_CHECKPOINTS = "checkpoints/"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def local_file(path: str | os.PathLike[str]) -> str:
    """The file that has the weights.

    Args:
        path: ``hf://OWNER/NAME``, with ``@REVISION`` behind it or not, which is downloaded, once;
            a folder; a file of the packaged checkpoints, as ``checkpoints/NAME``; or anything
            else, which is returned as it is.

    Raises:
        CheckpointFileError: the hub, or the folder, has no such model, or an address leads out of
            the folder of what is downloaded.
        MissingPackageError: huggingface_hub is not installed.
    """
    path = os.fspath(path)
    if path.startswith(HUB):
        return _download(path)
    if "://" in path:
        _check_address(path)
    if not path or not os.path.isdir(path):
        return _packaged(path)
    for name in _WEIGHTS:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return file
    raise CheckpointFileError(
        f"the folder {path} has neither {' nor '.join(_WEIGHTS)}: name the checkpoint itself"
    )


def _packaged(path: str) -> str:
    """As configs are found: a file that is there goes before one of its name in the package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package, package.parents[1]):  # of an installed wheel, and of a checkout
        if path.startswith(_CHECKPOINTS) and not os.path.exists(path) and (folder / path).is_file():
            return str(folder / path)
    return path


def is_downloaded(file: str | os.PathLike[str]) -> bool:
    """Whether a file lies where Detectron2 keeps what it has downloaded, links followed."""
    cache, place = os.path.realpath(get_cache_dir()), os.path.realpath(file)
    return os.path.commonpath([cache, place]) == cache


def _check_address(address: str) -> None:
    """The path of an address is that of a file below the cache, and may not lead upwards."""
    path = unquote(urlparse(address).netloc + "/" + urlparse(address).path)
    if ".." in path.replace("\\", "/").split("/") or "\0" in path:
        raise CheckpointFileError(f"the address {shown(address)} leads upwards ('..')")


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
