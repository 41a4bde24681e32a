#!/usr/bin/env python3
"""Time COCO's metrics by pycocotools and by hotcoco, on synthetic detections, in one process.

    python -m benchmarks.coco_backends [--images 5000] [--rounds 3]

80 classes, on average 7 objects an image, and 100 detections: some near the objects, the others
anywhere. Timed is ``CocoEvaluator.evaluate()``, from the answers of all images to the metrics,
without what writes files: seconds of the processor, of all threads together, which other work
disturbs least, and of the clock. The metrics of both are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from benchmarks.rows import Row, add_rows_argument, write_rows
from detection_toolkit.evaluation import BACKENDS, CocoEvaluator

HEIGHT, WIDTH = 480, 640
CLASSES, OBJECTS, DETECTIONS = 80, 7, 100


def make_case(num_images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO document, and predictions as an evaluator keeps them."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    predictions = []
    for image_id in range(1, num_images + 1):
        count = int(rng.poisson(OBJECTS))
        boxes = _boxes(rng, count)
        classes = rng.integers(CLASSES, size=count)
        for box, label in zip(boxes.tolist(), classes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        near = np.repeat(boxes, 4, axis=0)[: DETECTIONS // 2]
        near = near + rng.normal(0, 0.08, near.shape) * near[:, [2, 3, 2, 3]]
        found = np.concatenate([near, _boxes(rng, DETECTIONS - len(near))]).astype(np.float32)
        labels = rng.integers(CLASSES, size=DETECTIONS)
        labels[: len(near)] = np.repeat(classes, 4)[: len(near)]
        scores = rng.random(DETECTIONS).astype(np.float32)
        scores[len(near) :] *= 0.5
        instances = [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for box, label, score in zip(found.tolist(), labels.tolist(), scores.tolist())
        ]
        predictions.append({"image_id": image_id, "instances": instances})
    images = [{"id": i + 1, "height": HEIGHT, "width": WIDTH} for i in range(num_images)]
    categories = [{"id": c + 1, "name": str(c + 1)} for c in range(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return document, predictions


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) x, y, width, height, of all sizes."""
    size = np.exp(rng.uniform(2.3, 5.3, size=(count, 2)))
    corner = rng.uniform(0, 1, size=(count, 2)) * [WIDTH - 20, HEIGHT - 20]
    return np.concatenate([corner, size], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    add_rows_argument(parser)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    document, predictions = make_case(args.images)
    seconds: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "truth.json")
        path.write_text(json.dumps(document))
        MetadataCatalog.get("synthetic").set(
            json_file=str(path),
            thing_classes=[c["name"] for c in document["categories"]],
            thing_dataset_id_to_contiguous_id={c + 1: c for c in range(CLASSES)},
        )
        for _ in range(args.rounds):
            for backend in BACKENDS:
                evaluator = CocoEvaluator("synthetic", backend=backend)
                evaluator._predictions = copy.deepcopy(predictions)
                # pycocotools prints.
                with contextlib.redirect_stdout(io.StringIO()):
                    start = time.process_time(), time.perf_counter()
                    results[backend] = evaluator.evaluate()
                    end = time.process_time(), time.perf_counter()
                seconds[backend].append((end[0] - start[0], end[1] - start[1]))
    first, second = BACKENDS
    assert repr(results[first]) == repr(results[second])
    medians = {k: [statistics.median(column) for column in zip(*v)] for k, v in seconds.items()}
    for backend, (processor, clock) in medians.items():
        ap = results[backend]["bbox"]["AP"]
        print(f"{backend}: {processor:.2f} s of the processor, {clock:.2f} s (AP {ap})")
    ratios = [a / b for a, b in zip(medians[first], medians[second])]
    print(
        f"{second} takes 1/{ratios[0]:.0f} of the processor's time, 1/{ratios[1]:.0f} of the time"
    )
    what = f"COCO metrics of {args.images} images, {second}"
    write_rows(args.rows, [Row(f"{what}, processor time", first, ratios[0])])


if __name__ == "__main__":
    main()
