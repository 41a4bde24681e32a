"""Checkpoints of the Hugging Face hub, and folders as it stores them.

A model there is a folder: weights as ``model.safetensors`` or ``pytorch_model.bin``, and a file
that tells of the network: the ``config.yaml`` of this project, or other programs' ``config.json``.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

from iopath.common.file_io import get_cache_dir

from ..errors import MissingPackageError
from ..texts import shown
from .official_files import CONFIG_FILE, CheckpointFileError

__all__ = [
    "HUB",
    "RUN_CONFIG",
    "WEIGHTS_FILE",
    "is_downloaded",
    "local_file",
    "local_model",
    "weights_in",
]

HUB = "hf://"
RUN_CONFIG = "config.yaml"
"""The config of a run, in its folder and in a repository of the hub."""
WEIGHTS_FILE = "model.safetensors"
_CHECKPOINTS = "checkpoints/"
_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin")
_FORM = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION, and /FILE behind either"
_SECONDS_TO_CONNECT = 10.0  # as the hub's own library has it
# A revision may be one of the hub's references, as refs/pr/1.
_ADDRESS = re.compile(
    r"(?P<model>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[^/@\s]+))?(?:/(?P<file>.+))?"
)


class _Address(NamedTuple):
    """Attributes: of what the hub calls a repository, a version of it, and a file in it."""

    model: str
    revision: str | None
    file: str | None


def local_file(path: str | os.PathLike[str]) -> str:
    """The file that has the weights.

    Args:
        path: ``hf://OWNER/NAME``, with ``@REVISION`` behind it or not, and ``/FILE`` behind that or
            not, which is downloaded, once; a folder; a file of the packaged checkpoints, as
            ``checkpoints/NAME``; or anything else, which is returned as it is.

    Raises:
        CheckpointFileError: the hub, or the folder, has no such model, the hub cannot be reached,
            or an address leads out of the folder of what is downloaded.
        MissingPackageError: huggingface_hub is not installed.
    """
    path = os.fspath(path)
    if path.startswith(HUB):
        return _download(path)
    if "://" in path:
        _check_address(path)
    if not path or not os.path.isdir(path):
        return _packaged(path)
    found = weights_in(path)
    if found is None:
        raise CheckpointFileError(
            f"the folder {path} has neither {' nor '.join(_WEIGHTS)}: name the checkpoint itself"
        )
    return found


def weights_in(folder: str | os.PathLike[str]) -> str | None:
    """The weights of a folder as the hub has them; None if there are none."""
    files = (os.path.join(folder, name) for name in _WEIGHTS)
    return next((file for file in files if os.path.isfile(file)), None)


def local_model(address: str) -> tuple[str, str]:
    """Config and weights of a model of this project on the hub, which are downloaded, once.

    Args:
        address: ``hf://...``, see :func:`local_file`.

    Raises:
        CheckpointFileError: as :func:`local_file`, or there is no ``config.yaml``.
        MissingPackageError: huggingface_hub is not installed.
    """
    weights = _download(address)
    given = _parse(address)
    within = (given.file or "").count("/")
    config = Path(weights).parents[within] / RUN_CONFIG
    if not config.is_file():
        raise CheckpointFileError(
            f"{address} has weights, but no {RUN_CONFIG} that says of which detector: name a "
            f"config with --config-file, and {address} with --weights"
        )
    return str(config), weights


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


def _parse(address: str) -> _Address:
    """
    Raises:
        CheckpointFileError: it has another form.
    """
    _check_address(address)
    match = _ADDRESS.fullmatch(address[len(HUB) :].rstrip("/"))
    if match is None or "\\" in address:
        raise CheckpointFileError(f"{shown(address)} names no model of the hub: these are {_FORM}")
    return _Address(match["model"], match["revision"], match["file"])


@functools.cache
def _download(address: str) -> str:
    """The weights, beside which lies what the repository has of configs."""
    given = _parse(address)
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils
    except ImportError as error:
        raise MissingPackageError(
            f'{address} needs an optional package: pip install "huggingface_hub"; or download the '
            "model's folder and name that"
        ) from error
    names = (given.file,) if given.file else _WEIGHTS
    cached = (
        huggingface_hub.try_to_load_from_cache(given.model, name, revision=given.revision)
        for name in names
    )
    try:
        is_cached = any(isinstance(path, str) for path in cached)
    except (OSError, ValueError) as error:  # a name that the hub does not allow
        raise _refused(address, given, error, errors) from error
    if not is_cached and not constants.HF_HUB_OFFLINE:
        _check_is_reached(address, _endpoint(), utils.get_session())
    weights = None
    for name in names:
        try:
            weights = huggingface_hub.hf_hub_download(given.model, name, revision=given.revision)
            break
        except errors.LocalEntryNotFoundError as error:
            raise _refused(address, given, error, errors) from error
        except errors.EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _refused(address, given, error, errors) from error
    if weights is None:
        missing = given.file or " or ".join(_WEIGHTS)
        raise CheckpointFileError(
            f"{address} has no {shown(missing)}: look at its files, and name that of the weights "
            "as hf://OWNER/NAME/FILE"
        )
    for name in (RUN_CONFIG, CONFIG_FILE):
        try:
            huggingface_hub.hf_hub_download(
                given.model, name, revision=_commit(weights) or given.revision
            )
        except errors.EntryNotFoundError:  # also of what is not in the cache, without a network
            continue
        except (OSError, ValueError) as error:
            raise _refused(address, given, error, errors) from error
    return weights


def _endpoint() -> str:
    """Where the hub is; the environment's HF_ENDPOINT may say it."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _check_is_reached(address: str, hub: str, session: Any) -> None:
    """Ask the hub for anything, once: a download tries again for half a minute where no host is.

    What answers slowly is waited for as long as the download itself does.

    Raises:
        CheckpointFileError: it is not reached.
    """
    try:
        session.head(hub, timeout=_SECONDS_TO_CONNECT)
    except Exception as error:  # of httpx or requests, whichever it is built on
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectError", "ConnectTimeout", "ConnectionError"}:
            raise CheckpointFileError(
                f"{address} cannot be downloaded: {hub} is not reached "
                f"({shown(str(error).partition(chr(10))[0][:200])}). Without a network a local "
                "folder serves as well"
            ) from error


def _commit(file: str) -> str | None:
    """The version that a downloaded file is of, so that all files are of one."""
    parts = Path(file).parts
    if "snapshots" not in parts[:-1]:
        return None
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def _refused(address: str, given: _Address, error: Exception, errors: Any) -> CheckpointFileError:
    """Why there is no file, and what to do."""
    log_in = "`hf auth login`, or the variable HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        said = (
            f"is gated: accept its terms at https://huggingface.co/{given.model}, and log in "
            f"({log_in})"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"has no revision {shown(given.revision)}: name a branch, a tag or a commit of it"
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = (
            f"is not on the hub, or is private: check the name, or log in ({log_in}) if it is yours"
        )
    else:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        said = (
            f"cannot be downloaded ({type(error).__name__}: {reason.strip()}); the name is that of "
            "a model as hf://OWNER/NAME, and without a network a local folder serves as well"
        )
    return CheckpointFileError(f"{address} {said}")
