"""YOLO folders: a text file of labels for each image, and a YAML that names classes and splits.

A line is a class, counted from 0, and centre x, centre y, width and height as shares of the image;
or a class and a polygon. Folders of Ultralytics, Roboflow, Label Studio and CVAT are read.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...durable import write_new
from ...errors import UserError
from ...texts import shown
from ..files import check_file_name
from ..findings import FindingCollector
from .image_files import (
    is_below,
    locate,
    picture_files,
    picture_sizes,
    relative_name,
)
from .labelled_folders import FIRST, data_folders, file_lookup, is_label
from .records import Box, Picture, RecordSource
from .splits import SPLITS, split_folders, split_name
from .text_files import check_inside, read_head, read_lines
from .written import Written

__all__ = ["TITLE", "YoloSource", "find", "image_place", "write"]

TITLE = "YOLO"
_COLUMNS = (
    "YOLO has 5 (class, centre x, centre y, width, height), or a class and a polygon of three "
    "points or more"
)
_NAME_FILES = ("classes.txt", "obj.names")
_ABSOLUTE = re.compile(r"([A-Za-z]:)?[/\\]+")
_BEYOND = 2.0  # no share of an image, however sloppy, but pixels


def find(path: Path) -> str | None:
    """What speaks for the format; None for nothing."""
    if path.suffix.lower() in (".yaml", ".yml"):
        if not path.is_file():
            return None
        try:
            _read_yaml(path)
        except UserError:
            return f"{path.name} is a YAML"  # it is named, and why it cannot be read is told later
        return f"{path.name} names classes" if _names_classes(path) else None
    if not path.is_dir():
        return None
    table = _find_yaml(path)
    if table is not None:
        return f"{table.name} names classes"
    names = next((n for n in _NAME_FILES if (path / n).is_file()), None)
    example = next(_label_files(path), None)
    if names is not None and (example is not None or _is_flat(path)):
        return f"{names} names classes"
    return None if example is None else f"{example.relative_to(path).as_posix()} is there"


def _label_files(folder: Path) -> Iterator[Path]:
    """Of folders that are called as those of labels are."""
    for place in (folder / "labels", *split_folders(folder / "labels").values()):
        yield from sorted(place.glob("*.txt"))
    for place in split_folders(folder).values():
        yield from sorted((place / "labels").glob("*.txt"))
    for place in sorted(folder.glob("obj_*_data")):
        yield from sorted(place.glob("*.txt"))


def _is_flat(folder: Path) -> bool:
    """Whether labels lie beside the images."""
    return any(
        is_label(read_head(path))
        for path in sorted(folder.glob("*.txt"))[:FIRST]
        if path.name not in _NAME_FILES
    )


def _names_classes(path: Path) -> bool:
    try:
        content = _read_yaml(path)
    except UserError:
        return path.stem in ("data", "dataset")
    return bool({"names", "nc"} & set(content)) and bool({"train", "val", "test"} & set(content))


def _find_yaml(folder: Path) -> Path | None:
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".yaml", ".yml"))
    tables.sort(key=lambda p: p.stem not in ("data", "dataset"))
    return next((p for p in tables if _names_classes(p)), None)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The content, in which all values are texts: "no" is the name of a class, and no False."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys, such as names, train and val")
    return content


class YoloSource(RecordSource):
    """A folder, or the YAML of one.

    Args:
        path: of folder or YAML.
        image_root: the folder in the place of the YAML's own, and of its ``path``.
        allow_outside: the YAML may lead out of its folder. A YAML that is named itself may do so in
            any case, if it leads to images with labels (:meth:`_find_root`).

    Raises:
        UserError: there are no classes, the YAML may not or cannot be followed, or is itself a link
            out of the folder.
    """

    def __init__(self, path: Path, image_root: Path | None = None, *, allow_outside: bool = False):
        self.path = path
        self.allow_outside = allow_outside
        table = _find_yaml(path) if path.is_dir() else path
        self.evidence = find(path) or ""
        self._has_keypoints = False
        self._places: dict[str | None, list[Path]] = {}
        self._named: dict[str, tuple[str, list[str]]] = {}
        if table is None:
            self.image_root = self._base = image_root or path
            self._names = self._names_of_folder()
            self._places = self._places_of_folder()
        else:
            check_inside(table, None if allow_outside or not path.is_dir() else path)
            content = _read_yaml(table)
            self._names = _class_names(table, content)
            self._has_keypoints = "kpt_shape" in content
            self._has_download = "download" in content
            self._table, self._path = table, content.get("path")
            self._named = {
                split: (key, _as_list(table, key, content[key]))
                for split, key in _split_keys(content).items()
            }
            self.image_root = self._base = image_root or table.parent
            self._is_root_given = image_root is not None
            if not self._is_root_given:
                self._find_root()
            if not (image_root or allow_outside or is_below(self.image_root, table.parent)):
                self.evidence += f", and leads to {self.image_root}"
            tests = self._named.get("test", ("", []))[1]
            # Tools name a folder of test images whether there are any or not.
            if not any(_place(self._base, text).exists() for text in tests):
                self._named.pop("test", None)
        self.splits = tuple(s for s in SPLITS if s in self._named or s in self._places)

    def class_names(self) -> Sequence[str]:
        return self._names

    def pictures(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        for name in (*self._places, *self._named) if split is None else (split,):
            if name in self._named:
                self._places[name] = self._entries(*self._named.pop(name))
            yield from self._pictures_of(name, found)

    # -- folders ---------------------------------------------------------------------------------

    def _names_of_folder(self) -> list[str]:
        root = None if self.allow_outside else self.path
        for name in _NAME_FILES:
            if (self.path / name).is_file():
                lines = [line.strip() for line in read_lines(self.path / name, root)]
                return [line for line in lines if line]
        raise UserError(
            f"{self.path} has labels as YOLO has them ({self.evidence}), and nothing that names "
            "the classes: write a data.yaml with names, train and val"
        )

    def _places_of_folder(self) -> dict[str | None, list[Path]]:
        folder = self.image_root
        # CVAT's: obj_train_data, obj_Validation_data.
        exported = {
            split_name(p.name[4:-5]): [p] for p in sorted(folder.glob("obj_*_data")) if p.is_dir()
        }
        divided = {
            **{s: [f] for s, f in split_folders(folder / "images").items()},
            **{s: [f] for s, f in split_folders(folder).items()},
        }
        found = divided or exported or {None: [folder]}
        return {None: [folder]} if list(found) == ["train"] else found

    def _find_root(self) -> None:
        """Find the folder that entries of the YAML are relative to, and the one of the images.

        It may lie outside of the YAML's folder if the YAML is named itself, as Ultralytics' are,
        whose data lie elsewhere, and if its images have labels there: then a YAML from somebody
        else reaches nothing but data sets.

        Raises:
            UserError: it lies outside, and may not.
        """
        own = self._table.parent
        named = {split: texts for split, (_, texts) in self._named.items()}
        tests = named.pop("test", [])
        texts = [text for some in named.values() for text in some] or tests
        roots = _roots(own, self._path)
        refused = None
        judged = set()
        for enough, root in itertools.product((all, any), (*roots, own)):
            if not enough(_place(root, text).exists() for text in texts) or not texts:
                continue
            is_inside = all(is_below(_place(root, text), root) for text in texts)
            if self.allow_outside or (is_inside and is_below(root, own)):
                self.image_root = self._base = root
                return
            if self.path == self._table and root not in judged and self._lead_outside(root, texts):
                return
            judged.add(root)
            refused = refused or (root if root != own else None)
        if refused is None:
            known = (r for r in roots if r.is_dir() and (self.allow_outside or is_below(r, own)))
            self.image_root = self._base = next(known, own)  # what is missing is named later
            return
        raise UserError(
            f"{self._table}: its path {shown(self._path)} leads out of the folder of the file"
            f"{self._why_not()}. Name the folder: image_root={shown(refused)} beside path, or "
            f"--image-root {shown(refused)} beside --data"
        )

    def _why_not(self) -> str:
        """Why a YAML may not lead out of its folder; "" for one that the user has named."""
        if self._is_root_given:
            return ""
        if self.path == self._table:
            return ", and its images have no labels there, or some of them lie beside the file"
        return (
            ", which it may if you name the file itself and its images have labels there: "
            f"--data {shown(self._table)}"
        )

    def _lead_outside(self, root: Path, texts: Sequence[str]) -> bool:
        """Take images outside of the YAML's folder if all lie in folders with labels.

        The image folder is the one that holds them all, once links are followed, and never the
        given one, which may hold anything else. That a YAML leads to its own folder and others is
        no reason to open the folder that holds both.
        """
        places = [_real(place) for text in texts if (place := _place(root, text)).exists()]
        is_inside = all(is_below(place, root) for place in places)
        base = _real(root) if is_inside else _common_folder(places)
        folders = _folders_of(base, places)
        if folders is None:
            return False
        _, tests = self._named.get("test", ("", []))
        tested = [_real(place) for text in tests if (place := _place(root, text)).exists()]
        of_tests = _folders_of(base, tested)
        found = folders + (of_tests or [])
        image_root, own = Path(os.path.commonpath(found)), _real(self._table.parent)
        if image_root != own and own.is_relative_to(image_root):
            if any(folder.is_relative_to(own) for folder in found):
                return False
        if of_tests is None:
            self._named.pop("test")
        for split, (key, given) in self._named.items():
            ends = ((text, _place(root, text)) for text in given)
            followed = [str(_real(end)) if end.exists() else text for text, end in ends]
            self._named[split] = key, followed
        self.image_root, self._base = image_root, base
        return True

    def _entries(self, key: str, texts: Sequence[str]) -> list[Path]:
        """Folders, lists and images of a split.

        Raises:
            UserError: one is not there, or may not be followed.
        """
        entries = []
        for text in texts:
            place = _place(self._base, text)
            if not place.exists():
                path = f", as path is {shown(self._path)}" if isinstance(self._path, str) else ""
                path += ", and download is not followed: unpack it yourself" * self._has_download
                raise UserError(
                    f"{self._table}: {key} is {shown(text)}, and there is no "
                    f"{shown(self._base / text)}{path}. --image-root names another folder"
                )
            if not (self.allow_outside or is_below(place, self.image_root)):
                raise UserError(
                    f"{self._table}: {key} is {shown(text)}, which leads out of the folder "
                    f"{shown(self.image_root)}{self._why_not()}. If you trust its author, set "
                    "dataloader.train.dataset.allow_outside=true"
                )
            entries.append(place)
        return entries

    # -- images and labels -----------------------------------------------------------------------

    def _pictures_of(self, split: str | None, found: FindingCollector) -> Iterator[Picture]:
        root = self.image_root
        places = dict(self._image_files(split))
        files = sorted(places, key=lambda p: p.as_posix())
        sizes = picture_sizes(files, root, found, allow_outside=self.allow_outside)
        labels = {path: _label_file(root, path) for path in files}
        self._find_orphans(split, set(labels.values()), found)
        for path, (width, height) in sizes.items():
            label, name = labels[path], relative_name(path, root)
            boxes: tuple[Box, ...] = ()
            # Of images that are elsewhere, whoever judges the document says so.
            if label.is_file() and (self.allow_outside or check_file_name(name) is None):
                boxes = tuple(self._boxes(label, width, height, found))
            yield Picture(name, width, height, boxes, places[path], split)
        if files and split != "test" and not any(p.is_file() for p in labels.values()):
            path, label = next(iter(labels.items()))
            of_split = f" of {split}" if split else ""
            example, expected = (shown(relative_name(p, root)) for p in (path, label))
            text = f"none of the {len(files)} images{of_split} has labels: those of {example} would"
            found.add("entries", f"{text} be in {expected}")

    def _image_files(self, split: str | None) -> Iterator[tuple[Path, str]]:
        """Images, and where they are named."""
        for place in self._places[split]:
            if place.is_dir():
                for path in picture_files(place):
                    yield path, shown(relative_name(path, self.image_root))
            elif place.suffix.lower() == ".txt":
                for number, line in enumerate(read_lines(place), start=1):
                    if line.strip():
                        name = shown(relative_name(place, self.image_root))
                        image = _listed(self._base, place, line.strip())
                        yield image, f"{name}, line {number}"
            else:
                yield place, self.evidence

    def _find_orphans(self, split: str | None, labels: set[Path], found: FindingCollector) -> None:
        """Labels whose image is not there; nobody knows the size that they are shares of."""
        if any(not place.is_dir() for place in self._places[split]):
            return  # of a list, which may leave out what it likes, such as other splits
        for folder in sorted({p.parent for p in labels}):
            if "labels" not in Path(relative_name(folder, self.image_root)).parts:
                continue  # texts beside images may be anything
            for path in sorted(folder.glob("*.txt")):
                if path not in labels and path.name not in _NAME_FILES:
                    text = f"{shown(relative_name(path, self.image_root))} has no image"
                    found.add("orphans", text)

    def _boxes(self, path: Path, width: int, height: int, found: FindingCollector) -> Iterator[Box]:
        name = shown(relative_name(path, self.image_root))
        if not (self.allow_outside or is_below(path, self.image_root)):
            found.add("entries", f"{name} is a link out of the folder")
            return
        try:
            lines = read_lines(path)
        except UserError as error:
            found.add("entries", str(error))
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{name}, line {number}"
            try:
                yield self._box(line.split(), place, width, height)
            except UserError as error:
                found.add("entries", f"{place} {error}")

    def _box(self, columns: list[str], place: str, width: int, height: int) -> Box:
        """
        Raises:
            UserError: what is wrong with the line.
        """
        count = len(columns)
        if self._has_keypoints and count > 5:
            columns = columns[:5]
        elif count < 5 or (count > 5 and (count < 7 or count % 2 == 0)):
            raise UserError(f"has {count} columns; {_COLUMNS}")
        try:
            values = [float(text) for text in columns]
        except ValueError:
            raise UserError(f"has {shown(' '.join(columns))[:80]!r}, which is no numbers") from None
        if not all(map(math.isfinite, values)):
            raise UserError("has numbers that are not finite")
        if values[0] != int(values[0]) or not 0 <= values[0] < len(self._names):
            raise UserError(
                f"has class {shown(columns[0])}; there are the classes 0 to {len(self._names) - 1}"
            )
        label = self._names[int(values[0])]
        shares = values[1:]
        if max(map(abs, shares)) > _BEYOND:
            raise UserError(
                f"has {max(shares, key=abs):g}; YOLO's numbers are shares of the image, 0 to 1"
            )
        if len(shares) == 4:
            x, y, w, h = (v * side for v, side in zip(shares, (width, height) * 2))
            return Box(label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), place)
        xs, ys = [v * width for v in shares[::2]], [v * height for v in shares[1::2]]
        polygon = tuple(v for point in zip(xs, ys) for v in point)
        return Box(label, (min(xs), min(ys), max(xs), max(ys)), place, (polygon,))


def _roots(own: Path, given: Any) -> list[Path]:
    """Folders that the ``path`` of a YAML may mean; Ultralytics looks for it in its datasets."""
    if not isinstance(given, str) or not given.strip():
        return [own]
    try:
        path = Path(given.strip()).expanduser()
    except RuntimeError:  # of a user whom this computer does not have
        return [own]
    if path.is_absolute():
        return [path]
    bases = (own, own / "datasets", own.parent, own.parent / "datasets")
    return [base / path for base in bases]


def _place(root: Path, text: str) -> Path:
    """Of an entry of the YAML."""
    place = inner = root / text
    while text.startswith("../") and not inner.exists():  # of Roboflow's exports
        text = text[3:]
        inner = root / text
    if inner.exists():
        return inner
    # A full path of another computer is cut at the left. What is left names a split, at least.
    is_full = _ABSOLUTE.match(text)
    parts = text[is_full.end() :].replace("\\", "/").split("/") if is_full else []
    ends = (root.joinpath(*parts[start:]) for start in range(len(parts) - 1))
    return next((end for end in ends if end.exists()), place)


def _common_folder(places: Sequence[Path]) -> Path:
    """That holds images and their labels."""
    folders = []
    for place in places:
        folder = place if place.is_dir() else place.parent
        parts = Path(os.path.abspath(folder)).parts
        last = max((i for i, part in enumerate(parts) if part == "images"), default=len(parts))
        folders.append(str(Path(*parts[:last])))
    return Path(os.path.commonpath(folders))


def _names_in(table: Path) -> list[str]:
    """Images of a list."""
    return [line.strip() for line in read_lines(table) if line.strip()]


def _listed(root: Path, table: Path, text: str) -> Path:
    """An image of a list, which is relative to the list, or else to the folder.

    Names that CVAT has put data/ before, and paths of another computer, are cut at the left.
    """
    path = _listed_file(root, table, text, Path.is_file)
    if path.is_absolute() and is_below(path, root):
        return root / relative_name(path, root.absolute())
    return path


def _listed_file(root: Path, table: Path, text: str, is_file: Callable[[Path], bool]) -> Path:
    name = text.replace("\\", "/")
    path = table.parent / name
    if not is_file(path):
        inner = root / name
        if not is_file(inner):
            inner = root / locate(name, root, [root])
        path = inner if is_file(inner) else path
    return path


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _folders_of(base: Path, places: Iterable[Path]) -> list[Path] | None:
    """Folders of lists, and of images and their labels; None if there are images without labels.

    Args:
        base: of images in lists.
        places: folders, lists and images.
    """
    found, is_file = [], file_lookup()
    for place in places:
        if place.is_dir():
            images = picture_files(place)
        elif place.suffix.lower() == ".txt":
            images = [_listed_file(base, place, name, is_file) for name in _names_in(place)]
            found.append(place.parent)
        else:
            images = [place]
        folders = data_folders(images)
        if not folders:
            return None
        found += folders
    return found


def _label_file(root: Path, image: Path) -> Path:
    """The last folder of the name "images" becomes "labels"; else it lies beside the image."""
    parts = list(image.parts)
    first = len(root.parts) if image.is_relative_to(root) else 0
    for index in range(len(parts) - 2, first - 1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _split_keys(content: dict[str, Any]) -> dict[str, str]:
    """Keys of a YAML that name images, by the split."""
    keys: dict[str, str] = {}
    for key, value in content.items():
        split = split_name(key)
        if split is not None and value not in ("", "null", "~", None, []):
            keys.setdefault(split, key)
    return keys


def _as_list(table: Path, key: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{table}: {key} is neither a path nor a list of paths")
    return texts


def _is_count(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal() and len(value) < 10


def _class_names(table: Path, content: dict[str, Any]) -> list[str]:
    names, count = content.get("names"), content.get("nc")
    if names is None:
        if not _is_count(count) or not 0 < int(count) < 100_000:
            raise UserError(f"{table} has no names of classes")
        return [f"class_{i}" for i in range(int(count))]
    if isinstance(names, dict):
        numbers = [str(i) for i in range(len(names))]
        if sorted(names, key=str) != sorted(numbers):
            listed = shown(", ".join(map(str, list(names)[:8])))
            raise UserError(f"{table}: names has the keys {listed}, and not 0 to {len(names) - 1}")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"{table}: names is no list of names")
    if _is_count(count) and int(count) != len(names):
        raise UserError(f"{table}: nc is {count}, and there are {len(names)} names")
    return names


def write(
    folder: Path,
    parts: Mapping[str | None, Sequence[Written]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """labels/ and data.yaml; see :func:`.conversion.convert`. Crowds are left out."""
    names = [c["name"] for c in categories]
    content: dict[str, Any] = {}
    numbers = {name: number for number, name in enumerate(names)}
    for split, pictures in parts.items():
        content[split or "train"] = image_place(split)
        for written in pictures:
            picture = written.picture
            path = folder / "labels" / (split or "train") / picture.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                _line(numbers[box.label], box, picture) for box in picture.boxes if not box.is_crowd
            ]
            write_new(path.with_suffix(".txt"), "".join(f"{line}\n" for line in lines))
    content["names"] = dict(enumerate(names))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_new(folder / "data.yaml", text)


def image_place(split: str | None) -> str:
    """Folder of the images of a split."""
    return f"images/{split or 'train'}"


def _line(number: int, box: Box, picture: Picture) -> str:
    x0, y0, x1, y1 = box.corners
    shares = (
        (x0 + x1) / 2 / picture.width,
        (y0 + y1) / 2 / picture.height,
        (x1 - x0) / picture.width,
        (y1 - y0) / picture.height,
    )
    return " ".join([str(number), *(f"{share:.8f}".rstrip("0").rstrip(".") for share in shares)])
