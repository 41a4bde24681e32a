"""The command of an installed project, ``python -m detection_toolkit``, and its subcommands.

Each subcommand is a module with ``get_parser(prog)`` and ``main(argv, prog=...)``, which is
imported when it is called: what another needs costs nothing. ``train_net.py``, ``demo/`` and
``tools/`` of a checkout call the same modules.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from .. import __version__
from ..program import program
from ..texts import shown

__all__ = ["COMMANDS", "Command", "Group", "load", "main"]


class Command(NamedTuple):
    """A subcommand: its module, relative to the toolkit, and what it does."""

    module: str
    summary: str


class Group(NamedTuple):
    """A subcommand that has subcommands."""

    members: Mapping[str, Command]
    summary: str


COMMANDS: dict[str, Command | Group] = {
    "train": Command("commands.train", "train on your data, or what a config describes"),
    "eval": Command("commands.evaluate", "evaluate weights on the test set of a config"),
    "predict": Command("commands.predict", "detect in pictures, folders, a video, the webcam"),
    "export": Command("commands.export", "write a detector as ONNX or torch.export"),
    "check": Command("commands.check", "find problems in a data set"),
    "report": Command("commands.report", "write an HTML page about a run"),
    "compare": Command("commands.compare", "tell whether one run is better than another"),
    "view": Group(
        {
            "stages": Command("commands.view_stages", "draw what every stage does with a picture"),
            "labels": Command("commands.view_labels", "draw which labels the stages learn from"),
            "data": Command("commands.view_data", "draw the images as training sees them"),
        },
        "draw what training sees, and what happens inside of a detector",
    ),
    "web": Command("web.__main__", "show a detector on a page in the browser"),
    "convert": Group(
        {
            "data": Command("commands.convert_data", "a data set into another format, or divided"),
            "checkpoint": Command(
                "commands.convert_checkpoint", "official weights into ours, and back"
            ),
        },
        "convert data sets, and weights of other projects",
    ),
    "configs": Command("commands.configs", "list the configs that come with the project"),
    "completion": Command("commands.completion", "print a script by which a shell completes"),
}

# What other projects call them.
_ELSEWHERE = {
    **dict.fromkeys(("val", "validate", "test"), "eval"),
    **dict.fromkeys(("demo", "detect", "infer", "inference"), "predict"),
    **dict.fromkeys(("visualize", "show", "draw"), "view"),
}

_HELP = """\
usage: {prog} COMMAND ...

{about}

commands:
{commands}

{prog} COMMAND --help shows the options of a command, and examples of it.
"""
_ABOUT = """\
Query-based object detectors: train, evaluate, look inside, export.

examples:
  {prog} configs
  {prog} check --data my/data.yaml
  {prog} train --data my/data.yaml train.output_dir=output/mine
  {prog} predict --weights output/mine --input my/images --output drawn"""


def load(command: Command):
    """The module of a command."""
    return import_module(f"..{command.module}", __name__)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Call the subcommand that the first argument names.

    Args:
        argv: ``sys.argv[1:]`` by default.

    Returns:
        its exit code.

    Raises:
        SystemExit: of a subcommand; or there is no such one, with a line that names the nearest.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    return _call(Group(COMMANDS, _ABOUT), arguments, program())


def _call(group: Group, arguments: list[str], prog: str) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, group.members))
        commands = [f"  {n:{width}}  {c.summary}" for n, c in group.members.items()]
        about = group.summary.format(prog=prog)
        print(_HELP.format(prog=prog, about=about, commands="\n".join(commands)), end="")
        return 0
    name, *rest = arguments
    if name not in group.members:
        sys.exit(f"error: {_unknown(name, group, prog)}")
    command, prog = group.members[name], f"{prog} {name}"
    if isinstance(command, Group):
        return _call(command, rest, prog)
    return load(command).main(rest, prog=prog)


def _unknown(name: str, group: Group, prog: str) -> str:
    known = ", ".join(group.members)
    if name.startswith("-"):
        return f"{prog} begins with a command, before {shown(name)}: {known}"
    near = difflib.get_close_matches(name.lower(), group.members, n=1, cutoff=0.5)
    near = [n for n in [_ELSEWHERE.get(name.lower())] if n in group.members] or near
    if near:
        return f"no command {shown(name)}: did you mean {near[0]}? There are {known}"
    return f"no command {shown(name)}: there are {known}"
