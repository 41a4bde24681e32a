"""Draw the built-in shapes data sets ahead of their first use, or elsewhere, or fewer images.

python -m detection_toolkit.data.make_shapes [NAME ...] [--output FOLDER [--num-images N]]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from detectron2.utils.logger import setup_logger

from .shapes import SHAPES, ensure_shapes, generate_shapes


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m detection_toolkit.data.make_shapes",
        description="Draw the built-in shapes data sets; prints their folders.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--output", type=Path, help="parent folder, in place of the cache")
    parser.add_argument(
        "--num-images", type=int, help="images a split, in place of its own number; needs --output"
    )
    args = parser.parse_args(argv)
    setup_logger(name="detection_toolkit", color=False)
    names = args.names or list(SHAPES)
    unknown = [n for n in names if n not in SHAPES]
    if unknown:
        parser.error(f"no split is called {unknown[0]!r}; there are {', '.join(SHAPES)}")
    if args.num_images is not None and args.output is None:
        parser.error("--num-images needs --output: the cache holds whole splits only")
    for name in names:
        if args.output is None:
            print(ensure_shapes(name))
            continue
        try:
            spec = SHAPES[name]
            if args.num_images is not None:
                spec = replace(spec, num_images=args.num_images)
            generate_shapes(spec, args.output / name, title=name)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(args.output / name)


if __name__ == "__main__":
    main()
