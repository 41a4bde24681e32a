#!/usr/bin/env python
"""What resizing with Pillow instead of OpenCV does to a detector's boxes.

Runs one detector on test images that are resized to the same sizes in both ways, and compares its
last stage query by query. Example:

    python tools/compare_resizing.py --config-file stageinteractor/shapes_tiny.py --short-edge 96 64
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

from detection_toolkit.data import dataset_names, get_detection_dataset
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge
from detection_toolkit.engine.predictor import Predictor


class Comparison(NamedTuple):
    """Differences over the confident queries of all images."""

    corner: np.ndarray
    """(D, 4) absolute differences of the corners in pixels of the original image."""
    score: np.ndarray
    """(D,) absolute differences of the best class's score."""
    changed_class: int
    """How many of them get another best class."""
    lost: int
    """How many fall below the threshold."""


def last_stage(predictor: Predictor, image: np.ndarray, resize: T.Augmentation):
    """(N, 4) boxes in pixels of the original image and (N, K) scores of the last stage."""
    predictor.aug = T.AugmentationList([resize])
    inputs = predictor.preprocess(image)
    images = predictor.model.preprocess_image([inputs])
    output = predictor.model.predict(images).stages[-1]
    scale = inputs["height"] / images.image_sizes[0][0], inputs["width"] / images.image_sizes[0][1]
    boxes = output.boxes[0] * output.boxes.new_tensor([scale[1], scale[0]] * 2)
    return boxes.cpu().numpy(), output.logits[0].sigmoid().cpu().numpy()


@torch.no_grad()
def compare(
    predictor: Predictor, files: list[str], *, short_edge: int, max_size: int, threshold: float
) -> Comparison:
    """Compare the two ways of resizing to one size."""
    pillow = T.ResizeShortestEdge(short_edge, max_size)
    opencv = OpenCVResizeShortestEdge(short_edge, max_size)
    corner, score, changed, lost = [], [], 0, 0
    for file in files:
        image = read_image(file, "BGR")
        boxes, scores = last_stage(predictor, image, opencv)
        other_boxes, other_scores = last_stage(predictor, image, pillow)
        confident = scores.max(1) >= threshold
        corner.append(np.abs(boxes - other_boxes)[confident])
        score.append(np.abs(scores.max(1) - other_scores.max(1))[confident])
        changed += int((scores.argmax(1) != other_scores.argmax(1))[confident].sum())
        lost += int((other_scores.max(1) < threshold)[confident].sum())
    return Comparison(np.concatenate(corner), np.concatenate(score), changed, lost)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", default="stageinteractor/shapes_tiny.py", metavar="FILE")
    parser.add_argument("--weights", metavar="FILE", help="default: the config's own")
    parser.add_argument(
        "--short-edge", type=int, nargs="+", default=[96, 64], help="sizes to compare, in pixels"
    )
    parser.add_argument("--max-size", type=int, default=1333, help="limit of the longer side")
    parser.add_argument("--images", type=int, default=100, help="how many of the test set's")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score under OpenCV")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        predictor = Predictor.from_config(args.config_file, weights=args.weights)
        node = predictor.cfg.dataloader.test.dataset
        (name, *_) = dataset_names(node)
        records = get_detection_dataset(
            name, allow_outside=node.get("allow_outside", False), filter_empty=False
        )
        files = [record["file_name"] for record in records[: args.images]]
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(files)} images of {name}; detections with a score >= {args.threshold}")
    print("corners: mean, 95 %, largest difference in pixels of the original image")
    print("short edge  detections   mean    95 %  largest  score  class changed  lost")
    for short_edge in args.short_edge:
        result = compare(
            predictor,
            files,
            short_edge=short_edge,
            max_size=args.max_size,
            threshold=args.threshold,
        )
        if not len(result.score):
            print(f"{short_edge:10d}  no detection reaches the threshold")
            continue
        print(
            f"{short_edge:10d}  {len(result.score):10d}  {result.corner.mean():5.2f}  "
            f"{np.percentile(result.corner, 95):6.2f}  {result.corner.max():7.2f}  "
            f"{result.score.mean():5.3f}  {result.changed_class:13d}  {result.lost:4d}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
