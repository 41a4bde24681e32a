"""Finding, loading and overriding LazyConfigs."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import _convert_target_to_string, locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from .errors import UnknownNameError, UserError
from .registrations import repeatable_registrations
from .trust import check_targets, read_yaml

__all__ = [
    "apply_overrides",
    "arguments_of_target",
    "config_names",
    "config_text",
    "find_config_file",
    "get_config",
    "register_moved_names",
    "require_lazy_config",
]

_MOVED_NAMES: dict[str, str | Callable[[DictConfig], None]] = {}


def _config_folders() -> list[Path]:
    package = Path(__file__).resolve().parent
    # In an installed wheel; in a checkout, <checkout>/projects/detection_toolkit/config.py.
    folders = [package / "configs", package.parents[1] / "configs"]
    return [folder for folder in folders if folder.is_dir()]


def config_names() -> list[str]:
    """The configs that come with the project, by the names that ``--config-file`` takes."""
    names = {
        str(file.relative_to(folder))
        for folder in _config_folders()
        for file in folder.rglob("*.py")
        if file.relative_to(folder).parts[0] != "common"
    }
    return sorted(names)


def find_config_file(path: str) -> str:
    """Resolve a config file.

    Args:
        path: a file, or a name relative to the configs that come with the project, with or
            without a leading ``configs/``: ``<method>/<name>.py``.

    Raises:
        FileNotFoundError: neither exists; names configs that are spelled alike.
    """
    name = Path(path).expanduser()
    if name.is_file():
        return str(name)
    if name.parts[:1] == ("configs",):
        name = Path(*name.parts[1:])
    for folder in _config_folders():
        if not name.is_absolute() and (folder / name).is_file():
            return str(folder / name)
    near = _spelled_alike(name)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise FileNotFoundError(f"config file {path} does not exist.{hint}")


def _spelled_alike(name: Path) -> list[str]:
    """The nearest of the configs, by the file alone where no folder is named."""

    def likeness(other: str) -> float:
        of_other = other if len(name.parts) > 1 else Path(other).name
        return difflib.SequenceMatcher(None, str(name), of_other).ratio()

    near = sorted(config_names(), key=likeness, reverse=True)[:4]
    return [other for other in near if likeness(other) >= 0.4]


def get_config(path: str, *, trust_config: bool = False) -> DictConfig:
    """Load a config file, which may register data sets; it may be loaded again.

    A config of one's own may import modules that lie beside it: its folder is added to the end of
    ``sys.path``. It may also be the ``config.yaml`` of a run, which may name nothing but parts of
    detectors (:mod:`.trust`). That of an older one may name things where they no longer are; the
    names of today take their place. ``~/`` at the beginning of a text is the home folder.

    Args:
        path: see :func:`find_config_file`.
        trust_config: a YAML config may name and build anything, as a LazyConfig may.

    Raises:
        FileNotFoundError: there is none.
        UserError: it registers another data set under a name that is taken, or is a YAML that has
            to be trusted.
    """
    file = find_config_file(path)
    if Path(file).suffix == ".py":
        _let_import_from(Path(file).resolve().parent)
    is_yaml = Path(file).suffix in (".yaml", ".yml")
    if is_yaml and not trust_config:
        cfg = OmegaConf.create(read_yaml(file), flags={"allow_objects": True})
    else:
        with repeatable_registrations():
            cfg = LazyConfig.load(file)
    if is_yaml:
        _follow_moves(cfg)
        if not trust_config:
            check_targets(OmegaConf.to_container(cfg, resolve=False), file)
    _expand_homes(cfg)
    return cfg


def _let_import_from(folder: Path) -> None:
    """For good: loader processes and ``config.yaml`` name these modules later."""
    is_packaged = any(packaged in (folder, *folder.parents) for packaged in _config_folders())
    # At the end, where it hides no package that is installed.
    if not is_packaged and str(folder) not in sys.path:
        sys.path.append(str(folder))


def require_lazy_config(cfg: object, name: str) -> None:
    """Tell what to do instead, where Detectron2's other kind of config is given.

    Args:
        cfg: what a class was called with.
        name: of the class.

    Raises:
        UserError: it is a ``CfgNode``.
    """
    if isinstance(cfg, CfgNode):
        raise UserError(
            f"{name} has no CfgNode (the YAML configs of Detectron2, get_cfg()): its config is a "
            "LazyConfig. cfg = detection_toolkit.config.get_config(FILE) loads one, "
            "detectron2.config.instantiate(cfg.model) builds the model in the place of "
            "build_model(cfg), and detection_toolkit.engine.Predictor.from_config(FILE, WEIGHTS) "
            "takes the place of DefaultPredictor(cfg); docs/extending.md has an example"
        )


def config_text(cfg: DictConfig) -> str:
    """A config as YAML, as ``LazyConfig.save`` writes it, and as ``config.yaml`` of a run has it.

    Raises:
        UserError: it holds something that YAML cannot express.
    """
    cfg = copy.deepcopy(cfg)
    _name_targets(cfg)
    mode = SCMode.INSTANTIATE
    values = OmegaConf.to_container(cfg, resolve=False, structured_config_mode=mode)
    try:
        return yaml.dump(values, default_flow_style=None, allow_unicode=True, width=9999)
    except (TypeError, ValueError, AttributeError, yaml.YAMLError, pickle.PicklingError) as error:
        raise UserError(f"the config holds what YAML cannot express: {error}") from error


def _name_targets(node: DictConfig | ListConfig) -> None:
    """Put names in the place of the callables of a config, in place."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    if isinstance(node, DictConfig) and callable(node.get("_target_")):
        with contextlib.suppress(AttributeError):  # one without a name
            node._target_ = _convert_target_to_string(node._target_)
    for child in node._content.values() if isinstance(node, DictConfig) else node._content:
        if isinstance(child, (DictConfig, ListConfig)):
            _name_targets(child)


