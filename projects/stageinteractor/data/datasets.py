"""Data sets by catalogue name, or from a COCO-format JSON that no Python code has registered."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from .shapes import ensure_shapes

__all__ = [
    "check_same_classes",
    "dataset_names",
    "dataset_num_classes",
    "get_detection_dataset",
    "register_coco_json",
]

logger = logging.getLogger(__name__)


def register_coco_json(
    json_file: str, image_root: str | None = None, *, name: str | None = None
) -> str:
    """Register a COCO-format data set in Detectron2's catalogues; again is no error.

    Args:
        json_file: the annotations. Without an "annotations" list it is a test set.
        image_root: folder that the JSON's ``file_name`` entries are relative to; by default the
            folder of the JSON.
        name: catalogue name; by default one made from both paths.

    Returns:
        the catalogue name.

    Raises:
        FileNotFoundError: JSON or image folder are missing.
        ValueError: the file is not COCO format; the message names the entry at fault.
    """
    path = Path(json_file)
    root = path.parent if image_root is None else Path(image_root)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    if not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} of {path} does not exist: set image_root beside json_file"
        )
    if name is None:
        digest = hashlib.sha1(f"{path.resolve()}\n{root.resolve()}".encode()).hexdigest()[:8]
        name = f"{path.stem}_{digest}"
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).get("json_file")
        if known != str(path):
            raise ValueError(f"the data set name {name!r} is taken already, by {known}")
        return name
    categories = _check_coco_json(path)
    DatasetCatalog.register(name, partial(_load_checked, str(path), str(root), name))
    MetadataCatalog.get(name).set(
        thing_classes=[c["name"] for c in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        json_file=str(path),
        image_root=str(root),
        evaluator_type="coco",
    )
    return name


def get_detection_dataset(
    names: str | Sequence[str] | None = None,
    *,
    json_file: str | None = None,
    image_root: str | None = None,
    name: str | None = None,
    filter_empty: bool = True,
) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of registered data sets, or of a COCO-format JSON.

    Args:
        names: catalogue name or names. Not used when ``json_file`` is given.
        json_file, image_root, name: see :func:`register_coco_json`.
        filter_empty: leave out images without objects (or with crowds only).

    Boxes without area and boxes outside of their image are dropped, boxes that reach out of it
    clipped; one log line counts them.

    Raises:
        FileNotFoundError, ValueError, KeyError: see :func:`register_coco_json`; an unknown name;
            no image is left.
    """
    names = _resolve(names, json_file, image_root, name)
    for dataset_name in names:
        _require_files(dataset_name)
    # Boxes are checked before images are filtered: an image may lose its last one.
    dicts = []
    for dataset_name in names:
        part = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        dicts.extend(_clean_boxes(part, dataset_name))
    if filter_empty and any(d.get("annotations") for d in dicts):
        kept = [
            d for d in dicts if any(a.get("iscrowd", 0) == 0 for a in d.get("annotations", ()))
        ]
        if len(kept) < len(dicts):
            logger.info(
                "%s: %d of %d images have no object and are left out (filter_empty=True)",
                ", ".join(names),
                len(dicts) - len(kept),
                len(dicts),
            )
        dicts = kept
    elif filter_empty:
        raise ValueError(
            f"{', '.join(names)}: none of the {len(dicts)} images has an object; "
            "set filter_empty=False to use them all the same"
        )
    return dicts


def dataset_names(dataset: Mapping[str, Any]) -> list[str]:
    """Catalogue names that a config node ``dataloader.*.dataset`` stands for.

    Registers the JSON where one is given, and generates a built-in data set where it is missing,
    so that metadata and files are there afterwards.
    """
    names = _resolve(
        dataset.get("names"),
        dataset.get("json_file"),
        dataset.get("image_root"),
        dataset.get("name"),
    )
    for name in names:
        _require_files(name)
    return names


def dataset_num_classes(names: Sequence[str]) -> int | None:
    """Number of classes of registered data sets; None where their metadata does not say.

    Raises:
        ValueError: they differ in their classes.
    """
    known = {n: MetadataCatalog.get(n).get("thing_classes") for n in names}
    classes = {n: list(c) for n, c in known.items() if c is not None}
    if not classes:
        return None
    first, *others = classes
    for other in others:
        check_same_classes(classes[first], classes[other], first, other)
    return len(classes[first])


def check_same_classes(
    train_classes: Sequence[str],
    test_classes: Sequence[str],
    train_name: str = "the training set",
    test_name: str = "the test set",
) -> None:
    """Two data sets must agree in their class names and in the order of their ids.

    Raises:
        ValueError: they do not; the message names the first difference.
    """
    if list(train_classes) == list(test_classes):
        return
    for i, (a, b) in enumerate(zip(train_classes, test_classes)):
        if a != b:
            detail = f"class {i} is {a!r} in the first and {b!r} in the second"
            break
    else:
        detail = f"they have {len(train_classes)} and {len(test_classes)} classes"
    raise ValueError(
        f"the classes of {train_name} and {test_name} differ: {detail}. "
        "Give both files the same categories"
    )


