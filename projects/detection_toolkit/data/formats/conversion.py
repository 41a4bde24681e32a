"""Data sets written in another format, divided, and with fewer images."""

from __future__ import annotations

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..findings import log_repairs, raise_harm
from . import coco, csv_tables, cvat, labelme, voc, yolo
from .records import Box, DataSource, Part, Picture, images_of
from .splits import divide
from .written import Written

__all__ = ["IMAGE_MODES", "WRITERS", "Conversion", "convert", "summary"]

WRITERS = {
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "csv": csv_tables,
    "cvat": cvat,
    "labelme": labelme,
}
"""Formats that can be written, by their names."""
IMAGE_MODES = ("copy", "link", "reference")
"""Images are copied, hard-linked (the same file under another name), or left where they are."""
_BY_REFERENCE = ("coco", "csv", "cvat")  # the image folder is said to whoever reads them
_FLAT = ("voc", "labelme")  # no folders of images below others
_WITH_CROWDS = ("coco", "voc")


@dataclass
class Conversion:
    """What was written."""

    folder: Path
    images: dict[str | None, int] = field(default_factory=dict)
    """By their splits."""
    boxes: int = 0
    classes: int = 0
    crowds_left_out: int = 0
    masks_left_out: int = 0
    image_root: Path | None = None
    """That whoever reads it has to name."""


