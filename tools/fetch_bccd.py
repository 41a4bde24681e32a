#!/usr/bin/env python3
"""Build BCCD, the blood cells of docs/results.md, from its public repository.

    python tools/fetch_bccd.py

Writes annotations/{train,val,test}.json and images/ in COCO's format to $DETECTRON2_DATASETS/bccd
(./datasets/bccd), where the configs look for it. A proxy is taken from https_proxy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detection_toolkit.engine import user_errors
from detection_toolkit.engine.parsers import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where the data are not those of the stored results."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="in place of that folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--url", help="of the ZIP (default: that of github.com/Shenggan/BCCD_Dataset)"
    )
    source.add_argument("--archive", metavar="FILE", type=Path, help="a ZIP that is here already")
    args = parser.parse_args(argv)
    from detectron2.utils.logger import setup_logger
    from tabulate import tabulate

    from detection_toolkit.data.bccd import (
        BCCD_COUNTS,
        BCCD_URL,
        bccd_folder,
        convert_bccd,
        fetch_bccd,
    )

    setup_logger(name="detection_toolkit", color=False)
    folder = bccd_folder() if args.output is None else args.output
    with user_errors():
        if args.archive is not None:
            counts = convert_bccd(args.archive.expanduser(), folder)
        else:
            counts = fetch_bccd(folder, args.url or BCCD_URL)
    rows = [(split, *counted) for split, counted in counts.items()]
    print(tabulate(rows, headers=["split", "images", "objects"], tablefmt="github"))
    print(f"written to {folder}")
    if counts != BCCD_COUNTS:
        expected = ", ".join(f"{s} {i} and {n}" for s, (i, n) in BCCD_COUNTS.items())
        print(
            f"These are not the data of docs/results.md, which have {expected}: the repository "
            "has changed",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
