"""BCCD, blood cells under the microscope, from its public repository to COCO's format.

The repository has annotations in the format of Pascal VOC, and a split of its own:
``BCCD/Annotations/NAME.xml``, ``BCCD/JPEGImages/NAME.jpg``, ``BCCD/ImageSets/Main/SPLIT.txt``. It
is under the MIT licence: https://github.com/Shenggan/BCCD_Dataset.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from ..errors import UserError
from .files import check_file_name

__all__ = ["BCCD_COUNTS", "BCCD_URL", "bccd_folder", "convert_bccd", "fetch_bccd"]

logger = logging.getLogger(__name__)

BCCD_URL = "https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip"
"""Archive of the repository, as GitHub makes it."""

BCCD_COUNTS = {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}
"""Images and objects of each split at the repository's commit d272fb1."""

_CATEGORIES = ("RBC", "WBC", "Platelets")
_TIMEOUT = 60  # seconds without an answer


def bccd_folder() -> Path:
    """Where the configs look for it: ``bccd`` in ``$DETECTRON2_DATASETS``, or in ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "bccd")


def fetch_bccd(folder: str | Path, url: str = BCCD_URL) -> dict[str, tuple[int, int]]:
    """Download the repository and convert it; see :func:`convert_bccd`.

    A proxy is taken from the environment (``https_proxy``).

    Args:
        folder: is made; it must not be there yet, or be empty.
        url: of a ZIP archive of the repository.

    Raises:
        UserError: the archive cannot be fetched; the message names what to try. Or as for
            :func:`convert_bccd`.
    """
    _refuse_used(Path(folder))
    with tempfile.TemporaryFile() as archive:
        try:
            # urlopen would keep the proxies that it has seen first.
            with urllib.request.build_opener().open(url, timeout=_TIMEOUT) as response:
                shutil.copyfileobj(response, archive)
        except (urllib.error.URLError, HTTPException, TimeoutError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"{url} cannot be fetched: {reason}. Behind a proxy set https_proxy; on a machine "
                "without a network take the ZIP along and name it with --archive FILE"
            ) from error
        archive.seek(0)
        return convert_bccd(archive, folder)


def convert_bccd(archive: str | Path | IO[bytes], folder: str | Path) -> dict[str, tuple[int, int]]:
    """Write ``annotations/{train,val,test}.json`` and ``images/`` from an archive.

    Boxes are taken as they stand (``xmax - xmin`` is the width); those without area are left out.
    Images are sorted by name, ids of images and annotations go on from split to split. The folder
    is there as a whole or not at all.

    Args:
        archive: ZIP of the repository, as a path or an open file.
        folder: is made; it must not be there yet, or be empty.

    Returns:
        numbers of images and objects of each split.

    Raises:
        UserError: the folder is used, or the archive is damaged or is of another repository.
        FileNotFoundError: there is no such archive.
    """
    folder = Path(folder).expanduser()
    _refuse_used(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(".partial", f".{folder.name}-", folder.parent))
    try:
        with zipfile.ZipFile(archive) as opened:
            counts = _convert(_Repository(opened), partial)
        # As any new folder, where mkdtemp's is for its owner only.
        partial.chmod((partial / "images").stat().st_mode)
        partial.replace(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"the archive is damaged or incomplete: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


class _Repository:
    """The files of the repository within its archive, whose only folder has the commit's name."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        ends = "/BCCD/ImageSets/Main/train.txt"
        roots = [n[: -len(ends)] for n in archive.namelist() if n.endswith(ends)]
        if len(roots) != 1:
            raise UserError(f"the archive is not that of BCCD: it has no single file *{ends}")
        self.root = roots[0]

    def read(self, name: str) -> bytes:
        """
        Raises:
            UserError: there is no such file.
        """
        try:
            return self.archive.read(f"{self.root}/{name}")
        except KeyError as error:
            raise UserError(f"the archive has no {name}") from error

    def names(self, split: str) -> list[str]:
        """Of the images of a split, without extension, sorted."""
        names = self.read(f"BCCD/ImageSets/Main/{split}.txt").decode("utf-8").split()
        for name in names:
            wrong = check_file_name(f"{name}.jpg")
            if wrong or "/" in name or "\\" in name:
                raise UserError(f"{split}.txt of the archive has the name {name!r}: no image")
        return sorted(names)

    def annotation(self, name: str) -> ElementTree.Element:
        """The root of an image's XML."""
        try:
            return ElementTree.fromstring(self.read(f"BCCD/Annotations/{name}.xml"))
        except ElementTree.ParseError as error:
            raise UserError(f"{name}.xml of the archive is damaged: {error}") from error


def _convert(repository: _Repository, folder: Path) -> dict[str, tuple[int, int]]:
    for name in ("annotations", "images"):
        (folder / name).mkdir()
    counts = {}
    num_images = num_objects = 0
    for split in BCCD_COUNTS:
        images, annotations = [], []
        for name in repository.names(split):
            num_images += 1
            root = repository.annotation(name)
            image = {
                "id": num_images,
                "file_name": f"{name}.jpg",
                "width": _number(root, "size/width", name),
                "height": _number(root, "size/height", name),
                "license": 1,
            }
            images.append(image)
            for found in _objects(root, name):
                num_objects += 1
                annotations.append({"id": num_objects, "image_id": num_images, **found})
            (folder / "images" / f"{name}.jpg").write_bytes(
                repository.read(f"BCCD/JPEGImages/{name}.jpg")
            )
        document = {
            "info": {"description": "BCCD, blood cells, COCO format"},
            "licenses": [{"id": 1, "name": "MIT", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": i, "name": name, "supercategory": "cell"}
                for i, name in enumerate(_CATEGORIES, 1)
            ],
        }
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))
        counts[split] = (len(images), len(annotations))
    (folder / "LICENSE").write_bytes(repository.read("LICENSE"))
    return counts


def _objects(root: ElementTree.Element, name: str) -> list[dict[str, Any]]:
    """Category, box and area of each object that has an area."""
    found = []
    for element in root.iter("object"):
        label = element.findtext("name", "").strip()
        if label not in _CATEGORIES:
            raise UserError(f"{name}.xml of the archive has an object of class {label!r}")
        x1, y1, x2, y2 = (
            float(_number(element, f"bndbox/{key}", name))
            for key in ("xmin", "ymin", "xmax", "ymax")
        )
        if x2 <= x1 or y2 <= y1:
            logger.info("%s.xml: a box of class %s has no area and is left out", name, label)
            continue
        found.append(
            {
                "category_id": _CATEGORIES.index(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
        )
    return found


def _number(element: ElementTree.Element, path: str, name: str) -> int:
    text = element.findtext(path, "").strip()
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}.xml of the archive: {path} is {text!r}, no number") from error


def _refuse_used(folder: Path) -> None:
    folder = folder.expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already: remove it, or name another with --output")
