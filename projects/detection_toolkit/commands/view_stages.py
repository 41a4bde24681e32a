"""Draw what the stages of a detector do with pictures: one figure each, as PNG and PDF.

Each figure shows the detections after every stage; where the best queries sample, coloured by
feature level; how their boxes move and their scores change; and which earlier filters each stage
reuses, with what share. With --animation, NAME_stages.webp shows the boxes moving through the
stages. Without --config-file it is the detector of the built-in shapes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..engine import user_errors
from ..engine.arguments import find_pictures, parse_arguments
from ..engine.parsers import Parser
from .figures import draw_each, figures_parser, open_detector

EXAMPLES = """
PROG --input picture.jpg --output output/stages
PROG --config-file output/mine/config.yaml --input folder/ --output output/stages --animation
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = figures_parser(__doc__, EXAMPLES, prog, kind="stages", suffixes=".png and .pdf")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="pictures, folders of them, or globs",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=DEFAULT_SCORE_THRESHOLD,
        help="least score of a detection that is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=2,
        choices=range(1, 7),
        help="so many of the best queries are followed (default: %(default)s)",
    )
    parser.add_argument(
        "--animation",
        action="store_true",
        help="also write NAME_stages.webp, in which the boxes move from stage to stage",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw all pictures; returns how many could not be drawn."""
    from ..data import read_image
    from ..visualization import (
        animate_stages,
        choose_queries,
        draw_stages,
        save_animation,
        save_figure,
        trace_stages,
    )

    files = find_pictures(args.input)
    predictor = open_detector(args)

    def draw(number: int, stem: Path) -> list[str]:
        image = read_image(files[number], "BGR")
        traces = trace_stages(predictor.model, predictor.preprocess(image))
        choose_queries(traces, args.queries, threshold=args.confidence_threshold)
        figure = draw_stages(
            image[:, :, ::-1],
            traces,
            predictor.metadata,
            threshold=args.confidence_threshold,
            num_queries=args.queries,
            strides=predictor.model.strides,
        )
        written = save_figure(figure, stem)
        if args.animation:
            frames = animate_stages(
                image[:, :, ::-1],
                traces,
                predictor.metadata,
                threshold=args.confidence_threshold,
            )
            written.append(save_animation(frames, stem.with_name(stem.name + ".webp")))
        return written

    return draw_each(args, files, draw, kind="stages", title="What the stages do")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(prog), argv)
    with user_errors():
        return 1 if run(args) else 0
