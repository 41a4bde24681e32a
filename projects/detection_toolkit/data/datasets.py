"""Data sets by catalogue name, or from a COCO-format JSON that no Python code has registered."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from ..errors import UnknownNameError, UserError
from .documents import KEPT_KEYS, collector_paused, write_copy
from .findings import log_repairs, raise_harm
from .judgement import judge_file
from .registered import (
    check_paths,
    clean_dicts,
    judge_registered,
    read_class_names,
    require_files,
)

__all__ = [
    "check_same_classes",
    "dataset_names",
    "dataset_num_classes",
    "get_detection_dataset",
    "register_coco_json",
]

logger = logging.getLogger(__name__)


def register_coco_json(
    json_file: str,
    image_root: str | None = None,
    *,
    name: str | None = None,
    allow_outside: bool = False,
) -> str:
    """Register a COCO-format data set in Detectron2's catalogues; again is no error.

    The file is judged as a whole (:func:`~detection_toolkit.data.judgement.judge`), and is never
    changed. Where something has to be repaired, a copy in a cache folder takes its place, so that
    training and evaluation agree on what the objects are; one log line counts what was repaired.

    Args:
        json_file: the annotations. Without an "annotations" list it is a test set.
        image_root: folder that the JSON's ``file_name`` entries are relative to; by default the
            folder of the JSON.
        name: catalogue name; by default that of the JSON without its ending, with a number made
            from both paths where another data set has that name already.
        allow_outside: the JSON may name images outside of the folder, by ``..``, absolute paths or
            links. By default it may not: whoever wrote it would choose the files that are read.

    Returns:
        the catalogue name.

    Raises:
        FileNotFoundError: JSON or image folder are missing, or the folder has none of the images.
        ValueError: the file is not COCO format, or does harm in another way; the message names the
            first entry at fault. Or the name is taken by another data set.
    """
    path = Path(json_file).expanduser()
    root = path.parent if image_root is None else Path(image_root).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    if not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} of {path} does not exist: set image_root beside json_file"
        )
    source = (str(path.resolve()), str(root.resolve()))
    if name is None:
        name = path.stem
        if name in MetadataCatalog.list() and MetadataCatalog.get(name).get("source") != source:
            digest = hashlib.sha1("\n".join(source).encode()).hexdigest()[:8]
            name = f"{path.stem}_{digest}"
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).get("source")
        if known != source:
            raise UserError(
                f"the data set name {name!r} is taken already"
                + (f", by {known[0]} with the images of {known[1]}" if known else "")
            )
        return name

    judgement = judge_file(path, str(root), allow_outside=allow_outside)
    raise_harm(judgement.findings, str(path), tolerated=("no_annotations",))
    log_repairs(judgement.findings, str(path))
    if judgement.repaired is not None:
        path = write_copy(judgement.repaired, path.stem)
    MetadataCatalog.get(name).set(
        thing_classes=list(judgement.classes.values()),
        thing_dataset_id_to_contiguous_id={n: i for i, n in enumerate(judgement.classes)},
        json_file=str(path),
        image_root=str(root),
        source=source,
        evaluator_type="coco",
    )
    DatasetCatalog.register(name, partial(load_coco_json, str(path), str(root), name, KEPT_KEYS))
    return name


def get_detection_dataset(
    names: str | Sequence[str] | None = None,
    *,
    json_file: str | None = None,
    image_root: str | None = None,
    name: str | None = None,
    allow_outside: bool = False,
    filter_empty: bool = True,
) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of registered data sets, or of a COCO-format JSON.

    A registered COCO data set is judged and repaired as a JSON is; of others, boxes without area,
    not finite or outside of their image are dropped and boxes that reach out of it clipped. The
    order is always the same: that of ``names``, and within a COCO data set that of the image ids.

    Args:
        names: catalogue name or names. Not used when ``json_file`` is given.
        json_file, image_root, name: see :func:`register_coco_json`.
        allow_outside: images may lie outside of the image folder, which data sets in the catalogue
            have too (``image_root`` of their metadata).
        filter_empty: leave out images without objects (or with crowds only).

    Raises:
        FileNotFoundError: a file or folder is missing.
        KeyError: a name is not registered.
        ValueError: the JSON is not COCO format (see :func:`register_coco_json`), the data sets
            differ in their classes, images lie outside of the image folder, or no image is left.
    """
    names = _resolve(names, json_file, image_root, name, allow_outside)
    dataset_num_classes(names)
    # Boxes are checked before images are filtered: an image may lose its last one.
    dicts = []
    for dataset_name in names:
        require_files(dataset_name)
        is_clean = judge_registered(dataset_name)
        try:
            with collector_paused():
                part = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        except AssertionError as error:
            raise UserError(f"data set {dataset_name} cannot be used: {error}") from error
        part = [_with_text_path(d) for d in part]
        check_paths(dataset_name, part, allow_outside=allow_outside)
        dicts.extend(part if is_clean else clean_dicts(part, dataset_name))
    if not filter_empty:
        return dicts
    kept = [d for d in dicts if any(not a.get("iscrowd", 0) for a in d.get("annotations", ()))]
    if not kept:
        raise UserError(
            f"{', '.join(names)}: none of the {len(dicts)} images has an object that is no crowd: "
            "there is nothing to train on"
        )
    if len(kept) < len(dicts):
        logger.info(
            "%s: %d of %d images have no object and are left out (filter_empty=True)",
            ", ".join(names),
            len(dicts) - len(kept),
            len(dicts),
        )
    return kept


