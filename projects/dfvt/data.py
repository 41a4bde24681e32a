"""Instance segmentation: data sets whose masks are really there, and crops of their polygons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.data.transforms import CropTransform, RandomCrop

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.formats import VAL_SHARE
from detection_toolkit.errors import UserError

__all__ = ["PolygonCropTransform", "RandomPolygonCrop", "get_instance_segmentation_dataset"]


class PolygonCropTransform(CropTransform):
    """fvcore's ``CropTransform``, which leaves of polygons also what lies outside of the crop.

    Clipping them needs a geometry package, and makes no difference: a mask is compared within a
    proposal, and proposals, like boxes, are clipped to the image.
    """

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Each polygon (N, 2); the result may reach out of the crop."""
        return [self.apply_coords(polygon) for polygon in polygons]


class RandomPolygonCrop(RandomCrop):
    """Detectron2's ``RandomCrop`` by :class:`PolygonCropTransform`."""

    def get_transform(self, image: np.ndarray) -> PolygonCropTransform:
        crop = super().get_transform(image)
        return PolygonCropTransform(crop.x0, crop.y0, crop.w, crop.h)


def get_instance_segmentation_dataset(
    names: str | Sequence[str] | None = None,
    *,
    json_file: str | None = None,
    path: str | None = None,
    split: str | None = None,
    format: str | None = None,
    val_share: float = VAL_SHARE,
    split_seed: int = 0,
    image_root: str | None = None,
    name: str | None = None,
    allow_outside: bool = False,
    filter_empty: bool = True,
    skip_unreadable: bool = False,
    require_polygons: bool = False,
) -> list[dict[str, Any]]:
    """``detection_toolkit.data.get_detection_dataset``, which insists on masks.

    Args:
        names, json_file, path, split, format, val_share, split_seed, image_root, name,
            allow_outside, filter_empty, skip_unreadable: see
            ``detection_toolkit.data.get_detection_dataset``.
        require_polygons: also refuse masks in run lengths, as ``instance_mask_format="polygon"``
            of the mapper cannot take them. Crowds, which are not trained on, may have them.

    Raises:
        ValueError: an object has no mask, or one of the wrong format; names data set, image and
            object. Also whatever ``get_detection_dataset`` raises.
    """
    dicts = get_detection_dataset(
        names,
        json_file=json_file,
        path=path,
        split=split,
        format=format,
        val_share=val_share,
        split_seed=split_seed,
        image_root=image_root,
        name=name,
        allow_outside=allow_outside,
        filter_empty=filter_empty,
        skip_unreadable=skip_unreadable,
    )
    source = json_file or path or (names if isinstance(names, str) else ", ".join(names or ()))
    _refuse(
        source,
        [(d, a) for d, a in _objects(dicts) if not a.get("segmentation")],
        "no mask (no 'segmentation')",
        "Mask R-CNN needs one for each object; to train on boxes alone, use a detector without "
        "masks, such as those of configs/stageinteractor",
    )
    if require_polygons:
        _refuse(
            source,
            [
                (d, a)
                for d, a in _objects(dicts)
                if not a.get("iscrowd") and not isinstance(a["segmentation"], list)
            ],
            "a mask in run lengths, not in polygons",
            "set dataloader.train.mapper.instance_mask_format=bitmask and "
            "dataloader.train.dataset.require_polygons=false",
        )
    return dicts


def _objects(dicts: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    for record in dicts:
        for annotation in record.get("annotations", ()):
            yield record, annotation


def _refuse(
    source: str, found: list[tuple[dict[str, Any], dict[str, Any]]], what: str, way_out: str
) -> None:
    if not found:
        return
    record, annotation = found[0]
    raise UserError(
        f"{source}: {len(found)} objects have {what}; the first one is in image "
        f"{record.get('image_id')} ({record.get('file_name')}), class "
        f"{annotation['category_id']}, box {annotation['bbox']}. {way_out}"
    )
