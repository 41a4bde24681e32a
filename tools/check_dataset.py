#!/usr/bin/env python3
"""Look at a COCO-format data set before anything is trained on it.

    python tools/check_dataset.py my/train.json my/images --num-queries 100

Reads every entry and decodes every image; prints what is wrong and what training would do about
it, the classes, and writes a picture of the worst cases. Nothing is changed.

Exit code 1: training would stop, or be less than it should be. 0: it would not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from tabulate import tabulate
from tqdm import tqdm

from detection_toolkit.data.images import MAX_PIXELS, UnreadableImageError, read_image
from detection_toolkit.data.inspection import DatasetReport, inspect_dataset
from detection_toolkit.engine import user_errors
from detection_toolkit.visualization import contact_sheet, draw_ground_truth, save_picture

COLUMNS = 4
TILE = 320


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json_file", metavar="JSON", help="annotations in COCO's format")
    parser.add_argument("image_root", metavar="IMAGES", help="folder of the images")
    parser.add_argument(
        "--num-queries", type=int, help="of the detector: images with more objects are listed"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="images may lie outside of the folder"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="larger images count as unreadable"
    )
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="output/check_dataset",
        help="for worst.png and report.json (default: %(default)s)",
    )
    parser.add_argument(
        "--num-pictures", type=int, default=16, help="in worst.png (default: %(default)s)"
    )
    return parser


def print_report(report: DatasetReport) -> None:
    """What was found, and the classes."""
    print(
        f"{report.num_images} images, {report.num_boxes} boxes of {len(report.classes)} classes, "
        f"at most {report.most_objects} objects in an image\n"
    )
    for _, finding in report.in_order():
        mark = "HARM" if finding.is_harmful else "note"
        print(f"{mark}  {finding.count} {finding.title}; training {finding.outcome}")
        for example in finding.examples:
            print(f"        {example}")
        if finding.count > len(finding.examples):
            print("        ...")
    if not report.findings:
        print("nothing is wrong")
    most = max(report.classes.values(), default=0)
    if most:
        ordered = sorted(report.classes.items(), key=lambda item: -item[1])
        rows = [(ascii_bar(count / most), count, name) for name, count in ordered]
        print("\n" + tabulate(rows, headers=["", "boxes", "class"]))
    harm = "would be harmed" if report.is_harmful else "would not be harmed"
    print(f"\nTraining on this data set {harm}.")


def ascii_bar(share: float) -> str:
    """A bar of up to 30 letters."""
    return "#" * max(round(30 * share), int(share > 0))


def worst_images(report: DatasetReport, count: int) -> list[tuple[Any, str]]:
    """Ids of images and what is wrong with them: one of every kind in turn, harmful ones first."""
    queues = [
        [(image, finding.title) for image in finding.images]
        for _, finding in report.in_order()
        if finding.images
    ]
    chosen: dict[Any, str] = {}
    while queues and len(chosen) < count:
        for queue in queues:
            while queue and queue[0][0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < count:
                image, title = queue.pop(0)
                chosen[image] = title
        queues = [queue for queue in queues if queue]
    return list(chosen.items())


def draw_worst(report: DatasetReport, count: int, max_pixels: int) -> np.ndarray | None:
    """A sheet of the worst images with their boxes; None where nothing is wrong with any."""
    names = list(report.classes)
    metadata = Metadata(thing_classes=names)
    tiles = [
        tile(draw_image(report.images[i], metadata, max_pixels), f"{title} (image {i})")
        for i, title in worst_images(report, count)
        if i in report.images
    ]
    if not tiles:
        return None
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    return contact_sheet(rows)


def draw_image(image: dict[str, Any], metadata: Metadata, max_pixels: int) -> np.ndarray:
    """The image with its boxes, or a grey picture where it cannot be read."""
    try:
        picture = read_image(image.get("path", ""), max_pixels=max_pixels)
    except UnreadableImageError:
        return np.full((TILE * 3 // 4, TILE, 3), 128, np.uint8)
    # Large pictures are made small first: the boxes are drawn on what is seen.
    scale = min(1.0, 2 * TILE / max(picture.shape[:2]))
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    picture = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
    annotations = []
    for annotation in image["annotations"]:
        x, y, w, h = (float(v) * scale for v in annotation["bbox"])
        if not np.isfinite([x, y, w, h]).all() or max(abs(v) for v in (x, y, w, h)) > 1e5:
            continue
        annotations.append(
            {
                "bbox": [x, y, w, h],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": annotation.get("iscrowd", 0),
            }
        )
    shown = Metadata(thing_classes=[""] * max(1, len(metadata.thing_classes)))
    return draw_ground_truth({"annotations": annotations}, shown, image=picture)


def tile(picture: np.ndarray, title: str) -> np.ndarray:
    """A picture of one width with a line of text below."""
    scale = TILE / max(picture.shape[:2])
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    strip = np.full((20, TILE, 3), 255, np.uint8)
    text = title.encode("ascii", "replace").decode()
    cv2.putText(strip, text, (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    canvas = np.full((picture.shape[0], TILE, 3), 255, np.uint8)
    left = (TILE - picture.shape[1]) // 2
    canvas[:, left : left + picture.shape[1]] = picture
    return np.concatenate([canvas, strip])


def write_files(report: DatasetReport, args: argparse.Namespace) -> None:
    """worst.png and report.json."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "images": report.num_images,
        "boxes": report.num_boxes,
        "classes": report.classes,
        "harmful": report.is_harmful,
        "findings": {kind: asdict(finding) for kind, finding in report.in_order()},
    }
    text = json.dumps(document, indent=2, default=str)
    (folder / "report.json").write_text(text, encoding="utf-8")
    print(f"{folder / 'report.json'} lists every image concerned")
    sheet = draw_worst(report, args.num_pictures, args.max_pixels)
    if sheet is not None:
        print(f"{save_picture(sheet, folder / 'worst.png')} shows the worst images")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = get_parser().parse_args(argv)
    with user_errors():
        report = inspect_dataset(
            args.json_file,
            args.image_root,
            num_queries=args.num_queries,
            allow_outside=args.allow_outside,
            max_pixels=args.max_pixels,
            workers=args.workers,
            progress=lambda items, total: tqdm(items, "reading images", total, unit=" images"),
        )
        print_report(report)
        write_files(report, args)
    return 1 if report.is_harmful else 0


if __name__ == "__main__":
    sys.exit(main())