def _resolve(
    names: str | Sequence[str] | None,
    json_file: str | None,
    image_root: str | None,
    name: str | None,
) -> list[str]:
    if json_file:
        return [register_coco_json(json_file, image_root, name=name)]
    if not names:
        raise ValueError("a data set needs names, or json_file and image_root")
    if image_root:
        raise ValueError(f"image_root={image_root} is given without json_file")
    names = [names] if isinstance(names, str) else list(names)
    missing = [n for n in names if n not in DatasetCatalog.list()]
    if missing:
        raise KeyError(
            f"no data set is registered as {', '.join(missing)}: use a registered name such as "
            "coco_2017_train or shapes_train, or give json_file and image_root"
        )
    return names


def _require_files(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("shapes_spec") is not None:
        ensure_shapes(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file and "://" not in json_file and not Path(json_file).is_file():
        raise FileNotFoundError(
            f"annotation file {json_file} of data set {name} does not exist: put it there, or "
            "set the environment variable DETECTRON2_DATASETS to the folder of the data sets"
        )
    if image_root and "://" not in image_root and not Path(image_root).is_dir():
        raise FileNotFoundError(f"image folder {image_root} of data set {name} does not exist")


def _check_coco_json(path: Path) -> list[dict[str, Any]]:
    """Refuse what is not COCO format; returns the categories sorted by id."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not in COCO format: its top level is not an object")
    for key in ("images", "categories"):
        if not isinstance(document.get(key), list) or not document[key]:
            raise ValueError(f"{path} is not in COCO format: it has no list {key!r}, or an empty one")
    for image in document["images"]:
        for key in ("id", "file_name", "height", "width"):
            if not isinstance(image, dict) or key not in image:
                raise ValueError(f"{path}: image {_short(image)} has no {key!r}")
    _refuse_repeated(path, "image", document["images"])
    for category in document["categories"]:
        for key in ("id", "name"):
            if not isinstance(category, dict) or key not in category:
                raise ValueError(f"{path}: category {_short(category)} has no {key!r}")
    _refuse_repeated(path, "category", document["categories"])

    image_ids = {image["id"] for image in document["images"]}
    category_ids = {category["id"] for category in document["categories"]}
    annotations = document.get("annotations", [])
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: 'annotations' is not a list")
    for annotation in annotations:
        for key in ("id", "image_id", "category_id", "bbox"):
            if not isinstance(annotation, dict) or key not in annotation:
                raise ValueError(f"{path}: annotation {_short(annotation)} has no {key!r}")
        what = f"{path}: annotation {annotation['id']}"
        if annotation["category_id"] not in category_ids:
            raise ValueError(
                f"{what} has category_id {annotation['category_id']}, which is not in 'categories'"
            )
        if annotation["image_id"] not in image_ids:
            raise ValueError(
                f"{what} has image_id {annotation['image_id']}, which is not in 'images'"
            )
        box = annotation["bbox"]
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
        ):
            raise ValueError(f"{what} has bbox {box!r}, which is not four numbers")
    _refuse_repeated(path, "annotation", annotations)
    return sorted(document["categories"], key=lambda c: c["id"])


def _refuse_repeated(path: Path, kind: str, entries: list[dict[str, Any]]) -> None:
    try:
        repeated = [i for i, count in Counter(e["id"] for e in entries).items() if count > 1]
    except TypeError as error:
        raise ValueError(f"{path}: a {kind} id is neither a number nor a text") from error
    if repeated:
        raise ValueError(f"{path}: {kind} id {repeated[0]} occurs more than once")


def _short(entry: object) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else text[:77] + "..."


def _load_checked(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    return load_coco_json(json_file, image_root, name)


def _clean_boxes(dicts: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Drop boxes without area, clip boxes to the image; one log line says how many."""
    dropped = Counter()
    for record in dicts:
        kept = []
        for annotation in record.get("annotations", ()):
            if annotation.get("bbox_mode") != BoxMode.XYWH_ABS:
                kept.append(annotation)
                continue
            x, y, w, h = (float(v) for v in annotation["bbox"])
            if not all(map(math.isfinite, (x, y, w, h))):
                dropped["not finite: dropped"] += 1
                continue
            if w <= 0 or h <= 0:
                dropped["without area: dropped"] += 1
                continue
            x0, x1 = max(x, 0.0), min(x + w, float(record["width"]))
            y0, y1 = max(y, 0.0), min(y + h, float(record["height"]))
            if x1 <= x0 or y1 <= y0:
                dropped["outside of the image: dropped"] += 1
                continue
            # A hundredth of a pixel is rounding of the annotation tool, not worth a word.
            if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 0.01:
                dropped["reaching out of the image: clipped"] += 1
            if (x0, y0, x1, y1) != (x, y, x + w, y + h):
                annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            kept.append(annotation)
        if "annotations" in record:
            record["annotations"] = kept
    if dropped:
        logger.warning(
            "%s: boxes %s", name, "; ".join(f"{k} {v}" for k, v in sorted(dropped.items()))
        )
    return dicts


