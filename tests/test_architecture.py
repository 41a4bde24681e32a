"""The wall: what a part of the project may import, and that the toolkit names no method.

Layers, each of which imports only what stands below it:

    command lines (train_net.py, demo/, tools/)
    methods (the other packages of projects/)
    detection_toolkit, in itself:
        __main__ (the command), commands
        web, studies
        engine
        export, visualization, evaluation, parity
        modeling, training (not one another)
        data, checkpoint
        structures, config, defaults, errors, durable, memory, texts, threads, trust, projects,
        program, on_demand, registrations
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from detection_toolkit.projects import project_names

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
TOOLKIT = "detection_toolkit"
METHODS = project_names()

LAYERS = [
    {
        "structures",
        "config",
        "errors",
        "defaults",
        "durable",
        "memory",
        "texts",
        "threads",
        "trust",
        "projects",
        "program",
        "on_demand",
        "registrations",
        "__init__",
    },
    {"data", "checkpoint"},
    {"modeling", "training"},
    {"export", "visualization", "evaluation", "parity"},
    {"engine"},
    {"web", "studies"},
    {"commands"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
APART = {frozenset({"modeling", "training"})}

# To go: (file in the toolkit, the method that it imports or names).
IMPORTS_TO_GO: set[tuple[str, str]] = set()
WORDS_TO_GO: set[tuple[str, str]] = set()
# To go: (part, the part above it or beside it that it imports).
LAYERS_TO_GO: set[tuple[str, str]] = set()


def sources(package: str) -> list[Path]:
    return sorted((PROJECTS / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PROJECTS / TOOLKIT).as_posix()


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, within functions too; relative ones in full."""
    package = path.relative_to(PROJECTS).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *((node.module,) if node.module else ())])
            # What is imported may be a module itself.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, (ast.Name, ast.Attribute))
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of all strings, docstrings and constant parts of f-strings among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def part_of(path: Path) -> str:
    """The part of the toolkit that a file belongs to."""
    return path.relative_to(PROJECTS / TOOLKIT).with_suffix("").parts[0]


def test_there_is_something_to_look_at():
    assert {"stageinteractor", "adamixer", "sqr", "dfvt"} <= set(METHODS)
    assert len(sources(TOOLKIT)) > 50
    assert TOOLKIT not in METHODS


def test_every_part_of_the_toolkit_has_its_layer():
    assert {part_of(path) for path in sources(TOOLKIT)} == set(LEVEL)


def test_the_toolkit_imports_no_method():
    found = {
        (relative(path), name.split(".")[0])
        for path in sources(TOOLKIT)
        for name in imported_names(path)
        if name.split(".")[0] in METHODS
    }
    assert found == IMPORTS_TO_GO


def test_the_toolkit_names_no_method():
    """Whole words, however they are written: a name such as AdaMixer is that of its package."""
    word = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(METHODS)})(?![A-Za-z0-9])", re.IGNORECASE)
    found = {
        (relative(path), match.group(1).lower()): f"{relative(path)}:{line}: {match.group(1)}"
        for path in sources(TOOLKIT)
        for line, text in strings(path)
        for match in word.finditer(text)
    }
    assert {k: v for k, v in found.items() if k not in WORDS_TO_GO} == {}
    assert WORDS_TO_GO <= set(found), "these are gone: take them off the list"


def test_parts_of_the_toolkit_import_downward_only():
    found = set()
    for path in sources(TOOLKIT):
        part = part_of(path)
        for name in imported_names(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != TOOLKIT or other == part or other not in LEVEL:
                continue
            above = LEVEL[other] > LEVEL[part]
            beside = LEVEL[other] == LEVEL[part] and frozenset({part, other}) in APART
            if above or beside:
                found.add((part, other))
    assert found == LAYERS_TO_GO


def test_parts_of_the_toolkit_import_one_another_in_no_circle():
    imports: dict[str, set[str]] = {}
    for path in sources(TOOLKIT):
        for name in imported_names(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == TOOLKIT and other in LEVEL and other != part_of(path):
                imports.setdefault(part_of(path), set()).add(other)
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


@pytest.mark.parametrize("package", [TOOLKIT, *METHODS])
def test_packages_import_no_command_line_and_no_test(package):
    root = PROJECTS.parent
    scripts = {path.stem for folder in ("tools", "demo") for path in (root / folder).rglob("*.py")}
    scripts |= {"tools", "demo", "tests", "train_net", "conftest"}
    own = {package, *(path.stem for path in sources(package))}
    for path in sources(package):
        for name in imported_names(path):
            first = name.split(".")[0]
            assert first not in scripts - own, f"{path}: {name}"


def test_walking_finds_what_it_looks_for(tmp_path, monkeypatch):
    module = tmp_path / TOOLKIT / "data" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        '"""Of AdaMixer."""\n'
        "from ..engine import launch\n"
        "from . import files\n"
        "def f():\n"
        "    import sqr.schedule\n"
        "    importlib.import_module('dfvt.layers')\n"
        "    return f'{1} stageinteractor'  # stageinteractor\n"
    )
    monkeypatch.setitem(globals(), "PROJECTS", tmp_path)
    assert set(imported_names(module)) == {
        "detection_toolkit.engine.launch",
        "detection_toolkit.data.files",
        "sqr.schedule",
        "dfvt.layers",
    }
    texts = [text for _, text in strings(module)]
    assert texts[0] == "Of AdaMixer." and " stageinteractor" in texts
