"""What an exported file says about itself, so that pictures can be given to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from detectron2.data import transforms as T

from ..data.transforms import OpenCVResizeShortestEdge
from ..errors import UserError
from ..texts import parse_json

__all__ = ["METADATA_KEY", "Description", "find_description"]

METADATA_KEY = "detection_toolkit"
_VERSION = 1
_MOST_PIXELS = 65_535  # of a side, more than any image that is read has
_OF_PADDING = ("padded_height", "padded_width", "padding_value")
_RESIZING = {"pillow": T.ResizeShortestEdge, "opencv": OpenCVResizeShortestEdge}


@dataclass(frozen=True)
class Description:
    """How pictures become input, and what the labels mean."""

    class_names: tuple[str, ...] | None
    """Names of the labels 0, 1, ...; None where the data set has none."""

    image_format: str = "RGB"
    """Order of the three channels of the input."""

    resizing: str | None = None
    """What resizes pictures: "pillow" or "opencv", bilinear both; None for not at all."""

    short_side: int = 0
    """Pixels that the shorter side gets."""

    max_side: int = 0
    """Pixels that the longer side never exceeds."""

    padded_height: int = 0
    """Pixels that a resized picture is padded to at the bottom, as if that were picture; 0: not."""

    padded_width: int = 0
    """The same at the right."""

    padding_value: int = 0
    """Of the three channels, 0 to 255."""

    @classmethod
    def from_test_augmentations(
        cls,
        augmentations: Sequence[T.Augmentation],
        *,
        class_names: Sequence[str] | None,
        image_format: str,
    ) -> Description:
        """Describe the test-time treatment of a config.

        Args:
            augmentations: of ``dataloader.test.mapper``, built.
            class_names: of the data set.
            image_format: "RGB" or "BGR".

        Raises:
            ValueError: something else than one resizing to a fixed shorter side, and padding to a
                size that no resized picture exceeds.
        """
        names = None if class_names is None else tuple(class_names)
        if not augmentations:
            return cls(names, image_format)
        first, *rest = augmentations
        kinds = {kind: name for name, kind in _RESIZING.items()}
        lengths = set(getattr(first, "short_edge_length", ()))
        described = type(first) in kinds and len(lengths) == 1
        if not described or not all(_only_pads(a, first.max_size) for a in rest) or len(rest) > 1:
            shown = ", ".join(type(a).__name__ for a in augmentations)
            raise UserError(
                "an exported file can say no more than to resize pictures to one shorter side, and "
                "to pad them with one value to a size that none exceeds: "
                f"dataloader.test.mapper.augmentations has {shown}"
            )
        resizing = kinds[type(first)], lengths.pop(), first.max_size
        padding = [x for pad in rest for x in (*pad.crop_size, int(pad.pad_value))]
        return cls(names, image_format, *resizing, *padding)

    def augmentations(self) -> T.AugmentationList:
        """The test-time treatment that is described."""
        if self.resizing is None:
            return T.AugmentationList([])
        steps = [_RESIZING[self.resizing](self.short_side, self.max_side)]
        if self.padded_height:
            size = self.padded_height, self.padded_width
            steps.append(T.FixedSizeCrop(size, pad=True, pad_value=self.padding_value))
        return T.AugmentationList(steps)

    def to_json(self) -> str:
        values = asdict(self)
        if not self.padded_height:  # so that programs which know no padding read the file
            values = {k: v for k, v in values.items() if k not in _OF_PADDING}
        return json.dumps({"version": _VERSION, **values}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Description:
        """
        Raises:
            ValueError: the text was not written by :meth:`to_json`, or by a newer version of it.
        """
        try:
            values = parse_json(text)
            version = values.pop("version")
            if version != _VERSION:
                raise UserError(
                    f"the description has version {version}, and this program reads {_VERSION}"
                )
            names = values.pop("class_names")
            description = cls(None if names is None else tuple(names), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the description of the model cannot be read ({error})") from error
        description._check()
        return description

    def _check(self) -> None:
        """
        Raises:
            UserError: it says what no detector can have been exported with.
        """
        if self.resizing is not None and self.resizing not in tuple(_RESIZING):
            raise UserError(f"the description asks for unknown resizing {_short(self.resizing)}")
        if self.image_format not in ("RGB", "BGR"):
            raise UserError(f"the description has channel order {_short(self.image_format)}")
        if not all(isinstance(name, str) for name in self.class_names or ()):
            raise UserError("the description has class names that are no texts")
        for name in ("short_side", "max_side"):
            pixels = getattr(self, name)
            least = 0 if self.resizing is None else 1
            if type(pixels) is not int or not least <= pixels <= _MOST_PIXELS:
                raise UserError(f"the description has {name} {_short(pixels)}")
        sides = self.padded_height, self.padded_width
        fits = all(type(side) is int and self.max_side <= side <= _MOST_PIXELS for side in sides)
        is_value = type(self.padding_value) is int and 0 <= self.padding_value <= 255
        if not (sides == (0, 0) or (self.resizing is not None and fits)) or not is_value:
            padding = *sides, self.padding_value
            raise UserError(f"the description has padding {_short(padding)}")


def _only_pads(augmentation: T.Augmentation, max_side: int) -> bool:
    """Whether it pads pictures of such sides by one whole number, and cuts nothing off."""
    return (
        type(augmentation) is T.FixedSizeCrop
        and augmentation.pad
        and min(augmentation.crop_size) >= max_side
        and augmentation.pad_value in range(256)
    )


def _short(value: object) -> str:
    return ascii(value)[:80]


def find_description(metadata: Mapping[str, str]) -> str | None:
    """The text of a :class:`Description` among the metadata of a file; None if there is none.

    Older files have it under another key, so whatever says what a description says is one.
    """
    if METADATA_KEY in metadata:
        return metadata[METADATA_KEY]
    return next((text for text in metadata.values() if _describes(text)), None)


def _describes(text: str) -> bool:
    try:
        values = parse_json(text)
    except ValueError:
        return False
    expected = {"version", *(f.name for f in fields(Description))} - {*_OF_PADDING}
    return isinstance(values, dict) and expected <= set(values)
