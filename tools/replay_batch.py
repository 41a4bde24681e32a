#!/usr/bin/env python3
"""Try a batch again that training could not use.

    python tools/replay_batch.py output/bad_batch/iter0000123_rank0.pth

Prints the losses of every stage, and the first module whose output and the first parameters whose
gradient are not finite; with --draw, pictures of the batch with its boxes. The config is that of
the run (config.yaml beside bad_batch/) and the weights are those that the step was computed with,
unless others are named. A config that names other code than parts of detectors has to be trusted.

Exit code 1: the batch still gives something that is not finite. 0: it does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import (
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from detection_toolkit.engine.parsers import Parser


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", metavar="FILE", help="a bad_batch/iter*_rank*.pth")
    parser.add_argument(
        "--config-file", metavar="FILE", help="default: config.yaml of the run's folder"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="default: the *_weights.pth beside the batch; a step that was only skipped has none",
    )
    parser.add_argument("--draw", metavar="FOLDER", help="write pictures of the batch there")
    add_trust_argument(parser)
    add_overrides_argument(parser, "changes to the config, e.g. train.device=cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(), argv)
    from detection_toolkit.engine.replay import replay_batches

    with user_errors():
        finite = replay_batches(
            args.batch,
            config_file=args.config_file,
            weights=args.weights,
            overrides=args.opts,
            trust_config=args.trust_config,
            pictures=args.draw,
        )
    print("\nall is finite with these weights" if finite else "\nit is not finite again")
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
