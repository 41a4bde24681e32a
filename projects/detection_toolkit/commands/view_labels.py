"""Draw which labels the stages get on training images, and why: PNG and PDF of each image.

The images are those of dataloader.train.dataset, resized as for a test, so that a picture can be
made again. Without --config-file it is the detector of the built-in shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import write_text
from ..engine import user_errors
from ..engine.arguments import add_data_arguments, parse_arguments
from ..engine.parsers import Parser
from ..errors import UserError
from .figures import draw_each, figures_parser, open_detector

if TYPE_CHECKING:
    import numpy as np

    from ..engine import Predictor
    from ..training import LabelAssigner

EXAMPLES = """
PROG --num-images 3 --output output/assignment
PROG --config-file output/mine/config.yaml --images 139 000123.jpg --output output/assignment
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    suffixes = ".png, .pdf and .json"
    parser = figures_parser(__doc__, EXAMPLES, prog, kind="assignment", suffixes=suffixes)
    add_data_arguments(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="ID",
        help="images of the training set, by id or file name; default: the first ones",
    )
    parser.add_argument(
        "--num-images",
        type=int,
        default=3,
        metavar="N",
        help="without --images: the first N that have two objects or more (default: %(default)s)",
    )
    return parser


def choose_records(
    records: Sequence[dict[str, Any]], wanted: Sequence[str] | None, count: int
) -> list[dict[str, Any]]:
    """The images to draw.

    Raises:
        ValueError: an image that is not in the data set or has no objects, or none that could be
            drawn.
    """
    if wanted is None:
        crowded = [r for r in records if len(_objects(r)) > 1]
        chosen = (crowded or [r for r in records if _objects(r)])[:count]
        if not chosen:
            raise UserError("no training image to draw: --num-images must be positive")
        return chosen
    by_name = {}
    for record in records:
        by_name[Path(record["file_name"]).name] = record
        by_name.setdefault(str(record["image_id"]), record)
    chosen = []
    for name in wanted:
        if name not in by_name:
            raise UserError(
                f"image {name} is not in the training set of {len(records)} images: give an id, "
                f"such as {records[0]['image_id']}, or a file name, such as "
                f"{Path(records[0]['file_name']).name}"
            )
        if not _objects(by_name[name]):
            raise UserError(f"image {name} has no objects: there is nothing to assign")
        chosen.append(by_name[name])
    return chosen


def _objects(record: dict[str, Any]) -> list[dict[str, Any]]:
    # As in training: regions of crowds are left out.
    return [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]


def prepare(predictor: Predictor, record: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """The model's input with its objects, and the resized picture (H, W, 3) in RGB."""
    import numpy as np
    import torch
    from detectron2.structures import Boxes, BoxMode, Instances

    from ..data import read_image

    batched_input = predictor.preprocess(read_image(record["file_name"], "BGR"))
    height, width = batched_input["image"].shape[-2:]
    scale = np.array([width / batched_input["width"], height / batched_input["height"]] * 2)
    annotations = _objects(record)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    batched_input["instances"] = Instances(
        (height, width),
        gt_boxes=Boxes(torch.tensor(np.array(boxes) * scale, dtype=torch.float32)),
        gt_classes=torch.tensor([a["category_id"] for a in annotations]),
    )
    batched_input["file_name"] = record["file_name"]
    image = batched_input["image"].numpy().transpose(1, 2, 0)
    if predictor.input_format == "BGR":
        image = image[:, :, ::-1]
    return batched_input, image.clip(0, 255).astype(np.uint8)


def choose_label_assigner(predictor: Predictor) -> LabelAssigner:
    """The model's own; if each stage has its own match only, the first that the config names for
    comparison, to show what it would do."""
    from ..evaluation import compared_label_assigners, configured_label_assigners

    own, *others = compared_label_assigners(
        predictor.model, configured_label_assigners(predictor.cfg)
    )
    return others[0] if others else own


def draw(predictor: Predictor, record: dict[str, Any], stem: Path) -> list[str]:
    """Assign, draw and write one image; returns the paths."""
    import torch

    from ..training import HungarianMatcher
    from ..visualization import draw_assignment, explain_labels, save_figure

    model = predictor.model
    batched_input, image = prepare(predictor, record)
    images = model.preprocess_image([batched_input])
    truth = model.prepare_ground_truth([batched_input], images.image_sizes)
    with torch.no_grad(), model.decoder.with_all_stages(), model.products():
        outputs = model.predict(images).stages
    logits = torch.stack([o.logits.float() for o in outputs])
    boxes = torch.stack([o.boxes.float() for o in outputs])
    matcher = HungarianMatcher() if model.criterion is None else model.criterion.matcher
    assigner = choose_label_assigner(predictor)
    assignment = matcher(logits, boxes, truth)
    decisions = explain_labels(assignment, boxes, truth, assigner)
    figure = draw_assignment(
        image,
        boxes[:, 0].cpu(),
        assignment,
        truth,
        decisions,
        predictor.metadata,
        assigner=assigner,
    )
    written = save_figure(figure, stem)
    table = stem.with_name(stem.name + ".json")
    rows = [{**d._asdict(), "sources": [s._asdict() for s in d.sources]} for d in decisions]
    document = {
        "image_id": record["image_id"],
        "stages_and_queries_count_from": 0,
        "iou_threshold": assigner.iou_threshold,
        "decisions": rows,
    }
    write_text(table, json.dumps(document, indent=1))
    return [*written, str(table)]


def run(args: argparse.Namespace) -> int:
    """Draw all images; returns how many could not be drawn."""
    from detectron2.data import MetadataCatalog

    from ..data import check_same_classes, dataset_names, get_detection_dataset

    predictor = open_detector(args)
    node = predictor.cfg.dataloader.train.dataset
    names = dataset_names(node)
    dataset = get_detection_dataset(
        names, allow_outside=node.get("allow_outside", False), filter_empty=False
    )
    if node.get("path"):  # of which the predictor has not read the classes
        ours, theirs = (
            metadata.get("thing_classes")
            for metadata in (predictor.metadata, MetadataCatalog.get(names[0]))
        )
        if ours is not None:
            check_same_classes(ours, theirs, "the detector", "the training set")
    records = choose_records(dataset, args.images, args.num_images)
    return draw_each(
        args,
        [record["file_name"] for record in records],
        lambda number, stem: draw(predictor, records[number], stem),
        kind="assignment",
        title="Which labels the stages get",
    )


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(prog), argv)
    with user_errors():
        return 1 if run(args) else 0
