"""Pascal VOC: an XML for each image, in Annotations/ or beside it, and splits in ImageSets/Main/.

Pixels are counted from 1, and the last one belongs to the box. Tools that count from 0 show it by a
coordinate below 1, and are read as they count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..findings import FindingCollector
from ..images import PICTURE_SUFFIXES
from .coordinates import to_number, to_side
from .image_files import is_below, locate, relative_name, size_of
from .records import Box, Picture, RecordSource
from .splits import SPLITS, split_folders, split_name
from .text_files import read_head, read_lines
from .written import Written, check_names, whole_corners
from .xml_tree import Element, read_xml

__all__ = ["TITLE", "VocSource", "find", "image_place", "write"]

TITLE = "Pascal VOC"
_FIRST = 20  # files that are looked into, to know the format
_IMAGES = "JPEGImages"
_CLASSES = ("labels.txt", "labelmap.txt")


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    if not path.is_dir():
        return None
    for folder in _folders(path).values():
        for file in sorted(folder.glob("*.xml"))[:_FIRST]:
            if "<annotation>" in read_head(file) or "<annotation " in read_head(file):
                return f"{file.relative_to(path).as_posix()} begins as VOC's files do"
    return None


def _folders(path: Path) -> dict[str | None, Path]:
    """Of XML files."""
    if (path / "Annotations").is_dir():
        return {None: path / "Annotations"}
    divided = {s: f for s, f in split_folders(path).items() if any(f.glob("*.xml"))}
    return {**divided} if divided else {None: path}


class _Object(NamedTuple):
    label: str
    corners: tuple[float, float, float, float]
    place: str
    is_difficult: bool


class VocSource(RecordSource):
    """A folder of XML files.

    Args:
        path: of the folder.
        image_root: of the images, where they are not in JPEGImages/ or beside the XML files.
        allow_outside: links may lead out of the folder.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.evidence = find(path) or ""
        self.image_root = image_root or path
        self.allow_outside = allow_outside
        self._bound = None if allow_outside else path
        self._folders = _folders(path)
        # Of a folder of XML files; those that are divided need none.
        self._sets = self._read_sets(*self._folders.values()) if len(self._folders) == 1 else {}
        there = {*self._folders, *self._sets}
        if there == {None, "train"} or there == {"train"}:
            there = set()  # all that there are
        self.splits = tuple(s for s in SPLITS if s in there)

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        files = list(self._files(found))
        drafts = []
        for file, own in files:
            try:
                draft = self._read(file, found)
                if draft is not None:
                    drafts.append((*draft, own))
            except UserError as error:
                found.add("entries", str(error))
        boxes = [box for _, boxes, _ in drafts for box in boxes]
        from_zero = any(min(box.corners[:2]) < 1 for box in boxes)
        if from_zero:
            found.add("from_zero", "a box begins at 0: pixels are counted from 0 in all files")
        first = 0 if from_zero else 1
        for picture, objects, own in drafts:
            made = []
            for o in objects:
                x0, y0, x1, y1 = o.corners
                corners = (x0 - first, y0 - first, x1, y1)
                made.append(Box(o.label, corners, o.place, is_crowd=o.is_difficult))
            yield picture._replace(boxes=tuple(made), split=own)

    def class_names(self) -> list[str] | None:
        """Of labels.txt, or CVAT's labelmap.txt; of an ordinary VOC folder there is none."""
        for name in _CLASSES:
            if (self.path / name).is_file():
                lines = [line.strip() for line in read_lines(self.path / name, self._bound)]
                lines = [line for line in lines if line]
                if name == "labels.txt":
                    return lines
                names = [line.split(":")[0] for line in lines if not line.startswith("#")]
                return [name for name in names if name != "background"]
        return None

    def _read_sets(self, annotations: Path) -> dict[str, list[str]]:
        """Names of images by their splits."""
        folder = self.path / "ImageSets" / "Main"
        sets: dict[str, list[str]] = {}
        # trainval last: it is all of both.
        files = sorted(folder.glob("*.txt"), key=lambda p: p.stem == "trainval")
        for file in files:
            split = split_name(file.stem)
            if split is None or split in sets:
                continue
            lines = [line.strip() for line in read_lines(file, self._bound)]
            names = [_name_of_line(line, annotations) for line in lines if line]
            if names:
                sets[split] = names
        return sets

    def _files(self, found: FindingCollector) -> Iterator[tuple[Path, str | None]]:
        if not self._sets:
            for split, folder in self._folders.items():
                for file in sorted(folder.glob("*.xml")):
                    yield file, split
            return
        (folder,) = self._folders.values()
        splits: dict[Path, str] = {}
        for split, names in self._sets.items():
            for name in names:
                file = folder / f"{name}.xml"
                if not file.is_file():
                    text = f"ImageSets/Main names {shown(name)} for {split}, and there is no "
                    found.add("entries", text + shown(relative_name(file, self.path)))
                elif splits.setdefault(file, split) != split:
                    text = f"ImageSets/Main has {shown(name)} in {splits[file]} and in {split}"
                    found.add("entries", text)
        for file in sorted(splits):
            yield file, splits[file]

    def _read(self, file: Path, found: FindingCollector) -> tuple[Picture, list[_Object]] | None:
        """None where the size of the image cannot be known."""
        name = shown(relative_name(file, self.path))
        if not (self.allow_outside or is_below(file, self.path)):
            raise UserError(f"{name} is a link out of the folder")
        root = read_xml(file)
        if root.name != "annotation":
            raise UserError(f"{name} has <{shown(root.name)}> at its top, and VOC <annotation>")
        image = self._image(file, root)
        try:
            sides = [to_side(root.text_of("size", side), side) for side in ("width", "height")]
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        if not all(sides):
            size = size_of(image, self.image_root, name, found)
            if size is None:
                return None
            sides = [*size]
        objects = []
        for element in root.all("object"):
            place = f"{name}, line {element.line}"
            try:
                objects.append(_object(element, place))
            except UserError as error:
                found.add("entries", f"{place}: object {error}")
        return Picture(image, sides[0], sides[1], (), name), objects

    def _image(self, file: Path, root: Element) -> str:
        """By the name in the XML, or by that of the XML, where tools leave the former as it was."""
        folders = [self.image_root]
        if self.image_root == self.path:
            places = (self.path / _IMAGES, self.path / "images", file.parent)
            folders = [*(p for p in places if p.is_dir()), self.path]
        named = root.text_of("filename") or ""
        if named:
            found = locate(named, self.image_root, folders)
            if (self.image_root / found).is_file():
                return found
        for folder in folders:
            for suffix in PICTURE_SUFFIXES:
                for path in (
                    folder / f"{file.stem}{suffix}",
                    folder / f"{file.stem}{suffix.upper()}",
                ):
                    if path.is_file():
                        return relative_name(path, self.image_root)
        return locate(named or f"{file.stem}.jpg", self.image_root, folders)


