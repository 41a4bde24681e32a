"""Data sets of files, put into Detectron2's catalogues."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.logger import log_first_n

from ..errors import UserError
from ..texts import shown
from .documents import KEPT_KEYS, collector_paused, write_copy
from .findings import log_repairs, raise_harm
from .formats import VAL_SHARE, open_source, read_split
from .formats.image_files import is_below
from .judgement import Judgement, judge_file

__all__ = ["name_of_path", "register_coco_json", "register_data"]

# Endings of files that people name in the place of a COCO JSON.
_OTHER_FORMATS = (".yaml", ".yml", ".xml", ".csv")
_UNUSABLE = ("missing", "unreadable")  # findings that skip_unreadable puts up with

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
    if path.is_dir() or (path.is_file() and path.suffix.lower() in _OTHER_FORMATS):
        raise UserError(f"json_file={path} is no COCO JSON: name it as path=, or by --data")
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    if not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} of {path} does not exist: set image_root beside json_file"
        )
    source = (str(path.resolve()), str(root.resolve()))
    name, is_known = _find_name(path.stem, name, source)
    if is_known:
        return name
    judgement = judge_file(path, str(root), allow_outside=allow_outside)
    raise_harm(judgement.findings, str(path), tolerated=("no_annotations",))
    log_repairs(judgement.findings, str(path))
    _register(name, judgement, path, root, source)
    return name


def register_data(
    path: str,
    *,
    split: str | None = None,
    format: str | None = None,
    image_root: str | None = None,
    val_share: float = VAL_SHARE,
    split_seed: int = 0,
    name: str | None = None,
    allow_outside: bool = False,
    skip_unreadable: bool = False,
) -> str:
    """Register a data set in any known format in Detectron2's catalogues; again is no error.

    It becomes a COCO-format document in a cache folder, and is judged as :func:`register_coco_json`
    judges one.

    Args:
        path: folder or file; see :data:`.formats.FORMATS`.
        split: "train", "val" or "test"; None for all images.
        format: a name of ``FORMATS``; by default what is there says it.
        image_root: folder of the images, where they are elsewhere than the format has them.
        val_share: of the images that are held out where there are no validation images.
        split_seed: chooses them.
        name: catalogue name; by default those of path and split, with a number made from all
            arguments where another data set has that name already.
        allow_outside: what is there may lead out of the folder; see :func:`register_coco_json`.
        skip_unreadable: images whose annotations do not say their size, and that are missing or
            cannot be read, are left out with a warning; by default they are refused.

    Returns:
        the catalogue name.

    Raises:
        FileNotFoundError: path or image folder are missing, or the folder has none of the images.
        UserError: the format is not known, there is no such split, or the data do harm; the message
            names the first file and line at fault.
    """
    given = Path(path).expanduser()
    resolved = given.resolve()
    options = (image_root and str(Path(image_root).expanduser().resolve()), split, format)
    source = (str(resolved), *map(str, options), str(val_share), str(split_seed))
    source += ("skip_unreadable",) if skip_unreadable else ()
    name, is_known = _find_name(name_of_path(path, split), name, source)
    if is_known:
        return name
    with collector_paused():
        data = open_source(given, format=format, image_root=image_root, allow_outside=allow_outside)
        own = given if given.is_dir() else given.parent
        if image_root is None and not is_below(data.image_root, own):
            told = f"{shown(given)} leads to the images of {shown(data.image_root)}"
            log_first_n(logging.INFO, told, key="message", name=__name__)
        part = read_split(data, split, val_share=val_share, split_seed=split_seed)
        judgement = part.judge(allow_outside=allow_outside)
    title = f"{given}" if split is None else f"{given} ({split})"
    unusable = _UNUSABLE if skip_unreadable else ()
    raise_harm(judgement.findings, title, tolerated=("no_annotations", *unusable))
    log_repairs(judgement.findings, title)
    for finding in judgement.findings:
        if finding.kind in unusable:
            left = f"{finding.count} images are left out, as skip_unreadable=true"
            logger.warning("%s: %s, the first one: %s", title, left, finding.examples[0])
    json_file = part.json_file
    if json_file is None or judgement.repaired is not None:
        json_file = write_copy(judgement.repaired or part.document, name)
        judgement.repaired = None
    _register(name, judgement, json_file, part.image_root, source)
    return name


# Files that are called the same in every data set.
_TABLES = ("data", "dataset", "annotations", "_annotations", "result")


def name_of_path(path: str, split: str | None) -> str:
    """What a data set is called in logs and reports: its folder, or its file, and the split."""
    place = Path(path).expanduser().resolve()
    stem = place.parent.name if place.suffix and place.stem in _TABLES else place.stem
    return f"{stem}_{split}" if split else stem


def _find_name(stem: str, name: str | None, source: tuple[str, ...]) -> tuple[str, bool]:
    """The name of a data set in the catalogues, and whether it is there already.

    Raises:
        UserError: another one has the given name.
    """
    if name is None:
        name = stem
        if name in MetadataCatalog.list() and MetadataCatalog.get(name).get("source") != source:
            digest = hashlib.sha1("\n".join(source).encode()).hexdigest()[:8]
            name = f"{stem}_{digest}"
    if name not in DatasetCatalog.list():
        return name, False
    known = MetadataCatalog.get(name).get("source")
    if known != source:
        raise UserError(
            f"the data set name {name!r} is taken already"
            + (f", by {known[0]}" if known else "")
            + (f" with the images of {known[1]}" if known and known[1] != "None" else "")
        )
    return name, True


def _register(
    name: str, judgement: Judgement, path: Path, root: Path, source: tuple[str, ...]
) -> None:
    """With the repaired document, where there is one."""
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
