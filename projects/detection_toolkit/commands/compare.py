"""Is run B better than run A on the images that both were evaluated on? A page that answers.

Compares COCO's AP of both by a paired bootstrap over the images: overall, by size of objects and
class, and by stage where both were evaluated with train.stage_evaluation=true. A run that has not
been evaluated is evaluated first, by its own config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..engine import user_errors
from ..engine.arguments import add_trust_argument
from ..engine.parsers import Parser, make_parser
from ..errors import UserError
from ..texts import shown

EXAMPLES = """
PROG output/first output/second
PROG output/first output/second --output compared.html --resamples 10000
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    for name in "ab":
        parser.add_argument(
            f"run_{name}",
            type=Path,
            metavar=f"RUN_{name.upper()}",
            help="train.output_dir of a run",
        )
    parser.add_argument("--dataset", help="test set, where inference/ has several")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/comparison.html"),
        metavar="FILE",
        help="the page; the numbers lie beside it as .json (default: %(default)s)",
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="of the images (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=DEFAULT_SCORE_THRESHOLD,
        help="least score of a detection that is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2,
        help="so many are drawn on which each run is ahead (default: %(default)s)",
    )
    add_trust_argument(parser)
    return parser


def evaluate_where_missing(run: Path, *, trust_config: bool) -> None:
    """Evaluate the weights of a run whose folder holds no results."""
    from ..evaluation.results import evaluated_sets
    from . import evaluate

    if not run.is_dir() or evaluated_sets(run):
        return
    import torch

    print(f"{shown(run)} holds no evaluation: it is evaluated now", flush=True)
    words = ["--config-file", str(run)]
    words += ["--trust-config"] * trust_config
    evaluate.main(words + ["train.device=cpu"] * (not torch.cuda.is_available()))


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = get_parser(prog).parse_args(argv)
    with user_errors():
        if args.resamples < 100:
            raise UserError(f"--resamples must be at least 100, got {args.resamples}")
        if args.seed < 0:
            raise UserError(f"--seed must be 0 or more, got {args.seed}")
        if args.output.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {shown(args.output)} must end in .html")
        from ..visualization.comparison import compare_runs, comparison_table, write_comparison

        for run in (args.run_a, args.run_b):
            evaluate_where_missing(run, trust_config=args.trust_config)
        numbers, examples = compare_runs(
            args.run_a,
            args.run_b,
            dataset=args.dataset,
            resamples=args.resamples,
            seed=args.seed,
            score_threshold=args.confidence_threshold,
            num_images=args.images,
            trust_config=args.trust_config,
        )
        written = write_comparison(numbers, examples, args.output)
    print(comparison_table(numbers))
    for path in written:
        print(shown(path))
    return 0
