"""What can be wrong with a data set: one table of kinds, in the order of a report."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from ..program import command_line

__all__ = ["Finding", "FindingCollector", "first_harm", "in_order", "log_repairs", "raise_harm"]

logger = logging.getLogger(__name__)

Severity = Literal["harm", "repaired", "note"]

# Sides of boxes in pixels, and shares of the image's area, that are worth a look.
TINY_SIDE = 4.0
GIANT_SHARE = 0.95
_NAMED = 5  # examples of a finding


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found in a data set."""

    kind: str
    severity: Severity
    """"harm": training stops, or is less than it should be; "repaired": training and evaluation
    use a repaired copy; "note": worth a look."""
    message: str
    """What it is, in the plural, and in brackets what training does about it."""
    count: int
    examples: tuple[str, ...]
    """Up to five; each is a sentence of its own where the finding is refused."""
    images: tuple[Any, ...] = ()
    """Ids of the images that show it, each once."""


# kind: (severity, what it is, what training does)
_KINDS: dict[str, tuple[Severity, str, str]] = {
    "entries": ("harm", "entries that their format does not have", "refused"),
    "format": ("harm", "entries that are not COCO format", "refused"),
    "image_id": ("harm", "image ids that repeat", "refused"),
    "category_id": ("harm", "category ids or names that repeat", "refused"),
    "annotation_id": ("harm", "annotation ids that repeat", "refused"),
    "unknown_category": ("harm", "annotations of categories that are not listed", "refused"),
    "unknown_image": ("harm", "annotations of images that are not listed", "refused"),
    "file_name": ("harm", "file names that no file can have", "refused"),
    "outside_root": ("harm", "file names that lead out of the image folder", "refused"),
    "links": ("harm", "images that are links out of the image folder", "refused"),
    "folder": ("harm", "image folders that hold none of the images", "refused"),
    "corners": ("harm", "boxes that look like x1, y1, x2, y2", "refused"),
    "swapped": ("harm", "boxes that look like y, x, height, width", "refused"),
    "swapped_corners": ("harm", "boxes that look like y1, x1, y2, x2", "refused"),
    "centres": ("harm", "boxes that look like centre x, centre y, width, height", "refused"),
    "normalised": ("harm", "boxes that look like shares of the image, 0 to 1", "refused"),
    "whole_images": ("harm", "boxes that all cover their whole image", "refused"),
    "all_crowd": ("harm", "objects that all are crowds", "refused"),
    "no_objects": ("harm", "data sets without any object", "refused"),
    "no_annotations": ("harm", "test sets without annotations", "refused, except as a test set"),
    "classes": ("harm", "pairs of splits that differ in their categories", "refused"),
    "missing": ("harm", "images that do not exist", "stops, or skips them on request"),
    "unreadable": ("harm", "images that cannot be read", "stops, or skips them on request"),
    "size": ("harm", "images of another size than the JSON says", "stops"),
    "exif_size": (
        "harm",
        "images whose size in the JSON is that before the rotation in EXIF",
        "stops: the boxes would be those of the picture lying on its side",
    ),
    "crowded": (
        "harm",
        "images with more objects than queries",
        "some objects are never matched",
    ),
    "orphans": ("repaired", "labels of images that are not there", "left out"),
    "shapes": ("repaired", "shapes that have no box", "left out"),
    "rotated": ("repaired", "boxes that are rotated", "replaced by the upright box around them"),
    "annotators": ("repaired", "images that several people annotated", "the first one is taken"),
    "encoding": ("repaired", "files in another encoding than plain UTF-8", "converted"),
    "backslashes": ("repaired", "file names with \\ between folders", "read with /"),
    "float_ids": ("repaired", "ids with a decimal point", "taken as whole numbers"),
    "renumbered": ("repaired", "annotation ids that are texts or below 1", "all renumbered"),
    "area": (
        "repaired",
        "areas that are missing, not positive or contradict their box",
        "replaced by width x height",
    ),
    "not_finite": ("repaired", "boxes that are not finite", "dropped"),
    "degenerate": ("repaired", "boxes without area", "dropped"),
    "outside": ("repaired", "boxes outside of their image", "dropped"),
    "clipped": ("repaired", "boxes reaching out of their image", "clipped"),
    "masks": ("repaired", "objects with a mask or keypoints of no use", "used as boxes"),
    "shared_images": ("note", "images that another split has, too", "its score is too good"),
    "same_file": ("note", "files that several images name", "seen more often than others"),
    "exif": ("note", "images that EXIF rotates", "rotated, as the JSON expects"),
    "from_zero": (
        "note",
        "signs that pixels are counted from 0, and VOC counts from 1",
        "so taken",
    ),
    "tiny": ("note", f"boxes with a side below {TINY_SIDE:g} pixels", "used"),
    "giant": ("note", f"boxes of more than {GIANT_SHARE:.0%} of their image", "used"),
    "repeated": ("note", "boxes that repeat, class and all", "each matched to a query of its own"),
    "empty": ("note", "images without objects", "left out, unless filter_empty=false"),
    "unused": ("note", "categories without objects", "nothing is learned of them"),
    "one_class": ("note", "tables of a single category", "all objects are of one class"),
}


