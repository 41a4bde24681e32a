"""COCO JSON: one file, a folder of them with their images, or Roboflow's folders of splits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..documents import read_document
from ..files import check_file_name
from ..findings import FindingCollector
from .image_files import relative_name
from .records import DataSource, Part
from .splits import SPLITS, split_folders, split_name
from .text_files import check_inside, read_head
from .written import Written

__all__ = ["TITLE", "CocoSource", "find", "image_place", "write"]

TITLE = "COCO JSON"
_KEYS = ('"images"', '"annotations"')
# COCO's own files beside those with boxes of all classes.
_OTHER = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
_FIRST = 100  # files that are looked into, to know the format
_LOOKED_AT = 20  # images of a file, to find their folder


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    if path.is_file():
        return f"{path.name} begins as COCO's files do" if _is_coco(path) else None
    files = _files(path)
    if not files:
        return None
    example = next(iter(files.values()))[0]
    return f"{example.relative_to(path).as_posix()} begins as COCO's files do"


def _is_coco(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    head = read_head(path).lstrip()
    return head.startswith("{") and '"shapes"' not in head and any(k in head for k in _KEYS)


def _files(folder: Path) -> dict[str | None, list[Path]]:
    """JSON files by their splits."""
    divided: dict[str | None, list[Path]] = {
        split: found
        for split, place in split_folders(folder).items()
        if (found := sorted(p for p in place.glob("*.json") if _is_coco(p)))
    }
    if divided:
        return divided
    files: dict[str | None, list[Path]] = {}
    for place in (folder / "annotations", folder):
        for path in sorted(place.glob("*.json"))[:_FIRST]:
            if not path.name.startswith(_OTHER) and _is_coco(path):
                files.setdefault(_split_of_name(path.stem), []).append(path)
        if files:
            break
    if len(files) > 1:
        files.pop(None, None)
    return files


def _split_of_name(stem: str) -> str | None:
    """Of instances_train2017: train."""
    words = re.findall(r"[A-Za-z]+", stem)
    return next((s for s in map(split_name, words) if s is not None), None)


class _File(NamedTuple):
    path: Path
    document: Any
    encoding: str
    root: Path


class CocoSource(DataSource):
    """A JSON, or a folder with one of each split.

    Args:
        path: of file or folder.
        image_root: of the images; by default the folder in which they are found, near the JSON.
        allow_outside: the files may be links out of the folder. Whoever judges the documents looks
            at the names that they have.

    Raises:
        UserError: a split has several files.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self._given_root = image_root
        self._bound = None if allow_outside or not path.is_dir() else path
        self.image_root = image_root or (path if path.is_dir() else path.parent)
        files = _files(path) if path.is_dir() else {None: [path]}
        for split, paths in files.items():
            if len(paths) > 1:
                named = ", ".join(shown(p.relative_to(path)) for p in paths[:4])
                raise UserError(
                    f"{path} has several files of the split {split or 'with all images'}: {named}. "
                    "Name one of them as json_file=, or move the others away"
                )
        self._paths = {split: paths[0] for split, paths in files.items()}
        if set(self._paths) == {"train"}:
            self._paths = {None: self._paths["train"]}
        self.splits = tuple(s for s in SPLITS if s in self._paths)

    def read(self, split: str | None) -> Part:
        if split is None and self.splits:
            return self._merged()
        file = self._read(split)
        kept = self._without_group(split, file)
        is_whole = kept is file.document
        return Part(
            kept, file.root, FindingCollector(), file.path if is_whole else None, file.encoding
        )

    def _read(self, split: str | None) -> _File:
        path = self._paths[split]
        check_inside(path, self._bound)
        text = read_document(path)
        root = self._given_root or self._find_root(path, text.content)
        return _File(path, text.content, text.encoding, root)

    def _find_root(self, path: Path, document: Any) -> Path:
        """The folder that has images of the document, or else that of the JSON."""
        names = _file_names(document)
        base = path.parent
        above = base.parent if base.name == "annotations" else base
        if self.path.is_dir():
            above = self.path
        words = [w for w in re.findall(r"[A-Za-z]+\d*", path.stem) if _split_of_name(w)]
        spellings = [w for word in words for w in (word, re.sub(r"\d+$", "", word))]
        spellings += ["valid", "validation"] if _split_of_name(path.stem) == "val" else []
        spellings += ["default"] if path.stem.endswith("_default") else []  # of CVAT
        places = [base, base / "images", above, above / "images"]
        places += [above / w for w in spellings] + [above / "images" / w for w in spellings]
        places += [above / w / "images" for w in spellings]
        return next((p for p in places if any((p / n).is_file() for n in names)), base)

    def _without_group(self, split: str | None, file: _File) -> Any:
        """The document without the category that Roboflow adds as the group of all others.

        It has their supercategory's name, and no objects in any split.
        """
        document = file.document
        group = _group(document)
        if group is None:
            return document
        for other in self._paths:
            content = document if other == split else self._read(other).document
            used = content.get("annotations") if isinstance(content, dict) else None
            if any(isinstance(a, dict) and a.get("category_id") == group for a in used or ()):
                return document
        kept = [c for c in document["categories"] if c["id"] != group]
        return {**document, "categories": kept}

    def _merged(self) -> Part:
        """All splits as one document, with ids of its own."""
        merged: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
        numbers: dict[tuple[Any, Any], int] = {}
        root = self._given_root or self.path
        for split in self._paths:
            file = self._read(split)
            document = self._without_group(split, file)
            if not isinstance(document, dict):
                raise UserError(f"{file.path}: not in COCO format: its top level is not an object")
            categories = document.get("categories")
            if merged.setdefault("categories", categories) != categories:
                raise UserError(
                    f"{file.path} has other categories than the other splits of {self.path}: they "
                    "cannot be read as one"
                )
            for image in _entries(document, "images"):
                numbers[split, _key(image.get("id"))] = len(numbers) + 1
                name = image.get("file_name")
                if isinstance(name, str) and check_file_name(name) is None:
                    name = relative_name(file.root / name, root)
                merged["images"].append({**image, "id": len(numbers), "file_name": name})
            for annotation in _entries(document, "annotations"):
                number = numbers.get((split, _key(annotation.get("image_id"))))
                ids = {"id": len(merged["annotations"]) + 1, "image_id": number}
                merged["annotations"].append({**annotation, **ids})
        return Part(merged, root, FindingCollector())


