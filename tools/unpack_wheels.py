#!/usr/bin/env python3
"""Unpack wheels into a folder, for a machine without a network.

    python3 tools/unpack_wheels.py WHEELS FOLDER

Nothing else of the machine changes, and nothing but the standard library is needed. A wheel that
this Python cannot load is left out, with a line that says so; one of Python files only is unpacked
whatever version its name has.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

_ABI3 = re.compile(r"cp3(\d+)")


def misfit(wheel: Path, version: tuple[int, int] = sys.version_info[:2]) -> str | None:
    """Why Python of this version cannot load the wheel; None where it can."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    if abi == "none" and platform == "any":
        return None
    if abi == "none" and "py3" in python.split("."):
        return None  # compiled, but for no Python of a certain version
    match = _ABI3.fullmatch(python)
    wanted = (3, int(match.group(1))) if match else None
    if wanted is not None and (version == wanted or (abi == "abi3" and version >= wanted)):
        return None
    newer = " or newer" if abi == "abi3" else ""
    return f"{wheel.name} is for {python}{newer}, and this is Python {version[0]}.{version[1]}"


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Unpack all that fit, into a folder that is emptied first; returns why others were left out.

    Raises:
        FileNotFoundError: there are no wheels.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"no wheels (*.whl) in {wheels}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left_out = []
    for wheel in found:
        reason = misfit(wheel)
        if reason is not None:
            left_out.append(reason)
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    # Detectron2's own scripts, whose name is that of a folder here.
    shutil.rmtree(folder / "tools", ignore_errors=True)
    return left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[1])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # unpack() empties it; only what has named the folder itself may ask for that.
        print(f"error: {folder} is not an empty folder: name a new one", file=sys.stderr)
        return 1
    for reason in unpack(Path(argv[0]), folder):
        print(f"left out: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