@dataclass
class _Counted:
    count: int = 0
    examples: list[str] = field(default_factory=list)
    images: dict[Any, None] = field(default_factory=dict)


class FindingCollector:
    """Counts what is found, by kind."""

    def __init__(self) -> None:
        self._counted: dict[str, _Counted] = {}
        # Where annotations and images are from, by their ids: files and lines of another format.
        self.places: dict[Any, str] = {}
        self.image_places: dict[Any, str] = {}

    def copy(self) -> FindingCollector:
        """One that goes on by itself."""
        return copy.deepcopy(self)

    def annotation(self, annotation: Mapping[str, Any]) -> str:
        """An annotation for a message: by where it is from, or else by its id."""
        place = self.places.get(annotation["id"])
        return f"annotation {short(annotation['id'])}" if place is None else place

    def image(self, number: Any) -> str:
        """An image for a message: by where it is from, or else by its id."""
        return self.image_places.get(number, f"image {short(number)}")

    def add(self, kind: str, example: str, image_id: Any = None, *, count: int = 1) -> None:
        """Count one more, or ``count`` more that one example stands for."""
        counted = self._counted.setdefault(kind, _Counted())
        counted.count += count
        if len(counted.examples) < _NAMED:
            counted.examples.append(example)
        if image_id is not None:
            counted.images[image_id] = None

    def __contains__(self, kind: str) -> bool:
        return kind in self._counted

    def findings(self) -> list[Finding]:
        """All of them: those that do harm first, then repairs, then notes."""
        return [
            Finding(
                kind,
                severity,
                f"{what} ({outcome})",
                self._counted[kind].count,
                tuple(self._counted[kind].examples),
                tuple(self._counted[kind].images),
            )
            for kind, (severity, what, outcome) in _KINDS.items()
            if kind in self._counted
        ]


def short(value: object) -> str:
    """A value for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in the order of a report."""
    kinds = list(_KINDS)
    return sorted(findings, key=lambda finding: kinds.index(finding.kind))


def first_harm(findings: Iterable[Finding], *, tolerated: Collection[str] = ()) -> Finding | None:
    """The first finding that does harm, and whose kind is not tolerated."""
    harmful = (f for f in findings if f.severity == "harm" and f.kind not in tolerated)
    return next(harmful, None)


def raise_harm(
    findings: Iterable[Finding], source: str, *, tolerated: Collection[str] = ()
) -> None:
    """
    Args:
        findings: of a data set.
        source: what the message begins with: the file, or the name of the data set.
        tolerated: kinds that may be there.

    Raises:
        UserError: a finding does harm; the message is the first one's first example.
        FileNotFoundError: likewise, where the image folder holds none of the images.
    """
    harm = first_harm(findings, tolerated=tolerated)
    if harm is None:
        return
    example = harm.examples[0]
    if harm.kind == "links":
        example = (
            f"{harm.count} of its images are links to files outside of the image folder, for "
            f"example {example}"
        )
    elif harm.count > 1 and not harm.kind.startswith(_ONE_SENTENCE):
        example += f" (and {harm.count - 1} more like it; `{command_line('check')}` lists them)"
    error = FileNotFoundError if harm.kind == "folder" else UserError
    raise error(f"{source}: {example}")


# Whose example speaks of all.
_ONE_SENTENCE = ("corners", "swapped", "centres", "normalised", "whole_images", "all_crowd", "no_")


def log_repairs(findings: Iterable[Finding], source: str) -> None:
    """One line that counts what was repaired."""
    repaired = [f"{f.count} {f.message}" for f in findings if f.severity == "repaired"]
    if repaired:
        logger.warning("%s: %s", source, ", ".join(repaired))
