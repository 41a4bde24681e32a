"""Whether the entries of a COCO-format document are what the format says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .findings import FindingCollector, short

__all__ = ["EntryJudge", "is_number", "is_whole"]

# Exact types: True is no number.
_NUMBERS = frozenset((int, float))
_CROWD = (0, 1)
# Whole numbers from here on are no sizes, and as ids they do not fit into 64 bits.
_BEYOND = 2**63


def is_number(value: object) -> bool:
    """Whether a value of a JSON is a number, infinite or NaN perhaps, that a float can hold."""
    return type(value) is float or type(value) is int and abs(value) < _BEYOND


def is_whole(value: object) -> bool:
    """Whether a value is a whole number of 64 bits; 1.0 is one."""
    if type(value) is float:
        return value.is_integer() and abs(value) < _BEYOND
    return type(value) is int and abs(value) < _BEYOND


class EntryJudge:
    """Notes entries at fault, and returns the others."""

    def __init__(self, found: FindingCollector):
        self.found = found

    def lists(self, document: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The three lists of a document, empty where there is none."""
        lists = {}
        for key in ("categories", "images", "annotations"):
            value = document.get(key)
            is_list = isinstance(value, list)
            lists[key] = value if is_list else []
            if key != "annotations" and not value or not is_list and key in document:
                self.found.add(
                    "format",
                    f"not in COCO format: it has no list {key!r}"
                    + ("" if key == "annotations" else ", or an empty one"),
                )
        return lists

    def categories(self, categories: list[Any]) -> list[dict[str, Any]]:
        """Those with an id of their own and a name of their own."""
        names: dict[str, Any] = {}
        good: dict[Any, dict[str, Any]] = {}
        for category in categories:
            if not self._has_keys("category", category, ("id", "name")):
                continue
            number, name = category["id"], category["name"]
            what = f"category {short(number)}"
            if not is_whole(number):
                self._format(f"category id {short(number)} is not a whole number")
            elif not isinstance(name, str):
                self._format(f"{what} has a name that is not a text")
            elif not _is_text(name):
                self._format(f"{what} has a name {name!a} that is no text")
            elif number in good:
                self.found.add("category_id", f"category id {number} occurs more than once")
            elif name in names:
                # Results are reported by name: one of the two would be lost.
                self.found.add(
                    "category_id",
                    f"the categories {names[name]} and {number} are both named {name!r}: rename "
                    "one, or give their annotations the same category_id",
                )
            else:
                good[number], names[name] = category, number
        return list(good.values())

    def images(self, images: list[Any]) -> list[dict[str, Any]]:
        """Those with an id of their own, a file name and a size."""
        good: dict[Any, dict[str, Any]] = {}
        for image in images:
            if not self._has_keys("image", image, ("id", "file_name", "height", "width")):
                continue
            number = image["id"]
            if not self._is_id("image", number):
                continue
            problems = []
            if not isinstance(image["file_name"], str):
                problems.append(f"file_name {short(image['file_name'])}, which is not a text")
            for key in ("height", "width"):
                if not is_number(image[key]) or not 1 <= image[key] < _BEYOND:
                    problems.append(f"{key} {short(image[key])}, which is not a number of pixels")
            if problems:
                self._format(f"image {short(number)} has {' and '.join(problems)}")
            elif number in good:
                self.found.add("image_id", f"image id {short(number)} occurs more than once")
            else:
                good[number] = image
        self._same_kind("image", good)
        return list(good.values())

    def annotations(
        self, annotations: list[Any], images: Mapping[Any, Any], categories: Mapping[Any, Any]
    ) -> list[dict[str, Any]]:
        """Those with an id, four numbers for a box, and a known image and category.

        Args:
            annotations: of the document.
            images, categories: what is known, by its id.
        """
        good: list[dict[str, Any]] = []
        for annotation in annotations:
            try:  # in short, what nearly all of a large data set are
                box = annotation["bbox"]
                x, y, w, h = box
                is_sound = (
                    type(x) in _NUMBERS
                    and type(y) in _NUMBERS
                    and type(w) in _NUMBERS
                    and type(h) in _NUMBERS
                    and type(box) is list
                    and annotation["category_id"] in categories
                    and annotation["image_id"] in images
                    and type(annotation["id"]) is int
                    and -_BEYOND < annotation["id"] < _BEYOND
                    and annotation["iscrowd"] in _CROWD
                    and "ignore" not in annotation
                )
            except (KeyError, TypeError, ValueError):
                is_sound = False
            if is_sound or self._is_sound(annotation, images, categories):
                good.append(annotation)
        ids = [annotation["id"] for annotation in good]
        if len(set(ids)) < len(ids):
            for number, count in Counter(ids).items():
                if count > 1:
                    text = f"annotation id {short(number)} occurs more than once"
                    self.found.add("annotation_id", text, count=count - 1)
        self._same_kind("annotation", ids)
        return good

    def _is_sound(
        self, annotation: Any, images: Mapping[Any, Any], categories: Mapping[Any, Any]
    ) -> bool:
        keys = ("id", "image_id", "category_id", "bbox")
        if not self._has_keys("annotation", annotation, keys):
            return False
        if not self._is_id("annotation", annotation["id"]):
            return False
        what = f"annotation {short(annotation['id'])} has"
        for key, kind, known, where in [
            ("category_id", "unknown_category", categories, "categories"),
            ("image_id", "unknown_image", images, "images"),
        ]:
            if isinstance(annotation[key], (list, dict)) or annotation[key] not in known:
                text = f"{what} {key} {short(annotation[key])}, which is not in {where!r}"
                if (other := _as_other_kind(annotation[key])) is not None and other in known:
                    text += f": there it is {short(other)}"
                self.found.add(kind, text)
                return False
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(type(v) in _NUMBERS for v in box)):
            self._format(f"{what} bbox {short(box)}, which is not four numbers")
            return False
        if annotation.get("iscrowd", 0) not in _CROWD:
            self._format(f"{what} iscrowd {short(annotation['iscrowd'])}, which is not 0 or 1")
            return False
        if annotation.get("ignore", 0) not in (0, None):
            self._format(
                f"{what} 'ignore' set, which Detectron2 does not support: use 'iscrowd', or "
                "remove the annotation"
            )
            return False
        return True

    def _format(self, example: str) -> None:
        self.found.add("format", example)

    def _has_keys(self, what: str, entry: Any, keys: Sequence[str]) -> bool:
        if not isinstance(entry, dict):
            self._format(f"{what} {short(entry)} is not an object")
            return False
        absent = [key for key in keys if key not in entry]
        if absent:
            self._format(f"{what} {short(entry)} has no {', '.join(map(repr, absent))}")
        return not absent

    def _is_id(self, what: str, number: Any) -> bool:
        is_id = isinstance(number, str) or is_whole(number)
        if not is_id:
            self._format(f"{what} id {short(number)} is neither a whole number nor a text")
        return is_id

    def _same_kind(self, what: str, ids: Any) -> None:
        if len({isinstance(number, str) for number in ids}) > 1:
            self._format(f"some {what} ids are numbers and others are texts")


def _as_other_kind(number: Any) -> int | str | None:
    """1 for "1", and "1" for 1; None for what is neither."""
    if isinstance(number, str):
        return int(number) if number.isascii() and number.isdigit() and len(number) < 19 else None
    return str(number) if type(number) is int else None


def _is_text(text: str) -> bool:
    """False for halves of characters, which JSON can express and no output can show."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
