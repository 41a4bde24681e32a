"""Data sets by catalogue name, or from files that no Python code has registered."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..errors import UnknownNameError, UserError
from .documents import collector_paused
from .formats import VAL_SHARE
from .registered import (
    check_paths,
    clean_dicts,
    judge_registered,
    read_class_names,
    require_files,
)
from .registration import register_coco_json, register_data

__all__ = [
    "check_same_classes",
    "dataset_names",
    "dataset_num_classes",
    "get_detection_dataset",
]

logger = logging.getLogger(__name__)

# Of a config node, those that say what the data set is.
_KEYS = ("names", "json_file", "path", "split", "format", "val_share", "split_seed")
_KEYS += ("image_root", "name", "allow_outside", "skip_unreadable")


def get_detection_dataset(
    names: str | Sequence[str] | None = None,
    *,
    json_file: str | None = None,
    path: str | None = None,
    split: str | None = None,
    format: str | None = None,
    val_share: float = VAL_SHARE,
    split_seed: int = 0,
    image_root: str | None = None,
    name: str | None = None,
    allow_outside: bool = False,
    filter_empty: bool = True,
    skip_unreadable: bool = False,
) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of registered data sets, of a COCO-format JSON, or of a path.

    A registered COCO data set is judged and repaired as a JSON is; of others, boxes without area,
    not finite or outside of their image are dropped and boxes that reach out of it clipped. The
    order is always the same: that of ``names``, and within a COCO data set that of the image ids.

    Args:
        names: catalogue name or names. Not used when ``json_file`` or ``path`` is given.
        json_file, image_root, name: see :func:`.registration.register_coco_json`.
        path, split, format, val_share, split_seed: see :func:`.registration.register_data`.
        allow_outside: images may lie outside of the image folder, which data sets in the catalogue
            have too (``image_root`` of their metadata).
        filter_empty: leave out images without objects (or with crowds only).
        skip_unreadable: see :func:`.registration.register_data`. Others have missing images, too:
            the loader skips them.

    Raises:
        FileNotFoundError: a file or folder is missing.
        KeyError: a name is not registered.
        ValueError: the JSON is not COCO format (see :func:`register_coco_json`), the data sets
            differ in their classes, images lie outside of the image folder, or no image is left.
    """
    names = _resolve(
        names=names,
        json_file=json_file,
        path=path,
        split=split,
        format=format,
        val_share=val_share,
        split_seed=split_seed,
        image_root=image_root,
        name=name,
        allow_outside=allow_outside,
        skip_unreadable=skip_unreadable,
    )
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
    given = {key: dataset[key] for key in _KEYS if dataset.get(key) is not None}
    names = _resolve(**given)
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
    *,
    names: str | Sequence[str] | None = None,
    json_file: str | None = None,
    path: str | None = None,
    split: str | None = None,
    format: str | None = None,
    val_share: float = VAL_SHARE,
    split_seed: int = 0,
    image_root: str | None = None,
    name: str | None = None,
    allow_outside: bool = False,
    skip_unreadable: bool = False,
) -> list[str]:
    allow_outside = bool(allow_outside)
    if json_file and path:
        raise UserError(f"json_file={json_file} and path={path} are both given: set one to null")
    if json_file:
        return [register_coco_json(json_file, image_root, name=name, allow_outside=allow_outside)]
    if path:
        return [
            register_data(
                path,
                split=split,
                format=format,
                image_root=image_root,
                val_share=val_share,
                split_seed=split_seed,
                name=name,
                allow_outside=allow_outside,
                skip_unreadable=skip_unreadable,
            )
        ]
    if image_root:
        raise UserError(f"image_root={image_root} is given without json_file or path")
    if not names:
        raise UserError("a data set needs names, or json_file and image_root, or path")
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