def register_moved_names(names: Mapping[str, str | Callable[[DictConfig], None]]) -> None:
    """Let ``config.yaml`` of older runs name things where they were.

    A package calls this when it is imported, for names that begin with its own.

    Args:
        names: dotted names as they were -> as they are. That of a package or module stands for all
            that it holds and that has no entry of its own. Where more than the name has changed,
            a function that rewrites the node with this ``_target_``, in place.
    """
    _MOVED_NAMES.update(names)


def _expand_homes(node: DictConfig | ListConfig) -> None:
    """Put the home folder in the place of ``~/`` in the texts of a config, in place."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    items = node._content.items() if isinstance(node, DictConfig) else enumerate(node._content)
    for key, child in list(items):
        if isinstance(child, (DictConfig, ListConfig)):
            _expand_homes(child)
        elif isinstance(text := child._value(), str) and _with_home(text) != text:
            node[key] = _with_home(text)


def _with_home(text: str) -> str:
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _follow_moves(node: DictConfig | ListConfig) -> None:
    """Rename the targets of a config, in place."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    if isinstance(node, DictConfig) and isinstance(node.get("_target_"), str):
        rewrite = _moved(node._target_)
        if callable(rewrite):
            rewrite(node)
        else:
            node._target_ = rewrite
    children = node._content.values() if isinstance(node, DictConfig) else node._content
    for child in children:
        if isinstance(child, (DictConfig, ListConfig)):
            _follow_moves(child)


