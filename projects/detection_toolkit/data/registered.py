"""Data sets that others have put into Detectron2's catalogues."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from ..errors import UserError
from ..texts import shown
from .boxes import find_box_faults
from .documents import KEPT_KEYS, write_copy
from .files import check_path, find_escapes
from .findings import FindingCollector, log_repairs, raise_harm
from .judgement import class_names, judge_file
from .shapes import ensure_shapes

__all__ = ["check_paths", "clean_dicts", "judge_registered", "read_class_names", "require_files"]


def judge_registered(name: str) -> bool:
    """What :func:`register_coco_json` does for a JSON, for a registered COCO data set; once.

    Where the JSON has to be repaired, evaluation reads the repaired copy instead, and so does
    training where Detectron2's own function loads it. Boxes that reach out of their image are as
    written there, so that COCO's numbers are, and are clipped for training alone. Where its images
    may lie is not judged here: see :func:`check_paths`.

    Returns:
        whether the boxes of its dataset dicts are sound with that. Else see :func:`clean_dicts`.

    Raises:
        UserError: the JSON is no JSON, or does harm.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("source") is not None:
        return True  # by register_coco_json
    json_file, root = (
        None if (value := metadata.get(key)) is None else os.fspath(value)
        for key in ("json_file", "image_root")
    )
    if (
        metadata.get("evaluator_type") != "coco"
        or not json_file
        or "://" in json_file
        or metadata.get("shapes_spec") is not None  # drawn by this package
    ):
        return False
    is_loaded_from_it = _is_loaded_by_detectron2(name)
    if metadata.get("sound_boxes") is not None:
        return metadata.sound_boxes
    is_local = root is not None and "://" not in root
    judgement = judge_file(
        Path(json_file), root if is_local else None, allow_outside=True, clip=False
    )
    # Where images are missing, the loaders say so: they know whether to skip them.
    tolerated = ("no_annotations", "folder")
    raise_harm(judgement.findings, f"data set {name}", tolerated=tolerated)
    log_repairs(judgement.findings, f"data set {name}")
    if metadata.get("thing_classes") is None:
        metadata.thing_classes = list(judgement.classes.values())
    repairs = {finding.kind for finding in judgement.findings if finding.severity == "repaired"}
    metadata.sound_boxes = is_loaded_from_it and "clipped" not in repairs
    if judgement.repaired is None:
        return metadata.sound_boxes
    copy = str(write_copy(judgement.repaired, Path(json_file).stem))
    del metadata.json_file  # which cannot be set to something else
    metadata.json_file = copy
    if is_loaded_from_it:
        metadata.original_loader = DatasetCatalog[name]
        DatasetCatalog[name] = partial(load_coco_json, copy, root, name, KEPT_KEYS)
    return metadata.sound_boxes


def _is_loaded_by_detectron2(name: str) -> bool:
    """Whether it is as ``register_coco_instances``, or this module, has registered it."""
    loader = DatasetCatalog[name]
    loader = loader.func if isinstance(loader, partial) else loader
    return getattr(loader, "__module__", None) == load_coco_json.__module__


def require_files(name: str) -> None:
    """Draw a built-in data set that is not there yet.

    Raises:
        FileNotFoundError: the files of another one are not there.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("shapes_spec") is not None:
        ensure_shapes(name)
    # Whoever registered them may have given a Path.
    json_file, image_root = (
        os.fspath(metadata.get(key) or "") for key in ("json_file", "image_root")
    )
    advice = (
        "put it there, or set the environment variable DETECTRON2_DATASETS to the folder that "
        "holds the data sets"
    )
    if json_file and "://" not in json_file and not Path(json_file).is_file():
        raise FileNotFoundError(
            f"annotation file {json_file} of data set {name} does not exist: {advice}"
        )
    if image_root and "://" not in image_root and not Path(image_root).is_dir():
        raise FileNotFoundError(
            f"image folder {image_root} of data set {name} does not exist: {advice}"
        )


def read_class_names(name: str) -> None:
    """Set the names that Detectron2 would set when it loads a COCO data set."""
    metadata = MetadataCatalog.get(name)
    path = Path(metadata.get("json_file") or "")
    is_coco = metadata.get("evaluator_type") == "coco"
    if not is_coco or metadata.get("thing_classes") is not None or not path.is_file():
        return
    names = class_names(path)
    if names is not None:
        metadata.thing_classes = names


def check_paths(name: str, dicts: Sequence[Mapping[str, Any]], *, allow_outside: bool) -> None:
    """Whether the images of a data set lie in its folder, where one is known.

    Raises:
        UserError: an image lies elsewhere, or has a name that no file can have.
    """
    metadata = MetadataCatalog.get(name)
    root = metadata.get("image_root")
    if root is None or metadata.get("source") is not None:
        return  # no folder is known, or register_coco_json has looked
    root = os.fspath(root)
    paths = [d["file_name"] for d in dicts if isinstance(d.get("file_name"), str)]
    folder = f"outside of its image folder {root or '(the current one)'}"
    advice = "If you trust who wrote its annotations, set allow_outside=true beside names"
    for path in paths:
        wrong = check_path(path, root, allow_outside=allow_outside)
        if wrong is None:
            continue
        what = f"data set {name}: the image {ascii(path)} {wrong}"
        if check_path(path, root, allow_outside=True) is not None:
            raise UserError(what)
        raise UserError(f"{what}, {folder}. {advice}")
    if not allow_outside and "://" not in root:
        escapes = find_escapes(root or os.curdir, paths)
        if escapes:
            raise UserError(
                f"data set {name}: {len(escapes)} of its images are links to files {folder}, for "
                f"example {shown(escapes[0])}. {advice}"
            )


def clean_dicts(dicts: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Dataset dicts whose boxes have area and lie within their image; one log line counts."""
    places = [
        (i, k)
        for i, record in enumerate(dicts)
        for k, annotation in enumerate(record.get("annotations", ()))
        if annotation.get("bbox_mode") in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    ]
    flat: list[float] = []
    sizes: list[float] = []
    for i, k in places:
        annotation = dicts[i]["annotations"][k]
        x0, y0, x1, y1 = annotation["bbox"]
        flat += (
            (x0, y0, x1, y1)
            if annotation["bbox_mode"] == BoxMode.XYXY_ABS
            else (x0, y0, x0 + x1, y0 + y1)
        )
        sizes += (dicts[i]["width"], dicts[i]["height"])
    faults = find_box_faults(
        np.array(flat, dtype=np.float64).reshape(-1, 4),
        np.array(sizes, dtype=np.float64).reshape(-1, 2),
    )
    found = FindingCollector()
    # A copy: the lists of a catalogue belong to whoever registered them.
    changes: dict[int, dict[int, dict[str, Any] | None]] = {}
    for index in np.flatnonzero(faults.dropped | faults.clipped):
        i, k = places[index]
        kind = faults.kind(index)
        assert kind is not None
        annotation = dicts[i]["annotations"][k]
        found.add(kind, str(annotation["bbox"]))
        inside = {"bbox": faults.inside[index].tolist(), "bbox_mode": BoxMode.XYXY_ABS}
        is_clipped = faults.clipped[index]
        changes.setdefault(i, {})[k] = {**annotation, **inside} if is_clipped else None
    log_repairs(found.findings(), name)
    cleaned = list(dicts)
    for i, changed in changes.items():
        kept = [changed.get(k, a) for k, a in enumerate(dicts[i]["annotations"])]
        cleaned[i] = {**dicts[i], "annotations": [a for a in kept if a is not None]}
    return cleaned
