"""Print a script by which a shell completes commands, options, and names of configs.

The script is complete: it holds the names that there are when it is printed, and starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from ..engine import user_errors
from ..engine.parsers import Parser, make_parser
from ..errors import MissingPackageError, UserError
from ..program import command_names
from . import COMMANDS, Command, Group, load

__all__ = ["SHELLS", "full_parser", "get_parser", "main"]

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """
PROG bash > ~/.local/share/bash-completion/completions/NAME
PROG zsh > ~/.zfunc/_NAME    # a folder of $fpath
"""
# What an option takes, by how its help calls that.
_FILES = ("FILE", "JSON", "PATH")
_FOLDERS = ("FOLDER", "IMAGES")
_CONFIGS = "_detection_toolkit_configs"


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    name = (prog or "").split(" ")[0]
    parser = make_parser(__doc__, EXAMPLES.replace("NAME", name), prog)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def full_parser(prog: str) -> argparse.ArgumentParser:
    """Of the command with all of its subcommands, each of which is imported."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--version", action="version", version="")
    _add(parser, COMMANDS, prog)
    return parser


def _add(
    parser: argparse.ArgumentParser, commands: Mapping[str, Command | Group], prog: str
) -> None:
    subparsers = parser.add_subparsers()
    for name, command in commands.items():
        if isinstance(command, Group):
            child = subparsers.add_parser(name, help=command.summary)
            _add(child, command.members, f"{prog} {name}")
            continue
        own = load(command).get_parser(f"{prog} {name}")
        subparsers.add_parser(name, help=command.summary, parents=[own], add_help=False)


def _script(shell: str, prog: str) -> str:
    try:
        import shtab
    except ImportError as error:
        raise MissingPackageError(
            "completion needs an optional package: pip install shtab"
        ) from error
    from ..config import config_names

    configs = {"bash": _CONFIGS, "zsh": _CONFIGS, "tcsh": "f:*"}
    parser = full_parser(prog)
    for action in _actions(parser):
        metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        if action.dest == "config_file":
            action.complete = configs
        elif set(metavars) & {*_FILES}:
            action.complete = shtab.FILE
        elif set(metavars) & {*_FOLDERS}:
            action.complete = shtab.DIRECTORY
    names = " ".join(config_names())
    preamble = {
        "bash": f'{_CONFIGS}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{_CONFIGS}() {{ compadd {names}; _files; }}",
        "tcsh": "",
    }
    return shtab.complete(parser, shell=shell, preamble=preamble)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a parser and those below it."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found += _actions(child)
    return found


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = get_parser(prog).parse_args(argv)
    with user_errors():
        called = (prog or "").removesuffix(" completion")
        names = command_names()
        if called not in names and len(names) != 1:
            raise UserError("the project is not installed here: there is no command to complete")
        print(_script(args.shell, called if called in names else names.pop()))
    return 0