def _entries(document: Mapping[str, Any], key: str) -> Iterator[dict[str, Any]]:
    value = document.get(key)
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict):
            yield entry


def _key(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else ascii(value)


def _file_names(document: Any) -> list[str]:
    """The first ones that may be looked for."""
    entries = _entries(document, "images") if isinstance(document, dict) else ()
    names = [n for e in entries if isinstance(n := e.get("file_name"), str)]
    return [os.path.normpath(n) for n in names[:_LOOKED_AT] if check_file_name(n) is None]


def _group(document: Any) -> Any:
    categories = document.get("categories") if isinstance(document, dict) else None
    if not isinstance(categories, list) or len(categories) < 2:
        return None
    if not all(isinstance(c, dict) and "id" in c and "name" in c for c in categories):
        return None
    groups = [c for c in categories if c.get("supercategory") == "none"]
    others = {c.get("supercategory") for c in categories if c not in groups}
    is_group = len(groups) == 1 and others == {groups[0]["name"]}
    return groups[0]["id"] if is_group else None


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """annotations/instances_SPLIT.json, with all that the documents had."""
    (folder / "annotations").mkdir()
    for split, pictures in parts.items():
        document = {
            "info": {},
            "images": [{**w.image, "file_name": w.picture.file_name} for w in pictures],
            "annotations": [a for w in pictures for a in w.annotations],
            "categories": categories,
        }
        name = f"instances_{split}.json" if split else "instances.json"
        write_new(folder / "annotations" / name, json.dumps(document))


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return f"images/{split}" if split else "images"
