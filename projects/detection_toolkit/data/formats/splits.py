"""Training, validation and test images: what data sets call them, and how some are held out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...texts import shown
from .records import DataSource, Part, images_of, is_image_id, subset

__all__ = ["SPLITS", "VAL_SHARE", "divide", "read_split", "split_folders", "split_name"]

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.2
"""Of the images that are held out where a data set has no validation images."""
_NAMES = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "minival"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_name(text: str) -> str | None:
    """ "train", "val" or "test" for what a tool calls one of them; None for anything else."""
    return _NAMES.get(text.lower())


def split_folders(folder: Path) -> dict[str, Path]:
    """Folders of a folder that are called as splits are, in the order of ``SPLITS``."""
    try:
        children = sorted(p for p in folder.iterdir() if p.is_dir())
    except OSError:
        return {}
    named: dict[str, Path] = {}
    for child in children:
        name = split_name(child.name)
        if name is not None:
            named.setdefault(name, child)
    return {name: named[name] for name in SPLITS if name in named}


def read_split(
    source: DataSource, split: str | None, *, val_share: float = VAL_SHARE, split_seed: int = 0
) -> Part:
    """A split of a data set. Where it has no validation images, some of the others are held out.

    Args:
        source: the data set.
        split: "train", "val" or "test"; None for all images.
        val_share: of the images that are held out, at least one.
        split_seed: chooses them.

    Raises:
        UserError: there is no such split, or no image is left for it.
    """
    there = source.splits
    if split is None:
        return source.read(None)
    if split not in SPLITS:
        raise UserError(f"split={shown(split)}: it is one of {', '.join(SPLITS)}")
    if split in there and (split != "train" or "val" in there):
        return source.read(split)
    if split == "test" or (there and "train" not in there):
        has = f"it has {', '.join(there)}" if there else "it is not divided"
        raise UserError(f"{source.path} has no {split} images: {has} ({source.evidence})")
    whole = source.read("train" if there else None)
    shares = {"train": 1 - val_share, "val": val_share}
    parts = divide(whole, shares, split_seed)
    if split == "val":  # once: a run asks for both
        logger.info(
            "%s has no validation images: %d of %d are held out (val_share=%g, split_seed=%d)",
            source.path,
            len(parts["val"].document["images"]),
            len(whole.document["images"]),
            val_share,
            split_seed,
        )
    return parts[split]


def divide(part: Part, shares: Mapping[str, float], seed: int) -> dict[str, Part]:
    """Divide images by chance, the same on every machine and in every version of Python.

    Which image goes where depends on its name and the seed: an image that is added later hardly
    moves others.

    Args:
        part: the images.
        shares: of each split, which sum up to at most 1; each gets at least one image.
        seed: of the choice.

    Raises:
        UserError: the shares are none, or there are fewer images than splits, or no list of them.
    """
    total = sum(shares.values())
    if not all(share > 0 for share in shares.values()) or total > 1 + 1e-9:
        given = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise UserError(f"shares of splits are above 0, and at most 1 in sum, not {given}")
    images = [i for i in images_of(part) if isinstance(i, dict) and is_image_id(i.get("id"))]
    if len(images) < len(shares):
        raise UserError(
            f"{len(images)} images cannot be divided into {', '.join(shares)}: each needs one"
        )
    images.sort(key=lambda image: _draw(image, seed))
    parts: dict[str, Part] = {}
    begin, end, cumulated = 0, 0, 0.0
    for left, (name, share) in zip(range(len(shares) - 1, -1, -1), shares.items()):
        cumulated += share
        end = min(max(round(cumulated * len(images)), begin + 1), len(images) - left)
        parts[name] = subset(part, {image["id"] for image in images[begin:end]})
        begin = end
    return parts


def _draw(image: Mapping[str, Any], seed: int) -> tuple[bytes, str]:
    name = str(image.get("file_name"))
    code = f"{seed}/{name}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(code).digest(), name
