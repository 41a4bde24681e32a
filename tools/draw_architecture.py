#!/usr/bin/env python3
"""Draw the packages and which imports which: docs/images/architecture.svg.

    python tools/draw_architecture.py            # after a package or an import has changed
    python tools/draw_architecture.py --check    # fails where the picture is not today's

The picture is drawn from the imports of the code, so it shows what is there, not what was meant.
An arrow of a package that another one on its way has, too, is left out.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
TOOLKIT = "detection_toolkit"
COMMANDS = "command lines"
BASE = "structures, config, errors"
# What stands beside what; the imports themselves say who is above whom.
COMMAND_FILES = ("train_net.py", "demo", "tools")
WIDTH, ROW, BOX_HEIGHT, BOX_WIDTH = 940, 84, 36, 140


def python_files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def packages() -> dict[str, list[Path]]:
    """Node of the picture -> its files."""
    nodes = {COMMANDS: [f for name in COMMAND_FILES for f in python_files(ROOT / name)]}
    for folder in sorted((ROOT / "projects").iterdir()):
        if not (folder / "__init__.py").is_file():
            continue
        for file in python_files(folder):
            parts = file.relative_to(folder).parts
            if folder.name != TOOLKIT:
                node = folder.name
            elif parts == ("__main__.py",):
                node = COMMANDS
            else:
                node = parts[0] if len(parts) > 1 and parts[0] != "structures" else BASE
            nodes.setdefault(node, []).append(file)
    return nodes


def imported(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, in full."""
    inside = file.is_relative_to(ROOT / "projects")
    package = file.relative_to(ROOT / "projects").parent.parts if inside else ()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = [*start, *((node.module or "").split(".") if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def arrows(nodes: dict[str, list[Path]]) -> dict[str, set[str]]:
    """Node -> nodes that it imports."""
    found: dict[str, set[str]] = {node: set() for node in nodes}
    for node, files in nodes.items():
        for name in (name for file in files for name in imported(file)):
            parts = name.split(".")
            if parts[0] == TOOLKIT:
                target = parts[1] if len(parts) > 1 and parts[1] in nodes else BASE
            else:
                target = parts[0]
            if target in nodes and target != node:
                found[node].add(target)
    return found


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """Height of each node above the ones that it imports; refuses circles."""
    heights: dict[str, int] = {}

    def height(node: str, way: tuple[str, ...]) -> int:
        if node in way:
            sys.exit(f"error: packages import each other in a circle: {' -> '.join([*way, node])}")
        if node not in heights:
            below = (height(target, (*way, node)) for target in edges[node])
            heights[node] = max(below, default=-1) + 1
        return heights[node]

    for node in edges:
        height(node, ())
    return heights


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that others imply."""

    def reached(node: str) -> set[str]:
        return edges[node].union(*(reached(target) for target in edges[node]))

    return {
        node: targets - set().union(*(reached(target) for target in targets))
        for node, targets in edges.items()
    }


def layout(edges: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Node -> centre: methods to the left, the toolkit to the right, what imports above."""
    methods = {node for node in edges if (ROOT / "projects" / node).is_dir()}
    toolkit = edges.keys() - methods - {COMMANDS}
    heights = levels({node: edges[node] & toolkit for node in toolkit})
    top = max(heights.values()) + 1
    places = {COMMANDS: (WIDTH / 2, 34.0)}
    above = levels({node: edges[node] & methods for node in methods})
    for i, node in enumerate(sorted(methods, key=lambda node: (-above[node], node))):
        places[node] = (90.0, 34.0 + ROW * (0.9 + 0.62 * i))
    for level in range(top):
        row = sorted(node for node, height in heights.items() if height == level)
        for i, node in enumerate(row):
            places[node] = (210 + (WIDTH - 210) * (i + 0.5) / len(row), 34.0 + ROW * (top - level))
    return places


def draw() -> str:
    """The picture as SVG."""
    edges = arrows(packages())
    levels(edges)  # refuses circles of all packages
    places = layout(edges)
    height = round(max(y for _, y in places.values()) + 34)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#888"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for node, targets in reduced(edges).items():
        x, y = places[node]
        for target in sorted(targets):
            to_x, to_y = places[target]
            up = 1 if to_y < y else -1
            parts.append(
                f'<path d="M{x:.0f} {y - up * BOX_HEIGHT / 2:.0f} L{to_x:.0f} '
                f'{to_y + up * BOX_HEIGHT / 2:.0f}" stroke="{"#c80" if up > 0 else "#999"}" '
                'fill="none" marker-end="url(#tip)"/>'
            )
    for node, (x, y) in places.items():
        method = (ROOT / "projects" / node).is_dir()
        color = "#fbe3c8" if method else "#e6e6e6" if node == COMMANDS else "#d5e5f5"
        width = BOX_WIDTH if len(node) < 20 else BOX_WIDTH + 50
        parts.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{width}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="{color}" stroke="#666"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{node}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where it differs")
    picture = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        sys.exit(f"error: {PICTURE.relative_to(ROOT)} is not today's: run {Path(__file__).name}")


if __name__ == "__main__":
    main()
