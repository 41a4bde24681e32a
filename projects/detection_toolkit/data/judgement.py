"""The one place that judges a COCO-format data set: what it has, what is wrong, what is repaired.

Training refuses what does harm and uses the repaired document; ``tools/check_dataset.py`` prints
all of it. Images are not opened here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..texts import shown
from .boxes import find_box_faults, guess_layout, numbers
from .documents import collector_paused, read_document
from .entries import EntryJudge
from .files import judge_file_names
from .findings import GIANT_SHARE, TINY_SIDE, Finding, FindingCollector, raise_harm, short
from .repairs import repair_annotations, repair_ids, whole_ids

__all__ = ["Judgement", "class_names", "judge", "judge_file"]

# So many boxes, and so large a share of them, that cover their whole images are no accident.
_WHOLE_COUNT, _WHOLE_SHARE = 10, 0.99
_LAYOUTS = {
    "corners": "the boxes look like x1, y1, x2, y2, and COCO's are x, y, width, height: as such "
    "many reach out of their images, and as corners none",
    "swapped": "the boxes look like y, x, height, width, and COCO's are x, y, width, height: as "
    "such many reach out of their images, and with x and y swapped none; or width and height of "
    "the images are swapped",
    "swapped_corners": "the boxes look like y1, x1, y2, x2, and COCO's are x, y, width, height: as "
    "such many reach out of their images, and as corners none",
    "centres": "the boxes look like centre x, centre y, width, height, and COCO's are left, top, "
    "width, height: as such many reach out of their images, and around a centre none",
    "normalised": "the boxes look like shares of the image, and COCO's are in pixels: no number is "
    "above 1. Multiply them by width and height of the image",
}


@dataclass
class Judgement:
    """Of one document. Entries that are not COCO format are in ``findings`` alone."""

    findings: list[Finding] = field(default_factory=list)
    repaired: dict[str, Any] | None = None
    """What training and evaluation are to use; None for the document as it is."""
    classes: dict[Any, str] = field(default_factory=dict)
    """Names of the categories by their ids, in the order of the ids."""
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """Entries by their ids."""
    objects: dict[Any, list[dict[str, Any]]] = field(default_factory=dict)
    """Annotations by the ids of the images, as the document has them."""
    file_names: dict[Any, str] = field(default_factory=dict)
    """Those that may be used, by the ids of the images."""
    most_objects: int = 0
    """Of an image, without crowds."""


def judge_file(
    path: Path,
    image_root: str | None,
    *,
    allow_outside: bool = False,
    num_queries: int | None = None,
    clip: bool = True,
) -> Judgement:
    """:func:`judge` of a JSON file.

    Raises:
        UserError: the file is no JSON.
    """
    with collector_paused():
        document = read_document(path)
        return judge(
            document.content,
            image_root,
            encoding=document.encoding,
            allow_outside=allow_outside,
            num_queries=num_queries,
            clip=clip,
        )


def judge(
    document: Any,
    image_root: str | None = None,
    *,
    encoding: str = "utf-8",
    allow_outside: bool = False,
    num_queries: int | None = None,
    clip: bool = True,
    found: FindingCollector | None = None,
) -> Judgement:
    """Judge a parsed document; it is not changed.

    Args:
        document: of a JSON.
        image_root: folder that the file names are relative to, "" for the current one; None: the
            names are not judged.
        encoding: of the file.
        allow_outside: names may lead out of the folder.
        num_queries: of the detector, for images with more objects; None: no limit.
        clip: the repaired document has boxes that reach out of their image end at its border.
        found: what the reader of another format has found, and where its entries are from.
    """
    found = FindingCollector() if found is None else found
    if not isinstance(document, dict):
        found.add("format", "not in COCO format: its top level is not an object")
        return Judgement(found.findings())
    entries = EntryJudge(found)
    before = entries.lists(document)
    # Detectron2's evaluation looks for "info".
    changed: dict[str, Any] = {} if "info" in document else {"info": {}}

    good = entries.categories(before["categories"])
    categories = whole_ids(found, "categories", good, ["id"])
    if categories is not good:
        changed["categories"] = categories
    classes = {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}

    good = entries.images(before["images"])
    images = whole_ids(found, "images", good, ["id"])
    by_id = {image["id"]: image for image in images}
    names: dict[Any, str] = {}
    if image_root is not None:
        names = judge_file_names(found, by_id, image_root, allow_outside=allow_outside)
        if any(names.get(number, i["file_name"]) != i["file_name"] for number, i in by_id.items()):
            images = [{**i, "file_name": names.get(i["id"], i["file_name"])} for i in images]
    if images is not good:
        changed["images"] = images

    given = entries.annotations(before["annotations"], by_id, classes)
    annotations = _judge_boxes(found, given, by_id, clip=clip)
    annotations = whole_ids(found, "annotations", annotations, ["id", "image_id", "category_id"])
    annotations = repair_ids(found, annotations)
    if annotations is not given:
        changed["annotations"] = annotations

    counts = Counter(a["image_id"] for a in annotations if not a.get("iscrowd"))
    if len(classes) == 1:
        found.add("one_class", repr(*classes.values()))
    if before["annotations"]:
        _judge_contents(found, annotations, counts, classes, by_id)
        _judge_images(found, by_id, counts, num_queries)
    else:
        found.add(
            "no_annotations",
            f"none of its {len(by_id)} images has an object, as it has no annotations: it is a "
            "test set at most",
        )
    is_plain = encoding == "utf-8"
    if not is_plain:
        found.add("encoding", f"{encoding.upper()}: other programs may refuse it")
    objects: dict[Any, list[dict[str, Any]]] = {}
    for annotation in given:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    return Judgement(
        findings=found.findings(),
        repaired=None if is_plain and not changed else {**document, **changed},
        classes=classes,
        images=by_id,
        objects=objects,
        file_names=names,
        most_objects=max(counts.values(), default=0),
    )


def class_names(path: Path) -> list[str] | None:
    """Class names of a JSON file in the order of their ids; None if it has no list of categories.

    Raises:
        UserError: the file is no JSON, or a category is at fault.
    """
    document = read_document(path).content
    categories = document.get("categories") if isinstance(document, dict) else None
    if not isinstance(categories, list) or not categories:
        return None
    found = FindingCollector()
    good = EntryJudge(found).categories(categories)
    raise_harm(found.findings(), str(path))
    return [c["name"] for c in sorted(good, key=lambda c: c["id"])]


def _judge_boxes(
    found: FindingCollector,
    annotations: list[dict[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    *,
    clip: bool,
) -> list[dict[str, Any]]:
    """The annotations with sound boxes; the same list where nothing is repaired."""
    flat: list[float] = []
    flat_sizes: list[float] = []
    for annotation in annotations:
        flat += annotation["bbox"]
        image = images[annotation["image_id"]]
        flat_sizes += (image["width"], image["height"])
    boxes, sizes = numbers(flat, (-1, 4)), numbers(flat_sizes, (-1, 2))
    layout = guess_layout(boxes, sizes)
    if layout is not None:
        text = f"{_LAYOUTS[layout]}. For example, {_shown(found, annotations[0])}"
        found.add(layout, text, count=len(annotations))
    faults = find_box_faults(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), sizes)
    for kind in ("not_finite", "degenerate", "outside", "clipped"):
        _note(found, kind, annotations, getattr(faults, kind))

    is_crowd = np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool)
    is_used = ~faults.dropped & ~is_crowd
    with np.errstate(invalid="ignore", over="ignore"):
        sides = faults.inside[:, 2:] - faults.inside[:, :2]
        is_tiny = is_used & (sides < TINY_SIDE).any(1)
        is_giant = is_used & ~is_tiny & (sides.prod(1) > GIANT_SHARE * sizes.prod(1))
    if is_giant.sum() >= max(_WHOLE_COUNT, _WHOLE_SHARE * is_used.sum()):
        text = (
            f"{is_giant.sum()} of its {is_used.sum()} boxes cover their whole image, as if made "
            "from labels of images: there are no places to learn"
        )
        found.add("whole_images", text, count=int(is_giant.sum()))
    _note(found, "tiny", annotations, is_tiny)
    _note(found, "giant", annotations, is_giant)
    _note(found, "repeated", annotations, is_used & _repeats(annotations))
    return repair_annotations(found, annotations, boxes, sizes, faults, clip=clip)


def _repeats(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(N,) bool: an annotation before it has the same image, class and box."""
    seen: set[tuple] = set()
    repeats = np.zeros(len(annotations), dtype=bool)
    for index, annotation in enumerate(annotations):
        key = (annotation["image_id"], annotation["category_id"], *annotation["bbox"])
        repeats[index] = key in seen
        seen.add(key)
    return repeats


