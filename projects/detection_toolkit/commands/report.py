"""Judge a trained detector: one HTML page without other files, and the numbers as JSON.

Reads what training (metrics.json) and evaluation (inference/DATA SET/) left in a run's folder, and
writes report.html and report.json there. Unless it was evaluated with train.stage_evaluation=true,
the parts about single stages are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..engine import user_errors
from ..engine.arguments import add_trust_argument
from ..engine.parsers import Parser, make_parser

EXAMPLES = """
PROG output/mine
PROG output/mine --backend hotcoco --images 8
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument("output_dir", type=Path, help="train.output_dir of the run")
    parser.add_argument("--dataset", help="test set, where inference/ has several")
    parser.add_argument(
        "--confidence-threshold",
        "--score-threshold",
        dest="score_threshold",
        type=float,
        default=DEFAULT_SCORE_THRESHOLD,
        help="of the detections that errors, confusion and images are about (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=4, help="so many best and worst ones (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "hotcoco"),
        default="pycocotools",
        help="what computes COCO's metrics; hotcoco is to be installed (default: %(default)s)",
    )
    add_trust_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = get_parser(prog).parse_args(argv)
    with user_errors():
        from ..visualization.report import write_report

        written = write_report(
            args.output_dir,
            dataset=args.dataset,
            score_threshold=args.score_threshold,
            num_images=args.images,
            backend=args.backend,
            trust_config=args.trust_config,
        )
    for path in written:
        print(path)
    return 0
