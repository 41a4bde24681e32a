"""Names in docstrings: they lead to the page of the package that has them in ``__all__``.

A docstring names a thing where it is defined, ``detection_toolkit.modeling.decoder.Route``; the
reference has it where it is imported from, ``detection_toolkit.modeling.Route``. What is in no
``__all__`` is shown without a link. A name that does not exist at all fails the build.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PROJECTS = Path(__file__).resolve().parents[2] / "projects"
OWN = {path.parent.name for path in PROJECTS.glob("*/__init__.py")}

_SOME_NAMES = re.compile(r"\s*\w+(, \w+)*,")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _import_lazy_names)
    app.connect("missing-reference", _resolve)
    # Before that of Napoleon, which reads Google's style.
    app.connect("autodoc-process-docstring", _prepare, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _import_lazy_names(app: Sphinx) -> None:
    """Autodoc finds only what a package has imported."""
    for path in sorted([*PROJECTS.glob("*/__init__.py"), *PROJECTS.glob("*/*/__init__.py")]):
        package = import_module(".".join(path.parent.relative_to(PROJECTS).parts))
        for name in getattr(package, "__all__", ()):
            setattr(package, name, getattr(package, name))


def _prepare(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Write what Napoleon would misread in another way."""
    if kind in ("attribute", "data", "property"):
        # It takes what precedes a colon in the first line for the type: that is a comment here.
        lines[:0] = ["..", ""]
    # What Python says of every named tuple.
    empty = ("Create new instance of ", "Alias for field number ")
    lines[:] = [line for line in lines if not line.startswith(empty)]
    for i in range(len(lines) - 1, 0, -1):
        # It expects the names of arguments that are described together in one line.
        if _SOME_NAMES.fullmatch(lines[i - 1]):
            lines[i - 1 : i + 1] = [f"{lines[i - 1]} {lines[i].strip()}"]


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Element
) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    found = _find(node["reftarget"], _scopes(node))
    if found is None:
        # The types in a signature may be aliases, or what only a type checker imports.
        return shown if _in_signature(node) else None
    return _link(app, env, node, shown, *found) or shown


def _link(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    shown: nodes.Element,
    module: str,
    path: str,
) -> nodes.Node | None:
    """To the entry of an object in the closest package above its module, if there is one."""
    domain = env.get_domain("py")
    while module:
        name = f"{module}.{path}".rstrip(".")
        if name in domain.objects:
            whole = addnodes.pending_xref("", **{**node.attributes, "refspecific": False})
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, whole, shown)
        module = module.rpartition(".")[0]
    return None


def _scopes(node: nodes.Node) -> Iterator[str]:
    """Full names of that in whose docstring a node is: as it is imported, and where it is."""
    while not isinstance(node, addnodes.desc) and node.parent is not None:
        node = node.parent
    sources = (child.source or "" for child in node.findall(nodes.Element))
    name = next((s.partition("docstring of ")[2] for s in sources if "docstring of " in s), "")
    name = name.partition(":")[0]
    yield name
    for owner in (name, name.rpartition(".")[0]):  # an attribute does not know its module
        yield ".".join(_look_up(owner) or ())


def _find(target: str, scopes: Iterable[str]) -> tuple[str, str] | None:
    """Module, and path in it, of what a name means in any of these scopes."""
    for scope in scopes:
        while scope:
            found = _look_up(f"{scope}.{target}")
            if found is not None:
                return found
            scope = scope.rpartition(".")[0]
    return _look_up(target) or _look_up(f"builtins.{target}") or _defined_anywhere(target)


@cache
def _defined_anywhere(target: str) -> tuple[str, str] | None:
    """What has this name in any of our modules: an error is often raised far from its class."""
    for name in sorted(sys.modules):
        if name.split(".")[0] in OWN:
            value = getattr(sys.modules[name], target, None)
            if getattr(value, "__module__", None) == name:
                return name, target
    return None


@cache
def _look_up(name: str) -> tuple[str, str] | None:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        module = ".".join(parts[:i])
        value = _module(module)
        if value is None:
            continue
        for part in parts[i:]:
            if not hasattr(value, part) and part not in getattr(value, "__annotations__", ()):
                return None
            value = getattr(value, part, None)
        home, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        return (home, path) if home and path else (module, ".".join(parts[i:]))
    return None


@cache
def _module(name: str) -> Any:
    if name.split(".")[0] in OWN and name not in sys.modules:
        try:
            import_module(name)
        except ModuleNotFoundError:
            return None
    return sys.modules.get(name)


def _in_signature(node: nodes.Node) -> bool:
    parent = node.parent
    while parent is not None and not isinstance(parent, addnodes.desc_signature):
        parent = parent.parent
    return parent is not None
