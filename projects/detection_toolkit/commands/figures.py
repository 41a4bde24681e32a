"""What commands begin and end alike that draw a figure of each of several pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.arguments import add_config_arguments
from ..engine.parsers import Parser, make_parser
from ..texts import shown

if TYPE_CHECKING:
    from ..engine import Predictor

__all__ = ["PAGE", "draw_each", "figures_parser", "open_detector"]

PAGE = "index.html"
"""The page that shows all figures, in the folder of them."""


def figures_parser(
    description: str, lines: str, prog: str | None, *, kind: str, suffixes: str
) -> Parser:
    """A parser with the arguments of a config and its weights, and ``--output``.

    Args:
        description, lines, prog: see :func:`~detection_toolkit.engine.parsers.make_parser`.
        kind: what the figures are of, as in ``NAME_kind.png``.
        suffixes: of the files of a figure, in words.
    """
    parser = make_parser(description, lines, prog)
    add_config_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output", kind),
        metavar="FOLDER",
        help=f"where NAME_{kind}{suffixes} are written, and of several pictures {PAGE}, which "
        "shows them all (default: %(default)s)",
    )
    return parser


def open_detector(args: argparse.Namespace) -> Predictor:
    """The detector of the arguments, with its weights."""
    from ..engine.inspection import build_inspected_detector
    from ..engine.logs import set_up_console
    from ..memory import keep_memory_on_cpu

    set_up_console("detection_toolkit")
    predictor = build_inspected_detector(
        args.config_file, args.opts, trust_config=args.trust_config
    )
    keep_memory_on_cpu(predictor.model)
    return predictor


def draw_each(
    args: argparse.Namespace,
    files: Sequence[str | Path],
    draw: Callable[[int, Path], list[str]],
    *,
    kind: str,
    title: str,
) -> int:
    """Draw a figure of each picture, name what cannot be drawn, and of several write the page.

    Args:
        args: of :func:`figures_parser`.
        files: of the pictures.
        draw: given the number of a picture and a path without suffix, writes the figure, with
            ".png" among its suffixes; returns the paths. A ``UserError`` or
            ``UnreadableImageError`` concerns this picture alone.
        kind: see :func:`figures_parser`.
        title: of the page.

    Returns:
        how many could not be drawn.
    """
    from tqdm import tqdm

    from ..data import UnreadableImageError, read_image
    from ..errors import UserError
    from ..visualization import figure_stems
    from ..visualization.contact_page import ContactPage

    page, failures = ContactPage(title, len(files)), 0
    stems = figure_stems(files, args.output, kind)
    for number, stem in enumerate(tqdm(stems, unit="picture", disable=len(stems) == 1 or None)):
        name = shown(files[number])
        try:
            written = draw(number, stem)
        except (UserError, UnreadableImageError) as error:
            failures += 1
            text = str(error)
            tqdm.write(f"error: {text if name in text else f'{name}: {text}'}", file=sys.stderr)
            continue
        picture = read_image(next(path for path in written if path.endswith(".png")))
        page.add(picture, name, is_wide=True)
        tqdm.write(f"{name} -> {' and '.join(written)}")
    if failures < len(files) > 1:
        print(f"{page.write(args.output / PAGE)} shows them all")
    return failures
