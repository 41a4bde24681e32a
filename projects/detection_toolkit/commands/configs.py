"""List the configs that come with the project, by the names that --config-file takes."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from ..engine import user_errors
from ..engine.parsers import Parser, make_parser
from ..errors import UnknownNameError

__all__ = ["get_parser", "main"]

EXAMPLES = """
PROG
PROG r50 12e --describe
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="list those alone that have all of these in them"
    )
    parser.add_argument(
        "--describe", action="store_true", help="say what each is, and print their paths"
    )
    return parser


def description(file: str) -> str:
    """What a config says of itself, in one line."""
    text = ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = get_parser(prog).parse_args(argv)
    with user_errors():
        from ..config import config_names, find_config_file

        names = [name for name in config_names() if all(word in name for word in args.words)]
        if not names:
            raise UnknownNameError(f"no config has {' and '.join(args.words)} in its name")
        for name in names:
            print(name)
            if args.describe:
                file = find_config_file(name)
                print(f"    {description(file)}\n    {file}")
    return 0