def _name_of_line(line: str, annotations: Path) -> str:
    """The image of a line of ImageSets; sets of a class say behind it whether it is there."""
    *name, column = line.rsplit(maxsplit=1)
    is_of_class = name and column in ("1", "0", "-1")
    return name[0] if is_of_class and not (annotations / f"{line}.xml").is_file() else line


def _object(element: Element, place: str) -> _Object:
    """
    Raises:
        UserError: what is wrong with it.
    """
    label = element.text_of("name")
    if label is None:
        raise UserError("has no name")
    box = element.first("bndbox")
    if box is None:
        raise UserError(f"{shown(label)} has no bndbox")
    x0, y0, x1, y1 = (to_number(box.text_of(k), k) for k in ("xmin", "ymin", "xmax", "ymax"))
    is_difficult = element.text_of("difficult") in ("1", "true", "True")
    return _Object(label, (x0, y0, x1, y1), place, is_difficult)


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """Annotations/, ImageSets/Main/ and labels.txt; see :func:`.conversion.convert`.

    Raises:
        UserError: the name of a class or image cannot be written.
    """
    names = [c["name"] for c in categories]
    check_names(names, TITLE)
    sets = folder / "ImageSets" / "Main"
    for place in (folder / "Annotations", sets):
        place.mkdir(parents=True)
    write_new(folder / "labels.txt", "".join(f"{n}\n" for n in names))
    for split, pictures in parts.items():
        stems = []
        for written in pictures:
            stem = Path(written.picture.file_name).stem
            check_names([written.picture.file_name, stem], TITLE)
            stems.append(stem)
            path = folder / "Annotations" / f"{stem}.xml"
            write_new(path, _xml(written.picture))
        text = "".join(f"{stem}\n" for stem in stems)
        write_new(sets / f"{split or 'trainval'}.txt", text)


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return _IMAGES


def _xml(picture: Picture) -> str:
    lines = [
        "<annotation>",
        f"  <folder>{_IMAGES}</folder>",
        f"  <filename>{escape(picture.file_name)}</filename>",
        f"  <size><width>{picture.width}</width><height>{picture.height}</height>"
        "<depth>3</depth></size>",
        "  <segmented>0</segmented>",
    ]
    for box in picture.boxes:
        x0, y0, x1, y1 = whole_corners(box, picture)
        lines += [
            "  <object>",
            f"    <name>{escape(box.label)}</name>",
            "    <pose>Unspecified</pose>",
            "    <truncated>0</truncated>",
            f"    <difficult>{int(box.is_crowd)}</difficult>",
            f"    <bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
