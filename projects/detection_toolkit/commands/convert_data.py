"""Convert a data set into another format, divide it, or take a sample of it.

What IN is, its files say: COCO JSON, a YOLO folder or data.yaml, Pascal VOC, CVAT, Label Studio,
labelme, CSV. It is judged and repaired as training does, and is not changed. Training reads all of
these as they are (--data); a converted data set is for other tools, or of a part of the images.

OUT is a new folder, which is there as a whole or not at all. Images are copied; --images link makes
hard links, which take no space, and --images reference leaves them where they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine import user_errors
from ..engine.parsers import Parser, make_parser
from ..errors import UserError
from ..program import training_line
from ..texts import shown

EXAMPLES = """
PROG my/annotations my/yolo --to yolo
PROG my/all.json my/divided --to coco --split train=0.8,val=0.2 --seed 1
PROG my/data.yaml my/small --to yolo --sample 100 --images link
"""
_FORMATS = ("coco", "yolo", "voc", "csv", "cvat", "labelme")
_IMAGES = ("copy", "link", "reference")


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument("data", metavar="IN", help="folder or file of the data set")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--to", required=True, choices=_FORMATS, help="format to write")
    parser.add_argument("--format", help="of IN, where what is there does not say it")
    parser.add_argument("--image-root", metavar="FOLDER", help="of the images of IN, if elsewhere")
    parser.add_argument(
        "--split",
        metavar="SHARES",
        help="divide all images by chance, e.g. train=0.8,val=0.2; default: the splits of IN",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N images of each split, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of chance (default: %(default)s)")
    parser.add_argument("--images", choices=_IMAGES, default="copy", help="default: %(default)s")
    parser.add_argument(
        "--move-aside", action="store_true", help="rename OUT where it is there already"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="images may lie outside of the folder of IN"
    )
    return parser


def read_shares(text: str | None) -> dict[str, float] | None:
    """Of "train=0.8,val=0.2".

    Raises:
        UserError: it is not like that.
    """
    from ..data.formats import SPLITS

    if text is None:
        return None
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if name not in SPLITS or name in shares or not 0 < share <= 1:
            raise UserError(
                f"--split {shown(text)}: write shares of {', '.join(SPLITS)}, each once, as in "
                "train=0.8,val=0.2"
            )
        shares[name] = share
    return shares


def move_aside(folder: Path, args: argparse.Namespace, image_root: Path) -> None:
    """Rename a folder that is there already, where that is asked for.

    Raises:
        UserError: it is not, or the data set that is to be read is in it.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not args.move_aside:
        raise UserError(
            f"{shown(folder)} is there already: choose another folder, or rename it by --move-aside"
        )
    if folder.resolve() == Path.cwd():
        raise UserError(f"{shown(folder)} is the current folder, which is not moved aside")
    for path in (Path(args.data).expanduser(), image_root):
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{shown(path)} is in {shown(folder)}, which is not moved aside")
    number = 1
    while (aside := folder.with_name(f"{folder.resolve().name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"what was in {shown(folder)} is now in {shown(aside)}", flush=True)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = get_parser(prog).parse_args(argv)
    with user_errors():
        from tqdm import tqdm

        from ..data.formats import FORMATS, convert, open_source
        from ..data.formats.conversion import summary

        shares = read_shares(args.split)
        source = open_source(
            args.data,
            format=args.format,
            image_root=args.image_root,
            allow_outside=args.allow_outside,
        )
        print(f"{shown(args.data)}: {FORMATS[source.format].title} ({shown(source.evidence)})")
        folder = Path(args.output).expanduser()
        move_aside(folder, args, source.image_root)
        done = convert(
            source,
            folder,
            to=args.to,
            shares=shares,
            seed=args.seed,
            sample=args.sample,
            images=args.images,
            allow_outside=args.allow_outside,
            progress=lambda items, total: tqdm(
                items, "writing images", total, unit=" images", disable=None
            ),
        )
        print(shown(summary(done, FORMATS[args.to].title)))
        line = training_line(folder, image_root=done.image_root)
        print(shown(f"train on it:   {line}"))
    return 0
