"""Draw what training sees: the images of its stream, augmented, and padded as in their batch.

They are those that a run of the config gets, by its seed and its place in the stream, in the order
of a single process. Boxes have class names and, where the data set has them, ids of annotations;
crowds, which are not trained on, are dashed. Several inputs of one image stand side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import user_errors
from ..engine.arguments import (
    add_data_arguments,
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from ..engine.parsers import Parser, make_parser
from ..engine.shipped import config_for_own_data, shipped_config
from .figures import PAGE

if TYPE_CHECKING:
    import numpy as np

    from ..engine.training_images import SourceObject, TrainingImage, TrainingImages

EXAMPLES = """
PROG --config-file CONFIG --number 8
PROG --config-file CONFIG --start 16000 dataloader.train.total_batch_size=8
PROG --data my/data.yaml
PROG --config-file output/mine/config.yaml --output output/seen
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config, by path or by its name among the packaged ones, or the folder of a run "
        f"(default: {shipped_config()}, and {config_for_own_data()} with --data)",
    )
    parser.add_argument(
        "--number", type=int, default=16, metavar="N", help="of images (default: %(default)s)"
    )
    parser.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="POSITION",
        help="images that the run uses before: iterations times images per step (default: 0)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/data"),
        metavar="FOLDER",
        help=f"where a PNG of each image is written, and {PAGE}, which shows them all "
        "(default: %(default)s)",
    )
    add_data_arguments(parser)
    add_trust_argument(parser)
    add_overrides_argument(parser, "changes to the config, as for the run")
    return parser


def open_stream(args: argparse.Namespace) -> TrainingImages:
    """The images of the run that the arguments describe."""
    from ..config import apply_overrides, get_config
    from ..engine import prepare_config
    from ..engine.runs import find_run
    from ..engine.training_images import TrainingImages

    default = config_for_own_data() if args.data else shipped_config()
    args.config_file = args.config_file or default
    run = find_run(args.config_file)
    cfg = get_config(run[0] if run else args.config_file, trust_config=args.trust_config)
    return TrainingImages(prepare_config(apply_overrides(cfg, args.opts), args.opts))


def describe(image: TrainingImage) -> str:
    """What the picture of an image does not say."""
    view, draw = image.views[0], image.draw
    height, width = view["image"].shape[-2:]
    facts = [f"position {draw.position} of the stream"]
    if "width" in view and (view["height"], view["width"]) != (height, width):
        facts.append(f"made of {view['width']}x{view['height']} pixels")
    facts.append(f"{width}x{height}")
    if image.padded_size != (height, width):
        facts[-1] += f", padded to {image.padded_size[1]}x{image.padded_size[0]}"
    numbers = [len(v["instances"]) if "instances" in v else 0 for v in image.views]
    facts.append(" and ".join(map(str, numbers)) + (" object" if numbers == [1] else " objects"))
    crowds = sum(len(c) for c in image.crowds[:1] if c is not None)
    if crowds:
        facts.append(f"{crowds} crowd{'s' * (crowds > 1)} (dashed) not trained on")
    others = {
        str(source.record.get("image_id", source.record["file_name"]))
        for sources in image.objects
        for source in sources or ()
        if source.record["file_name"] != view["file_name"]
    }
    if others:
        facts.append(f"with objects of {', '.join(sorted(others))}")
    return "; ".join(facts)


def draw(image: TrainingImage, stream: TrainingImages) -> np.ndarray:
    """The inputs of an image, side by side."""
    import torch

    from ..visualization import side_by_side
    from ..visualization.training_images import draw_training_input

    model = stream.model
    padding = getattr(model, "pixel_mean", torch.zeros(3)).flatten().tolist()
    pictures = [
        draw_training_input(
            view,
            image.padded_size,
            stream.metadata,
            image_format=getattr(model, "input_format", None) or "RGB",
            padding=padding,
            names=None if sources is None else [_id(source) for source in sources],
            crowds=crowds,
        )
        for view, sources, crowds in zip(image.views, image.objects, image.crowds)
    ]
    if len(pictures) == 1:
        return pictures[0]
    names = [*stream.loader.dataset.view_names, *[""] * len(pictures)]
    return side_by_side(pictures, names[: len(pictures)])


def _id(source: SourceObject) -> str:
    return f"#{source.annotation['id']}" if "id" in source.annotation else ""


def run(args: argparse.Namespace) -> None:
    """Draw all images."""
    from tqdm import tqdm

    from ..texts import shown
    from ..visualization import save_picture
    from ..visualization.contact_page import ContactPage

    stream = open_stream(args)
    page = ContactPage(
        "What training sees",
        args.number,
        f"{args.config_file}, train.seed={stream.seed}: images {args.start} to "
        f"{args.start + args.number - 1} in the order of a run by one process, counted from 0.",
    )
    batch = None
    for image in tqdm(
        stream.since(args.start, args.number), total=args.number, unit="image", disable=None
    ):
        if image.batch != batch:
            batch = image.batch
            page.begin_section(f"Batch {batch}")
        view = image.views[0]
        picture = draw(image, stream)
        name = f"{image.number:07}_{Path(view['file_name']).stem}.png"
        path = save_picture(picture, args.output / name)
        title = f"Image {view.get('image_id', '')}: {Path(view['file_name']).name}"
        page.add(picture, title, describe(image), is_wide=len(image.views) > 1)
        tqdm.write(f"{shown(view['file_name'])} -> {shown(path)}")
    print(f"{page.write(args.output / PAGE)} shows them all")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(prog), argv)
    with user_errors():
        run(args)
    return 0
