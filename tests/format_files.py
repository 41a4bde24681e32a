"""Small data sets in the formats of other tools, written by hand from a COCO document."""

import json

import yaml
from coco_files import make_document, write_image


def write_images(folder, images):
    """Images of a document, each with other content."""
    for seed, image in enumerate(images):
        write_image(folder / image["file_name"], image["height"], image["width"], seed=seed)


def objects_of(document, image):
    """(name of the class, x, y, width, height) of the objects of an image."""
    names = {c["id"]: c["name"] for c in document["categories"]}
    return [
        (names[a["category_id"]], *a["bbox"])
        for a in document["annotations"]
        if a["image_id"] == image["id"]
    ]


def write_yolo(folder, splits, *, names=None, table=None):
    """As Ultralytics has it: images/SPLIT, labels/SPLIT and data.yaml.

    Args:
        folder: to write.
        splits: documents by their splits.
        names: of the classes; by default those of the documents.
        table: keys that data.yaml has besides, or others than usual.
    """
    names = names or [c["name"] for c in next(iter(splits.values()))["categories"]]
    for split, document in splits.items():
        write_images(folder / "images" / split, document["images"])
        for image in document["images"]:
            lines = []
            for name, x, y, w, h in objects_of(document, image):
                width, height = image["width"], image["height"]
                shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines.append(" ".join(map(str, (names.index(name), *shares))))
            path = folder / "labels" / split / image["file_name"].replace(".png", ".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines))
    content = {split: f"images/{split}" for split in splits}
    content = {**content, "names": dict(enumerate(names)), **(table or {})}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder


def write_roboflow_coco(folder, splits):
    """train/_annotations.coco.json beside its images, with the category that groups all others."""
    called = {"val": "valid"}
    for split, document in splits.items():
        place = folder / called.get(split, split)
        write_images(place, document["images"])
        group = {"id": 0, "name": "animals", "supercategory": "none"}
        others = [{**c, "supercategory": "animals"} for c in document["categories"]]
        content = {**document, "categories": [group, *others]}
        (place / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def write_coco(folder, splits, *, images="images/{}"):
    """annotations/instances_SPLIT2017.json, and the images in folders of a pattern."""
    (folder / "annotations").mkdir(parents=True)
    for split, document in splits.items():
        write_images(folder / images.format(split), document["images"])
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(document))
    return folder


def make_splits(train=4, val=2, **kwargs):
    """Documents whose images have names of their own."""
    splits = {}
    for split, count in (("train", train), ("val", val)):
        splits[split] = make_document(num_images=count, **kwargs)
        for image in splits[split]["images"]:
            image["file_name"] = f"{split}{image['file_name']}"
    return splits
