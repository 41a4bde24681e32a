"""Small COCO-format data sets for tests."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "bird"}]


def write_image(path, height=64, width=96, seed=0):
    rng = np.random.default_rng(seed)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = path.suffix or ".png"
    encoded = cv2.imencode(extension, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))[1]
    path.write_bytes(encoded.tobytes())  # cv2.imwrite cannot write every path


def make_document(num_images=4, boxes_per_image=2, *, height=64, width=96):
    """A valid document: images 1..n, annotation ids 1..m, gappy category ids."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        for i in range(1, num_images + 1)
    ]
    annotations = []
    for image in images:
        for k in range(boxes_per_image):
            category = CATEGORIES[(image["id"] + k) % 3]["id"]
            box = [4.0 + 10 * k, 6.0 + 5 * k, 30.0, 25.0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [dict(c) for c in CATEGORIES],
    }


def write_dataset(folder, document=None, **kwargs):
    """Write images and ``annotations.json``; returns (json path, image folder) as texts."""
    folder = Path(folder)
    document = make_document(**kwargs) if document is None else document
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(document.get("images", [])):
        size = image.get("height", 64), image.get("width", 96)
        write_image(folder / "images" / image["file_name"], *size, seed=i)
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps(document))
    return str(json_file), str(folder / "images")


def xyxy(annotation):
    """The box of an annotation of Detectron2's."""
    box = [float(v) for v in annotation["bbox"]]
    return list(BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS))


def perfect_detections(record):
    """The objects of a dataset dict, taken for detections."""
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor([xyxy(a) for a in objects]).reshape(-1, 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in objects])
    instances.scores = torch.full((len(objects),), 0.9)
    return {"instances": instances}
