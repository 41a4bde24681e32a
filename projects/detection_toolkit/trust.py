"""Which YAML configs are used without being asked: those that name nothing but parts of detectors.

A LazyConfig is code, and whoever names one on the command line runs it. The ``config.yaml`` in the
folder of a run is data to most people, who may have the folder from somebody else. But it names
what is called, with which arguments. So it is read without building objects of its choice, and
what it names must be a part that configs are made of, from a package of the list below. For all
else, it has to be trusted by name (``--trust-config``). What a user has allowed for one run, as
opening pickles or sending its scalars to a tracker, is not allowed by a file that says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.registry import locate

from .errors import UserError
from .projects import project_names

__all__ = ["PICKLE_SUFFIXES", "check_targets", "names_pickle", "read_yaml"]

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pkl", ".pyth")
"""By which Detectron2 knows files that it opens as pickles."""

# Parts of detectors, and what reads and augments data: classes of these packages. Not whole
# packages: torch.load, detectron2.config and the like run code that their arguments name.
_PARTS = (
    "detection_toolkit.data",
    "detection_toolkit.engine.recipe",
    # As parts, though they are taken out; they have no settings that name an address.
    "detection_toolkit.engine.trackers",
    # The evaluator of the packaged configs, with the arguments of Detectron2's. Not its package.
    "detection_toolkit.evaluation.coco.CocoEvaluator",
    "detection_toolkit.modeling",
    "detection_toolkit.structures",
    "detection_toolkit.training",
    "detectron2.data",
    "detectron2.evaluation",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.solver",
    "detectron2.structures",
    "fvcore.common.param_scheduler",
    "fvcore.nn",
    "fvcore.transforms",
    "torch.nn",
    "torch.optim",
    "torchvision.ops",
)
# Functions of these, and of the packages of methods, for they only compute. Others fetch addresses,
# read and write files.
_COMPUTE = (
    "detection_toolkit.modeling",
    "detection_toolkit.structures",
    "detection_toolkit.training",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.solver",
    "detectron2.structures",
    "fvcore.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torchvision.ops",
)
# Besides, by name. A method may do anything with its object: torch.nn.Module.compile calls a
# compiler of the config's choice.
_FUNCTIONS = (
    "detection_toolkit.data.build.build_test_loader",
    "detection_toolkit.data.build.build_train_loader",
    "detection_toolkit.data.datasets.get_detection_dataset",
    "detectron2.data.build.build_detection_test_loader",
    "detectron2.data.build.build_detection_train_loader",
    "detectron2.data.build.get_detection_dataset_dicts",
    "detectron2.modeling.backbone.resnet.ResNet.make_default_stages",
    "detectron2.modeling.backbone.resnet.ResNet.make_stage",
)
# Within the packages: what builds what another config names, what starts processes, and what reads
# and writes files beside data sets.
_EXCEPT = (
    "detection_toolkit.data.formats",
    "detectron2.data.benchmark",
    "detectron2.data.catalog",
    "detectron2.modeling.mmdet_wrapper",
    "torch.nn.attention",
    "torch.nn.parallel",
)
# Files of proposals are pickles, as files of weights may be for a timm of long ago, and a part that
# is given a whole config reads them from there.
_ARGUMENTS = (
    "cfg",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "proposal_file",
    "proposal_files",
)
# What is allowed by whoever runs a config, not by whoever wrote it.
_PERMISSIONS = ("allow_outside", "allow_pickle")
# So are trackers (``train.trackers``), by which scalars and config leave the machine; not this one.
_TRACKERS = "trackers"
_LOCAL_TRACKER = "tensorboard"
_CURE = (
    "If you trust whoever wrote it, add --trust-config (trust_config=True in Python): then it may "
    "run any code"
)
# Another variable of the environment might be a password, and become part of an address.
_PLAIN_REFERENCE = re.compile(
    r"\$\{(?:oc\.env:DETECTRON2_DATASETS(?:,[\w./ ~'\"-]*)?|(?:oc\.select:)?[\w.\[\], /'\"-]*)\}"
)
_PYTHON = "tag:yaml.org,2002:python/"
_MOST_NODES = 100_000  # of what a file of a few lines can multiply by references to itself


def names_pickle(address: str) -> bool:
    """Whether a file that is downloaded from an address may be called a pickle.

    Detectron2 keeps what it downloads by the path alone, whatever the host, and calls it by what
    follows the last slash, also one of a query or a fragment. So it might come to lie where a
    pickle of its own storage is looked for.
    """
    parts = re.split(r"[/\\?#;&]", "".join(address.split()))
    return any(part.endswith(PICKLE_SUFFIXES) for part in parts)


class _PartLoader(yaml.SafeLoader):
    """Plain values, and the three kinds of objects that ``LazyConfig.save`` writes for parts."""


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML config, for which nothing is run but the code of known parts.

    What it allows itself, as to open pickles, is taken back, with a warning, and so are trackers
    that send the run elsewhere.

    Raises:
        UserError: it is no YAML, or asks for other objects.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PartLoader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path} {error}") from error
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a YAML config: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no config: it holds no keys")
    try:
        for number, (key, text) in enumerate(_texts(content)):
            if number > _MOST_NODES:
                raise UserError("refers to itself, or is too large for a config")
            if key == "_target_":
                _check_root(text)
            elif "${" in _PLAIN_REFERENCE.sub("", text):
                # A resolver may turn a text into whatever it says.
                raise UserError(f"has {text[:80]!r}, which is worked out when it is used. {_CURE}")
    except (UserError, RecursionError) as error:
        raise UserError(f"{path} {error}") from error
    for key in sorted(set(_withdraw_permissions(content))):
        if key == _TRACKERS:
            logger.warning(
                "%s sends its run to trackers, which is for you to say: if you want it, add "
                "train.trackers=[NAME] to the command line, or --trust-config",
                path,
            )
            continue
        logger.warning(
            "%s says %s=true, which is for you to say: repeat it on the command line if it is "
            "needed and you trust these files",
            path,
            key,
        )
    return content


def _withdraw_permissions(node: Any) -> Iterator[str]:
    """Set what allows something to false, in place, and take trackers out; the names of both."""
    if isinstance(node, dict):
        for key, child in node.items():
            if key in _PERMISSIONS and child is not False:
                node[key] = False
                yield key
            elif key == _TRACKERS:
                given = list(child) if isinstance(child, (list, tuple)) else [child]
                node[key] = [entry for entry in given if entry == _LOCAL_TRACKER]
                if node[key] != given:
                    yield key
            else:
                yield from _withdraw_permissions(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _withdraw_permissions(child)


def check_targets(content: Any, path: str | Path) -> None:
    """Refuse what a config calls, unless it is a known part.

    Args:
        content: of :func:`read_yaml`; its targets may have been renamed since.
        path: of the file, for the message.

    Raises:
        UserError: it names something else.
    """
    for key, text in _texts(content):
        if key == "_target_":
            try:
                _find_part(text)
            except UserError as error:
                raise UserError(f"{path} {error}") from error


def _texts(node: Any, key: Any = None, depth: int = 0) -> Iterator[tuple[Any, str]]:
    """(key, text) of all texts, and of all that is called; also of what is none."""
    if depth > 200:
        raise RecursionError("is too deep for a config")
    if isinstance(node, dict):
        for name, child in node.items():
            if name == "_target_" and not isinstance(child, str) and not callable(child):
                # Detectron2 would build it first, and call what comes out.
                raise UserError(f"has a _target_ that is no name. {_CURE}")
            if name in _ARGUMENTS and child is not None:
                raise UserError(f"has the key {name!r}, which may name a pickle. {_CURE}")
            if isinstance(name, str):
                yield None, name
            yield from _texts(child, name, depth + 1)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _texts(child, None, depth + 1)
    elif isinstance(node, str):
        yield key, node
    else:
        yield None, ""


def _check_root(name: str) -> None:
    """Before anything is imported: the name begins with a package that has parts."""
    roots = {part.split(".")[0] for part in _PARTS} | set(project_names())
    parts = name.split(".")
    if parts[0] not in roots or not all(p.isidentifier() and p[:1] != "_" for p in parts):
        raise _refused(name)


def _find_part(name: str) -> Any:
    """
    Raises:
        UserError: it is no known part.
    """
    _check_root(name)
    try:
        found = locate(name)
    except Exception:  # whoever builds it says why it is not there
        if not _is_in(name, (*_PARTS, *project_names())):
            raise _refused(name) from None
        return None
    # What a module has imported is not its own: torch.os.system.
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        raise _refused(name)
    # A function that is written in C may have no module, and is refused.
    module, own = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    full = f"{module}.{own}"
    packages = (*(_PARTS if inspect.isclass(found) else _COMPUTE), *project_names())
    is_method = "." in own
    is_part = not is_method and _is_in(full, packages) and not _is_in(full, _EXCEPT)
    if not (is_part or full in _FUNCTIONS):
        raise _refused(name)
    return found


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _refused(name: str) -> UserError:
    return UserError(f"names {name[:120]!r}, which is no part of a detector. {_CURE}")


def _construct_tuple(loader: _PartLoader, node: yaml.Node) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_name(loader: _PartLoader, suffix: str, node: yaml.Node) -> Any:
    found = _find_part(suffix)
    if found is None:
        raise UserError(f"names {suffix[:120]!r}, which is not there")
    return found


def _construct_value(loader: _PartLoader, suffix: str, node: yaml.Node) -> Any:
    """A dataclass or a named tuple of a known part, from its values."""
    kind = _find_part(suffix)
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
        if isinstance(node, yaml.MappingNode):
            return kind(**loader.construct_mapping(node, deep=True))
    if inspect.isclass(kind) and issubclass(kind, tuple) and isinstance(node, yaml.SequenceNode):
        return kind(*loader.construct_sequence(node, deep=True))
    raise _refused(suffix)


def _refuse(loader: _PartLoader, suffix: str, node: yaml.Node) -> Any:
    raise UserError(f"asks for a Python object ({suffix[:120]}). {_CURE}")


_PartLoader.add_constructor(f"{_PYTHON}tuple", _construct_tuple)
_PartLoader.add_multi_constructor(f"{_PYTHON}name:", _construct_name)
_PartLoader.add_multi_constructor(f"{_PYTHON}object:", _construct_value)
_PartLoader.add_multi_constructor(f"{_PYTHON}object/new:", _construct_value)
_PartLoader.add_multi_constructor(_PYTHON, _refuse)  # last: the first one that fits is taken