def _moved(name: str) -> str | Callable[[DictConfig], None]:
    package, *parts = name.split(".")
    # Importing a package registers what has moved; whoever builds the target says if there is none.
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        importlib.import_module(package)
    for length in range(len(parts), 0, -1):
        prefix = ".".join([package, *parts[:length]])
        moved = _MOVED_NAMES.get(prefix)
        if moved is not None:
            return moved if callable(moved) else moved + name[len(prefix) :]
    return name


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Set keys of a config from ``key=value`` texts, in Hydra's syntax.

    Where a text is expected, the value is taken as it stands (``train.output_dir=2024_11_26``, a
    path with a comma), and ``~/`` at its beginning is the home folder. Quotes around it are not
    its own, ``null`` is nothing, and what begins with a bracket is a list or a group.

    Unlike Detectron2's ``LazyConfig.apply_overrides``, a key must exist, or be an argument of the
    callable that its node stands for. ``+key=value`` adds a new one. Groups are merged, but a value
    with a ``_target_`` replaces the whole node, as it calls something else, with arguments of its
    own: ``model.criterion.label_assigner={_target_:detection_toolkit.training.StagewiseMatcher}``.

    Args:
        cfg: changed in place and returned.
        overrides: e.g. ``["train.max_iter=100", "optimizer.lr=1e-4"]``.

    Raises:
        ValueError: a text is not ``key=value``, or would put a plain value in the place of a group
            of keys.
        KeyError: there is no such key; names the nearest ones.
    """
    parser = OverridesParser.create()
    keys: list[str] = []
    references: list[tuple[str, str]] = []
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"{text!r}: options stand before the first key=value")
        if "=" not in text:
            raise UserError(
                f"{text!r} does not set anything: write overrides as key=value, "
                "for example train.max_iter=100"
            )
        key, value, adds = _as_text(cfg, text) or _parse(parser, text)
        if isinstance(value, str):
            value = _with_home(value)
        keys.append(key)
        if not adds:
            _check_override(cfg, key, value)
        try:
            replaces = isinstance(value, dict) and "_target_" in value
            OmegaConf.update(cfg, key, value, merge=not replaces, force_add=True)
        except Exception as error:
            raise UserError(f"the override {text!r} cannot be applied: {error}") from error
        if isinstance(value, str) and "${" in value:
            references.append((key, text))
    for key, text in references:  # another override may have set what is referred to
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(
                f"the override {text!r} refers to what is not there: ${{a.b}} is the entry a.b of "
                "the config, and ${oc.env:NAME} the environment's NAME"
            ) from error
    for key in dict.fromkeys(keys):  # what else is there, an older version may have written
        above = key.rpartition(".")[0]
        node = OmegaConf.select(cfg, above, throw_on_missing=False) if above else cfg
        if isinstance(node, (DictConfig, ListConfig)):
            _check_arguments(node, above, deep=False)
        node = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(node, (DictConfig, ListConfig)):
            _check_arguments(node, key)
    return cfg


def _check_arguments(node: DictConfig | ListConfig, key: str, *, deep: bool = True) -> None:
    """
    Args:
        node: of a config.
        key: where it is.
        deep: with all nodes in it.

    Raises:
        UserError: a node has an argument that what it calls does not take; names the nearest.
    """
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    try:
        is_call = isinstance(node, DictConfig) and _takes_no_more(node)
    except Exception:  # a module that is not there, or is broken: whoever builds the node says so
        is_call = False
    known = arguments_of_target(node) if is_call else set()
    items = node._content.items() if isinstance(node, DictConfig) else enumerate(node._content)
    for name, child in items:
        path = f"{key}.{name}" if key else str(name)
        if is_call and name not in known and not str(name).startswith("_"):
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            target = _name_of_target(node)
            names = ", ".join(near or sorted(known))
            raise UnknownNameError(
                f"{path}: {target} takes no {name!r}; "
                + (f"the nearest are {names}" if near else f"it takes {names or 'nothing'}")
            )
        if deep and isinstance(child, (DictConfig, ListConfig)):
            _check_arguments(child, path)


def _as_text(cfg: DictConfig, text: str) -> tuple[str, Any, bool] | None:
    """Key, value, and whether the key is to be added; None where Hydra's grammar is to read it."""
    key, value = text.split("=", 1)
    name = key.lstrip("+")
    if value == "null" or value[:1] in ("'", '"', "[", "{") or not _takes_text(cfg, name):
        return None
    return name, value, key != name


def _takes_text(cfg: DictConfig, key: str) -> bool:
    """Whether a key holds a text, or is an argument that is declared as one."""
    try:
        node = _find_node(cfg, key)
        parent = _find_node(cfg, key.rpartition(".")[0]) if "." in key else cfg
    except UnknownNameError:
        return False
    if isinstance(node, Node) and node._is_interpolation():
        node = node._maybe_dereference_node()
    if isinstance(node, (DictConfig, ListConfig)) and not node._is_none():
        return False
    value = node._value() if isinstance(node, Node) else None
    if value is not None and not isinstance(value, str):
        return False
    declared = _declared_kinds(parent, key.rpartition(".")[2])
    if declared & {"int", "float", "bool"}:
        return False
    return value is not None or "str" in declared


def _declared_kinds(node: object, argument: str) -> set[str]:
    """Words in the annotation of an argument of what a node calls."""
    parameter = _parameters_of_target(node).get(argument) if isinstance(node, DictConfig) else None
    if parameter is None or parameter.annotation is parameter.empty:
        return set()
    annotation = parameter.annotation
    return set(re.findall(r"\w+", annotation if isinstance(annotation, str) else repr(annotation)))


