#!/usr/bin/env python3
"""Draw the README's pictures of the shipped detector: docs/images/demo.png, refinement.webp.

    python tools/draw_readme.py

The scenes are drawn as those of the built-in data are, twice as large and on calmer grounds; the
detector sees them in the size of its data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection_toolkit.engine import user_errors
from detection_toolkit.engine.parsers import Parser

if TYPE_CHECKING:
    from detection_toolkit.data import ShapesSpec
    from detection_toolkit.engine import Predictor

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CONFIG = "stageinteractor/shapes_tiny.py"
SIZE_OF_DATA = (
    "dataloader.test.mapper.augmentations=[{_target_:detectron2.data.transforms."
    "ResizeShortestEdge,short_edge_length:160,max_size:160}]"
)
SCENES = dict(
    num_images=16,
    seed=2026,
    long_side=320,
    min_aspect=1.0,
    mean_objects=6.0,
    max_objects=9,
    empty_share=0.0,
    min_size=44.0,
    max_size=130.0,
    min_visible=0.85,
    backgrounds=("gradient",),
    contrast=110.0,
    blur=0.2,
    noise=0.0,
)
SHOWN, ANIMATED = (1, 15), 11
SCALE = 1.25


def draw_pairs(predictor: Predictor, scenes: ShapesSpec, index: int) -> list:
    """Ground truth and detections of a scene."""
    from detectron2.structures import BoxMode

    from detection_toolkit.data.shapes import render_image
    from detection_toolkit.visualization import draw_detections, draw_ground_truth

    image, objects = render_image(scenes, index)
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label} for label, box in objects
    ]
    rgb = image[:, :, ::-1]
    instances = predictor(image)["instances"]
    return [
        draw_ground_truth({"annotations": annotations}, predictor.metadata, image=rgb, scale=SCALE),
        draw_detections(rgb, instances, predictor.metadata, threshold=0.3, scale=SCALE),
    ]


def run(output: Path) -> list[str]:
    """Draw all pictures; returns their paths."""
    from detection_toolkit.data import ShapesSpec
    from detection_toolkit.data.shapes import render_image
    from detection_toolkit.engine.inspection import build_inspected_detector
    from detection_toolkit.visualization import (
        animate_stages,
        contact_sheet,
        save_animation,
        save_picture,
        trace_stages,
    )

    predictor = build_inspected_detector(CONFIG, [SIZE_OF_DATA])
    scenes = ShapesSpec(**SCENES)
    pairs = [draw_pairs(predictor, scenes, i) for i in SHOWN]
    sheet = contact_sheet(pairs, ["ground truth", "detections"])
    image, _ = render_image(scenes, ANIMATED)
    traces = trace_stages(predictor.model, predictor.preprocess(image))
    frames = animate_stages(image[:, :, ::-1], traces, predictor.metadata)
    return [
        save_picture(sheet, output / "demo.png"),
        save_animation(frames, output / "refinement.webp"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="FOLDER")
    args = parser.parse_args(argv)
    with user_errors():
        print(*run(args.output), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