def _with_text_path(record: dict[str, Any]) -> dict[str, Any]:
    """A dataset dict whose file name may be a ``Path``, or Detectron2's ``LazyPath``."""
    name = record.get("file_name", "")
    return record if isinstance(name, str) else {**record, "file_name": os.fspath(name)}


def dataset_names(dataset: Mapping[str, Any], *, with_files: bool = True) -> list[str]:
    """Catalogue names that a config node ``dataloader.*.dataset`` stands for.

    Registers the JSON where one is given, and draws a built-in data set where it is missing, so
    that metadata and files are there afterwards. The metadata hold class names also where
    ``register_coco_instances`` was given none: they are read from its JSON.

    Args:
        dataset: the node.
        with_files: False if the names and metadata are wanted alone: then nothing is drawn, and
            the files of registered data sets may be missing.

    Raises:
        FileNotFoundError, KeyError, ValueError: see :func:`get_detection_dataset`.
    """
    keys = ("names", "json_file", "image_root", "name")
    allow_outside = bool(dataset.get("allow_outside", False))
    names = _resolve(*(dataset.get(key) for key in keys), allow_outside)
    for name in names:
        if with_files:
            require_files(name)
            judge_registered(name)
        read_class_names(name)
    return names


def dataset_num_classes(names: str | Sequence[str]) -> int | None:
    """Number of classes of registered data sets; None where their metadata does not say.

    Raises:
        ValueError: they differ in their classes, or those of one are no list.
    """
    names = [names] if isinstance(names, str) else list(names)
    known = {n: MetadataCatalog.get(n).get("thing_classes") for n in names}
    for name, names_of_classes in known.items():
        if isinstance(names_of_classes, str):
            raise UserError(
                f"thing_classes of data set {name} is one text, {names_of_classes!r}: it must be a "
                "list of names"
            )
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
        ValueError: they do not; the message names the difference.
    """
    train_classes, test_classes = list(train_classes), list(test_classes)
    if train_classes == test_classes:
        return
    details = []
    for name, ours, theirs in [
        (train_name, train_classes, test_classes),
        (test_name, test_classes, train_classes),
    ]:
        only = [c for c in ours if c not in theirs]
        if only:
            shown = ", ".join(map(repr, only[:8])) + (", ..." if len(only) > 8 else "")
            details.append(f"only {name} has {shown}")
    if not details:
        pairs = enumerate(zip(train_classes, test_classes))
        different = [f"class {i} is {a!r} there and {b!r} here" for i, (a, b) in pairs if a != b]
        numbers = f"they have {len(train_classes)} and {len(test_classes)} classes"
        details.append(different[0] if different else numbers)
    raise UserError(
        f"the classes of {train_name} and {test_name} differ: {'; '.join(details)}. "
        "Both need the same categories, in the same order of their ids"
    )


def _resolve(
    names: str | Sequence[str] | None,
    json_file: str | None,
    image_root: str | None,
    name: str | None,
    allow_outside: bool,
) -> list[str]:
    if json_file:
        return [register_coco_json(json_file, image_root, name=name, allow_outside=allow_outside)]
    if image_root:
        raise UserError(f"image_root={image_root} is given without json_file")
    if not names:
        raise UserError("a data set needs names, or json_file and image_root")
    names = [names] if isinstance(names, str) else list(names)
    registered = DatasetCatalog.list()
    for missing in (n for n in names if n not in registered):
        near = difflib.get_close_matches(str(missing), registered, n=3)
        raise UnknownNameError(
            f"no data set is registered as {missing!r}: "
            + (f"did you mean {' or '.join(near)}? Else use" if near else "use")
            + " a registered name such as coco_2017_train or shapes_train, or give json_file and "
            "image_root"
        )
    return names