def _note(
    found: FindingCollector, kind: str, annotations: Sequence[Mapping[str, Any]], mask: np.ndarray
) -> None:
    for index in np.flatnonzero(mask):
        found.add(kind, _shown(found, annotations[index]), annotations[index]["image_id"])


def _shown(found: FindingCollector, annotation: Mapping[str, Any]) -> str:
    what = found.annotation(annotation)
    if annotation["id"] not in found.places:
        what += f" of image {short(annotation['image_id'])}"
    return f"{what}: {short(annotation['bbox'])}"


def _judge_contents(
    found: FindingCollector,
    annotations: Sequence[Mapping[str, Any]],
    objects: Mapping[Any, int],
    classes: Mapping[Any, str],
    images: Mapping[Any, Any],
) -> None:
    """What the annotations amount to when those of no use are gone."""
    used = {a["category_id"] for a in annotations}
    for number, name in classes.items():
        if number not in used:
            found.add("unused", repr(name))
    if annotations and not objects:
        text = (
            f"all {len(annotations)} annotations have iscrowd 1: training leaves crowds out, and "
            "evaluation does not count them. Single objects have iscrowd 0"
        )
        found.add("all_crowd", text, count=len(annotations))
    elif not objects:
        found.add(
            "no_objects",
            f"none of its {len(images)} images has an object of use: there is nothing to learn",
        )


def _judge_images(
    found: FindingCollector,
    images: Mapping[Any, Mapping[str, Any]],
    objects: Mapping[Any, int],
    num_queries: int | None,
) -> None:
    for number, image in images.items():
        count = objects.get(number, 0)
        name = shown(image["file_name"])
        if not count:
            found.add("empty", name, number)
        elif num_queries is not None and count > num_queries:
            found.add("crowded", f"{name}: {count} objects, {num_queries} queries", number)
