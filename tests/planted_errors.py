"""A COCO document with known errors, and how many of them a list of suspects holds."""

import copy
import random

KINDS = ("missing", "class", "box", "nothing")


def plant_errors(document, share=0.05, seed=0):
    """Drop boxes, swap classes, shift boxes, and add boxes where nothing is.

    Args:
        document: COCO's; it is left as it is.
        share: of the annotations, for each of the four kinds.
        seed: of the choice.

    Returns:
        the document with errors, and {kind: [(image id, box)]} where they are.
    """
    chance = random.Random(seed)
    document = copy.deepcopy(document)
    annotations = document["annotations"]
    count = round(share * len(annotations))
    chosen = chance.sample(annotations, 3 * count)
    names = [c["id"] for c in document["categories"]]
    planted = {kind: [] for kind in KINDS}
    for annotation in chosen[:count]:
        annotations.remove(annotation)
        planted["missing"].append((annotation["image_id"], annotation["bbox"]))
    for annotation in chosen[count : 2 * count]:
        others = [name for name in names if name != annotation["category_id"]]
        annotation["category_id"] = chance.choice(others)
        planted["class"].append((annotation["image_id"], annotation["bbox"]))
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    for annotation in chosen[2 * count :]:
        x, y, width, height = annotation["bbox"]
        # Towards the middle, so that the box stays within the image.
        right, down = sizes[annotation["image_id"]]
        x += (0.4 if x + width / 2 < right / 2 else -0.4) * width
        y += (0.4 if y + height / 2 < down / 2 else -0.4) * height
        annotation["bbox"] = [x, y, width, height]
        planted["box"].append((annotation["image_id"], annotation["bbox"]))
    number = max(a["id"] for a in annotations)
    for image in chance.sample(document["images"], count):
        side = chance.uniform(20, 50)
        box = [chance.uniform(0, image["width"] - side), chance.uniform(0, image["height"] - side)]
        box += [side, side]
        number += 1
        annotations.append(
            {
                "id": number,
                "image_id": image["id"],
                "category_id": chance.choice(names),
                "bbox": box,
                "area": side * side,
                "iscrowd": 0,
            }
        )
        planted["nothing"].append((image["id"], box))
    return document, planted


def overlap(one, other):
    """IoU of two boxes x, y, width, height."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2], other[0] + other[2])
    bottom = min(one[1] + one[3], other[1] + other[3])
    common = max(0, right - left) * max(0, bottom - top)
    return common / (one[2] * one[3] + other[2] * other[3] - common)


def which_planted(finding, planted):
    """(kind, index) of the error that a finding of label_errors.json is about, or None.

    The finding must be about the annotation that was changed, or the place of the one that was
    dropped.
    """
    box = finding["annotated"]["bbox"] or finding["found"]["bbox"]
    best = (0.5, None)
    for kind, places in planted.items():
        if (kind == "missing") != (finding["annotated"]["bbox"] is None):
            continue
        for index, (image_id, place) in enumerate(places):
            if image_id == finding["image_id"]:
                best = max(best, (overlap(box, place), (kind, index)), key=lambda pair: pair[0])
    return best[1]
