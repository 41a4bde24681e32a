"""What is repaired in a copy of a COCO-format document, so that training and evaluation agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .boxes import BoxFaults, numbers
from .entries import is_number
from .findings import FindingCollector, short

__all__ = ["repair_annotations", "repair_ids", "whole_ids"]

# Areas that say something else than their box: more than so much of it (and four pixels), or less
# than so little where no mask explains it.
_MOST_AREA, _LEAST_AREA = 1.5, 1e-3
_MOST_LETTERS = 7  # of a compressed number of 32 bits


def whole_ids(
    found: FindingCollector, what: str, entries: list[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """The entries with 1 for ids such as 1.0; the same list where there are none."""
    if not any(type(entry[key]) is float for key in keys for entry in entries):
        return entries
    repaired = []
    count = 0
    for entry in entries:
        floats = {key: int(entry[key]) for key in keys if type(entry[key]) is float}
        count += bool(floats)
        repaired.append({**entry, **floats})
    found.add("float_ids", f"{count} of the {what}", count=count)
    return repaired


def repair_ids(found: FindingCollector, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Annotations with ids from 1 on; the same list where nothing is wrong with them."""
    # pycocotools takes the annotation id 0 for "no match", and cannot use texts.
    wrong = [a["id"] for a in annotations if type(a["id"]) is not int or a["id"] < 1]
    if not wrong:
        return annotations
    found.add("renumbered", f"annotation id {short(wrong[0])}", count=len(wrong))
    return [{**annotation, "id": i} for i, annotation in enumerate(annotations, 1)]


def repair_annotations(
    found: FindingCollector,
    annotations: list[dict[str, Any]],
    boxes: np.ndarray,
    sizes: np.ndarray,
    faults: BoxFaults,
    *,
    clip: bool = True,
) -> list[dict[str, Any]]:
    """Annotations that COCO's evaluation can use; the same list where nothing is repaired.

    Args:
        found: is told of areas and masks; not of boxes.
        annotations: N sound ones.
        boxes: (N, 4) x, y, width, height of them.
        sizes: (N, 2) width and height of their images.
        faults: of the boxes.
        clip: boxes that reach out of their image end at its border.
    """
    is_clipped = faults.clipped & clip
    unusable = [
        _unusable_parts(a, (height, width)) for a, (width, height) in zip(annotations, sizes)
    ]
    areas = numbers(
        [a["area"] if is_number(a.get("area")) else math.nan for a in annotations], (-1,)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        full = boxes[:, 2] * boxes[:, 3]
        is_wrong = ~((areas > 0) & (areas <= np.maximum(_MOST_AREA * full, full + 4)))
        is_little = areas < _LEAST_AREA * full
    for index in np.flatnonzero(is_little):
        mask = annotations[index].get("segmentation")
        is_wrong[index] |= not mask or "segmentation" in unusable[index]
    to_change = faults.dropped | is_clipped | is_wrong
    to_change |= np.array([bool(u) for u in unusable], dtype=bool)
    to_change |= np.array(["iscrowd" not in a for a in annotations], dtype=bool)
    if not to_change.any():
        return annotations
    repaired = []
    for index, annotation in enumerate(annotations):
        if not to_change[index]:
            repaired.append(annotation)
        elif not faults.dropped[index]:
            inside = faults.inside[index] if is_clipped[index] else None
            area = None if is_wrong[index] else annotation["area"]
            repaired.append(_repaired(found, annotation, unusable[index], inside, area))
    return repaired


def _repaired(
    found: FindingCollector,
    annotation: dict[str, Any],
    unusable: Sequence[str],
    inside: np.ndarray | None,
    area: float | None,
) -> dict[str, Any]:
    # Boxes are what counts. Detectron2 would drop an object with its mask, which the evaluation
    # would miss, and break off at other nonsense.
    repaired = {k: v for k, v in annotation.items() if k not in unusable}
    what = found.annotation(annotation)
    if any(part != "ignore" for part in unusable):
        found.add("masks", f"{what}: {', '.join(unusable)}", annotation["image_id"])
    if inside is not None:
        x0, y0, x1, y1 = map(float, inside)
        repaired["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    size = repaired["bbox"][2] * repaired["bbox"][3]
    if area is None:
        had = short(annotation["area"]) if "area" in annotation else "none"
        found.add("area", f"{what} has area {had}, its box {size:g}", annotation["image_id"])
        repaired["area"] = size
    elif inside is not None:
        repaired["area"] = min(area, size)
    repaired.setdefault("iscrowd", 0)
    return repaired


def _unusable_parts(annotation: Mapping[str, Any], size: tuple[float, float]) -> tuple[str, ...]:
    """Keys of what cannot be loaded, beside the box; ``size`` is the image's height and width."""
    mask = annotation.get("segmentation")
    if type(mask) is list and len(mask) == 1 and type(mask[0]) is list and len(mask[0]) >= 6:
        is_usable = len(mask[0]) % 2 == 0  # nearly all of a large data set
    else:
        is_usable = "segmentation" not in annotation or _is_usable_mask(mask, size)
    unusable = () if is_usable else ("segmentation",)
    if "keypoints" in annotation and not _is_list_of(annotation["keypoints"], (int, float)):
        unusable += ("keypoints",)
    if "ignore" in annotation and annotation["ignore"] != 0:
        unusable += ("ignore",)
    return unusable


def _is_usable_mask(mask: Any, image_size: tuple[float, float]) -> bool:
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if not _is_list_of(size, int) or tuple(size) != tuple(image_size):
            return False
        # The runs must fill the mask: whoever decodes them relies on it.
        if isinstance(counts, str):
            return _compressed_pixels(counts) == size[0] * size[1]
        is_list = _is_list_of(counts, int) and min(counts, default=0) >= 0
        return is_list and sum(counts) == size[0] * size[1]
    if isinstance(mask, list) and mask:
        # Not number by number: a large data set has a hundred million.
        is_list = all(isinstance(p, list) for p in mask)
        return is_list and any(len(p) >= 6 and len(p) % 2 == 0 for p in mask)
    return mask in (None, [])


def _compressed_pixels(text: str) -> int | None:
    """Of a mask whose runs are written as COCO compresses them; None where they are none.

    Six bits a letter, from the lowest on, the sixth saying whether there are more; from the third
    run on, the difference to the one before the last.
    """
    letters = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        return None
    last = np.flatnonzero(letters & 32 == 0)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MOST_LETTERS:
        return None
    places = np.arange(len(letters)) - np.repeat(first, lengths)
    numbers = np.add.reduceat((letters & 31) << (5 * places), first)
    numbers -= ((letters[last] & 16) != 0) * (np.int64(1) << (5 * lengths))  # negative ones
    # Each chain of differences, of the runs outside and inside of the mask.
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return None if runs.min() < 0 else int(runs.sum())


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and is_number(v) for v in value)