def _parse(parser: OverridesParser, text: str) -> tuple[str, Any, bool]:
    """Key, value, and whether the key is to be added."""
    key, value = text.split("=", 1)
    try:
        override = parser.parse_override(text)
    except HydraException as error:
        # Hydra's grammar knows ASCII only; a path or a name is taken as it stands.
        if any(c in value for c in "[]{}(),'\"") or not key:
            raise UserError(
                f"the override {text!r} cannot be understood: {error}. Quote values with special "
                "characters, for example key=\"'a, b'\""
            ) from error
        return key.lstrip("+"), value, key.startswith("+")
    if override.type not in (OverrideType.CHANGE, OverrideType.ADD):
        raise UserError(f"only key=value and +key=value are supported, not {text!r}")
    if override.is_sweep_override():
        raise UserError(
            f"the override {text!r} names several values: a number has a point, and a list is "
            f"{key}=[a,b]"
        )
    return override.key_or_group, override.value(), override.type is OverrideType.ADD


def _check_override(cfg: DictConfig, key: str, value: Any) -> None:
    node = _find_node(cfg, key)
    if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
        return
    if isinstance(value, dict):
        if "_target_" not in value:  # which calls something else, with arguments of its own
            for name, item in value.items():
                _check_override(cfg, f"{key}.{name}", item)
    elif value is not None and not str(value).startswith("${"):
        names = ", ".join(str(name) for name in node if name != "_target_")
        raise UserError(
            f"{key} is a group of keys ({names}), which {value!r} cannot replace: set one of them"
        )


def _find_node(cfg: DictConfig, key: str) -> object:
    """The node of a key; None for an argument that the config leaves at its default.

    Raises:
        KeyError: there is neither.
    """
    node = cfg
    parts = key.replace("[", ".").replace("]", "").split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            if part.lstrip("-").isdigit() and -len(node) <= int(part) < len(node):
                node = node._get_node(int(part))
                continue
        elif isinstance(node, DictConfig):
            if node._is_none():
                pass
            elif part in node or node._get_node(part) is not None:
                node = node._get_node(part)
                if isinstance(node, DictConfig) and node._is_interpolation():
                    node = node._dereference_node()
                continue
            elif depth == len(parts) - 1 and part in arguments_of_target(node):
                return None
        raise UnknownNameError(_no_such_key(cfg, key, node, ".".join(parts[:depth])))
    return node


def arguments_of_target(node: DictConfig) -> set[str]:
    """Names of the keyword arguments of what an ``L(...)`` node calls."""
    return set(_parameters_of_target(node))


def _parameters_of_target(node: DictConfig) -> dict[str, inspect.Parameter]:
    signature = _signature_of_target(node)
    parameters = () if signature is None else signature.parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p for p in parameters if p.kind in kinds}


def _signature_of_target(node: DictConfig) -> inspect.Signature | None:
    target = None if node._is_none() else node.get("_target_")
    if target is None:
        return None
    target = locate(target) if isinstance(target, str) else target
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _name_of_target(node: DictConfig) -> str:
    target = node.get("_target_")
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _flat_keys(node: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    keys = []
    items = node.items_ex(resolve=False) if isinstance(node, DictConfig) else enumerate(node)
    for name, child in items:
        if name == "_target_":
            continue
        key = f"{prefix}{name}"
        keys.append(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += _flat_keys(child, f"{key}.")
    return keys


def _no_such_key(cfg: DictConfig, key: str, node: object, found: str) -> str:
    candidates = set(_flat_keys(cfg))
    if isinstance(node, DictConfig) and not node._is_none():
        prefix = f"{found}." if found else ""
        candidates |= {prefix + argument for argument in arguments_of_target(node)}
    near = difflib.get_close_matches(key, candidates, n=4, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    near += [c for c in sorted(candidates) if c.rsplit(".", 1)[-1] == last and c not in near][:3]
    hint = f"the nearest keys are {', '.join(near)}" if near else "no key is spelled alike"
    # A call refuses an argument that it does not know, and a run an unknown setting.
    closed = found.split(".")[0] == "train" or _takes_no_more(node)
    addition = "" if closed else f". +{key}=... would add it"
    return f"the config has no key {key!r}; {hint}{addition}"


def _takes_no_more(node: object) -> bool:
    """Whether a node calls something that takes the arguments alone that it names."""
    signature = _signature_of_target(node) if isinstance(node, DictConfig) else None
    if signature is None:
        return False
    return all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values())