def convert(
    source: DataSource,
    folder: Path,
    *,
    to: str,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    sample: int | None = None,
    images: str = "copy",
    allow_outside: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Conversion:
    """Write a data set in another format. It is judged and repaired as training does.

    The folder is there as a whole or not at all.

    Args:
        source: the data set.
        folder: to write, which is empty or not there.
        to: a name of ``WRITERS``.
        shares: of "train", "val" and "test", into which all images are divided; by default the
            splits stay as they are.
        seed: of the division and of the sample.
        sample: so many images of each split, by chance; by default all.
        images: one of ``IMAGE_MODES``.
        allow_outside: images may lie outside of their folder.
        progress: wraps an iterable of a known length, to show how far it is.

    Raises:
        UserError: the folder is in use, the data do harm, an image is not there, or a name cannot
            be written.
    """
    if images == "reference" and to not in _BY_REFERENCE:
        raise UserError(f"images of {to} lie beside its annotations: choose copy or link")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{shown(folder)} is there already: choose another folder")
    if os.path.abspath(folder) == os.getcwd():  # it could not take the place of another
        raise UserError(f"{shown(folder)} is the current folder: choose one in it")
    done = Conversion(folder)
    parts = _parts(source, shares, seed)
    categories: list[dict[str, Any]] = []
    written: dict[str | None, list[Written]] = {}
    used: dict[str | None, set[str]] = {}
    for split, part in parts.items():
        if sample is not None:
            part = _sampled(part, sample, seed)
        document = _judged(part, source, split, allow_outside)
        own = sorted(document["categories"], key=lambda c: c["id"])
        if categories and categories != own:
            raise UserError(f"the splits of {source.path} differ in their categories")
        categories = own
        taken = used.setdefault(None if to == "voc" else split, set())  # one folder for all
        pictures = _pictures(document, part.image_root, to, images == "reference", taken)
        written[split] = pictures
        done.images[split] = len(pictures)
        boxes = [box for w in pictures for box in w.picture.boxes]
        crowds = 0 if to in _WITH_CROWDS else sum(box.is_crowd for box in boxes)
        done.boxes += len(boxes) - crowds
        done.crowds_left_out += crowds
        if to != "coco":
            masks = (a for w in pictures for a in w.annotations if a.get("segmentation"))
            done.masks_left_out += sum(1 for _ in masks)
    done.classes = len(categories)
    if images == "reference":
        roots = {part.image_root for part in parts.values()}
        if len(roots) > 1:
            raise UserError(
                "the splits have image folders of their own, and can only be copied or linked"
            )
        (done.image_root,) = roots
    partial = folder.with_name(f".{folder.name[:100]}.{secrets.token_hex(8)}.partial")
    partial.mkdir(parents=True)
    try:
        WRITERS[to].write(partial, written, categories)
        if images != "reference":
            _write_images(partial, to, written, images, progress)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return done


def _parts(
    source: DataSource, shares: Mapping[str, float] | None, seed: int
) -> dict[str | None, Part]:
    if shares:
        return {**divide(source.read(None), shares, seed)}
    return {split: source.read(split) for split in source.splits or (None,)}


def _sampled(part: Part, count: int, seed: int) -> Part:
    total = len(images_of(part))
    if count < 1:
        raise UserError(f"a sample has one image at least, not {count}")
    if count >= total:
        return part
    (sample,) = divide(part, {"sample": count / total}, seed).values()
    return sample


def _judged(
    part: Part, source: DataSource, split: str | None, allow_outside: bool
) -> dict[str, Any]:
    judgement = part.judge(allow_outside=allow_outside)
    title = f"{source.path}" if split is None else f"{source.path} ({split})"
    raise_harm(judgement.findings, title, tolerated=("no_annotations", "no_objects", "all_crowd"))
    log_repairs(judgement.findings, title)
    return judgement.repaired or part.document


def _pictures(
    document: Mapping[str, Any], root: Path, to: str, is_referred: bool, taken: set[str]
) -> list[Written]:
    labels = {c["id"]: c["name"] for c in document["categories"]}
    annotations: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in document.get("annotations", ()):
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    images = sorted(document["images"], key=lambda image: image["id"])
    common = _common_folder([image["file_name"] for image in images])
    pictures = []
    for image in images:
        own = annotations.get(image["id"], [])
        boxes = []
        for annotation in own:
            x, y, width, height = annotation["bbox"]
            corners = (x, y, x + width, y + height)
            is_crowd = bool(annotation.get("iscrowd"))
            boxes.append(Box(labels[annotation["category_id"]], corners, "", is_crowd=is_crowd))
        name = image["file_name"]
        source = root / name
        if not is_referred:
            name = _new_name(name, common, taken, to)
        size = int(image["width"]), int(image["height"])
        picture = Picture(name, *size, tuple(boxes), "")
        pictures.append(Written(picture, source, image, own, is_referred))
    return pictures


def _common_folder(names: list[str]) -> PurePosixPath:
    """That all images are in, which says nothing."""
    folders = [PurePosixPath(n).parent.parts for n in names]
    shared = os.path.commonprefix(folders) if folders else ()
    return PurePosixPath(*shared)


def _new_name(name: str, common: PurePosixPath, taken: set[str], to: str) -> str:
    """A name without its ending is that of its labels, and no disk tells A from a for sure."""
    path = PurePosixPath(name)
    path = PurePosixPath(path.name) if path.is_absolute() or ".." in path.parts else path
    if path.is_relative_to(common):
        path = path.relative_to(common)
    if to in _FLAT:
        path = PurePosixPath("_".join(path.parts))
    if to == "yolo":  # whose readers look for labels where the last folder "images" is
        folders = [f for f in path.parts[:-1] if f.lower() not in ("images", "labels")]
        path = PurePosixPath(*folders, path.name)
    chosen, number = path, 1
    while chosen.with_suffix("").as_posix().casefold() in taken:
        chosen = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    taken.add(chosen.with_suffix("").as_posix().casefold())
    return chosen.as_posix()


def _write_images(
    folder: Path,
    to: str,
    written: Mapping[str | None, list[Written]],
    images: str,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None,
) -> None:
    todo = [
        (w.source, folder / WRITERS[to].image_place(split) / w.picture.file_name)
        for split, pictures in written.items()
        for w in pictures
    ]
    for source, target in todo if progress is None else progress(todo, len(todo)):
        if not source.is_file():
            raise UserError(f"image {shown(source)} does not exist")
        target.parent.mkdir(parents=True, exist_ok=True)
        if images == "copy":
            with source.open("rb") as file:
                write_new(target, file)
            continue
        try:
            os.link(os.path.realpath(source), target)
        except OSError as error:
            raise UserError(
                f"image {shown(source)} cannot be linked ({error.strerror}): choose copy"
            ) from error


def summary(done: Conversion, title: str) -> str:
    """What was written, in a sentence."""
    counts = Counter({split or "": count for split, count in done.images.items()})
    images = ", ".join(f"{n} {f'{split} ' if split else ''}images" for split, n in counts.items())
    text = f"{done.folder}: {images} with {done.boxes} boxes of {done.classes} classes as {title}"
    left = [
        f"{count} {what}"
        for count, what in ((done.crowds_left_out, "crowds"), (done.masks_left_out, "masks"))
        if count
    ]
    return f"{text}; left out: {' and '.join(left)}" if left else text
