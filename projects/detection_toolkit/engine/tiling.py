"""Large pictures, detected in overlapping tiles.

A detector resizes what it is given, so small objects of a large picture vanish. In tiles they keep
their size. What several tiles see of one object becomes one detection: two boxes of one class from
two tiles are of one object if they agree within the area that both tiles show. This compares a
whole object with the part of it that the edge of another tile has cut off, too.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from ..data.batches import AnyPicture, as_picture, each_picture
from ..defaults import TILE_OVERLAP
from ..errors import UserError

__all__ = ["PicturePredictor", "TiledPredictor", "Tiling", "merge_tiles"]

MIN_TILE = 32
MAX_OVERLAP = 0.9
_SAME = 0.5  # IoU, within the area that two tiles share, from which two boxes are one object
_CUT_SHARE = 0.01  # of a tile's side: so near to an edge within the picture, a box is cut by it


class PicturePredictor(Protocol):
    """What detects in pictures: ``Predictor``, ``OnnxPredictor``."""

    metadata: Metadata

    def predict(
        self, images: AnyPicture | Iterable[AnyPicture], *, batch_size: int = 1
    ) -> Iterator[Instances]: ...


@dataclass(frozen=True)
class Tiling:
    """How a picture is divided.

    Raises:
        UserError: a tile under 32 pixels, or an overlap outside of 0 to 0.9.
    """

    width: int
    """Of a tile, in pixels."""
    height: int
    overlap: float = TILE_OVERLAP
    """Share of a tile's side that the next tile shows, too. Objects up to this size are seen whole
    by one of them."""
    whole: bool = True
    """The whole picture is one more tile, for objects that are larger than the overlap."""

    def __post_init__(self) -> None:
        if min(self.width, self.height) < MIN_TILE:
            raise UserError(
                f"tiles of {self.width}x{self.height} pixels: a side must be {MIN_TILE} at least"
            )
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise UserError(f"overlap of tiles: {self.overlap} is not between 0 and {MAX_OVERLAP}")

    def regions(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """``xyxy`` of the tiles of a picture, row by row, and last the whole picture.

        One tile, the picture, where it is no larger than a tile.
        """
        rows, columns = self._starts(height, self.height), self._starts(width, self.width)
        tiles = [
            (x, y, min(x + self.width, width), min(y + self.height, height))
            for y in rows
            for x in columns
        ]
        return [*tiles, (0, 0, width, height)] if self.whole and len(tiles) > 1 else tiles

    def _starts(self, length: int, side: int) -> list[int]:
        """Of the tiles along one side; the last one ends at the picture's edge."""
        if length <= side:
            return [0]
        step = max(1, round(side * (1 - self.overlap)))
        return [*range(0, length - side, step), length - side]


class TiledPredictor:
    """A predictor that detects in tiles and is called as the one that it is made of.

    A picture that is no larger than a tile gives exactly what the other one finds in it.

    Attributes:
        predictor: detects in the tiles.
        metadata: the predictor's.
    """

    def __init__(self, predictor: PicturePredictor, tiling: Tiling):
        self.predictor = predictor
        self.tiling = tiling
        self.metadata = predictor.metadata

    def __call__(self, original_image: AnyPicture) -> dict[str, Instances]:
        """See :meth:`Predictor.__call__`."""
        return {"instances": next(self.predict([original_image]))}

    def predict(
        self, images: AnyPicture | Iterable[AnyPicture], *, batch_size: int = 1
    ) -> Iterator[Instances]:
        """See :meth:`Predictor.predict`; a batch is of tiles, also those of several pictures."""
        divided: deque[tuple[tuple[int, int], list[tuple[int, int, int, int]]]] = deque()

        def tiles() -> Iterator[np.ndarray]:
            for image in each_picture(images):
                picture = as_picture(image)
                size = picture.shape[:2]
                regions = self.tiling.regions(*size)
                divided.append((size, regions))
                for x1, y1, x2, y2 in regions:
                    yield picture[y1:y2, x1:x2]

        found = self.predictor.predict(tiles(), batch_size=batch_size)
        for first in found:
            size, regions = divided.popleft()
            parts = [first, *itertools.islice(found, len(regions) - 1)]
            yield first if len(regions) == 1 else merge_tiles(parts, regions, size)


def merge_tiles(
    found: Sequence[Instances], regions: Sequence[Sequence[int]], size: tuple[int, int]
) -> Instances:
    """Detections of a picture from those of its tiles, each object once.

    What one tile finds twice stays twice, as without tiles. An object that no tile shows whole gets
    the box around its parts.

    Args:
        found: for each tile, in pixels of the tile.
        regions: for each tile, its ``xyxy`` in the picture.
        size: height and width of the picture.

    Returns:
        with ``pred_boxes`` in pixels of the picture, ``scores`` and ``pred_classes``, best first,
        on the device of the first tile's.
    """
    device = found[0].scores.device
    found = [instances.to("cpu") for instances in found]
    tiles = torch.as_tensor(regions, dtype=torch.float32)
    tile = torch.repeat_interleave(torch.tensor([len(instances) for instances in found]))
    scores = torch.cat([instances.scores for instances in found])
    order = scores.argsort(descending=True, stable=True)
    tile = tile[order]
    boxes = torch.cat([instances.pred_boxes.tensor for instances in found])[order]
    boxes = boxes + tiles[tile, :2].repeat(1, 2)
    classes = torch.cat([instances.pred_classes for instances in found])[order]
    views = _Views(boxes, classes, tile, tiles, size)
    kept = list(views.objects())
    picked = order[torch.tensor([i for i, _ in kept], dtype=torch.long)]
    merged = Boxes(torch.stack([box for _, box in kept]) if kept else boxes)
    merged.clip(size)
    return Instances(
        size,
        pred_boxes=merged,
        scores=scores[picked],
        pred_classes=torch.cat([instances.pred_classes for instances in found])[picked],
    ).to(device)


class _Views:
    """Boxes that tiles have given, best first, of which several may show one object."""

    def __init__(
        self,
        boxes: torch.Tensor,
        classes: torch.Tensor,
        tile: torch.Tensor,
        tiles: torch.Tensor,
        size: tuple[int, int],
    ):
        """
        Args:
            boxes: (D, 4) ``xyxy`` in the picture.
            classes: (D,).
            tile: (D,) index of each box's tile.
            tiles: (T, 4) ``xyxy`` in the picture.
            size: height and width of the picture.
        """
        self.boxes, self.classes, self.tile = boxes, classes, tile
        self.region = tiles[tile]
        frame = torch.tensor([0.0, 0.0, size[1], size[0]])
        margin = _CUT_SHARE * (tiles[:, 2:] - tiles[:, :2]).repeat(1, 2)[tile]
        near = (boxes - self.region).abs() <= margin
        self.is_cut = (near & (self.region != frame)).any(1)
        self.is_free = torch.ones(len(boxes), dtype=torch.bool)

    def objects(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Index of the best view, and box (4,), of each object."""
        for best in range(len(self.boxes)):
            if not self.is_free[best]:
                continue
            self.is_free[best] = False
            yield best, self._box(best)

    def _box(self, best: int) -> torch.Tensor:
        """Of the object that a view shows; takes all other views of it."""
        parts, waiting = [best], deque([best])
        while waiting:
            view = waiting.popleft()
            others = self._others(view)
            self.is_free[others] = False
            if not self.is_cut[view]:
                return self.boxes[view]
            whole = others[~self.is_cut[others]]
            if len(whole):
                # Its own duplicates are taken next, and the parts that the first did not overlap.
                waiting = deque([int(whole[0])])
                continue
            seen = {int(self.tile[i]) for i in parts}
            for other in others.tolist():  # best first: one of each tile
                if int(self.tile[other]) not in seen:
                    seen.add(int(self.tile[other]))
                    parts.append(other)
                    waiting.append(other)
        corners = self.boxes[parts]
        return torch.cat([corners[:, :2].amin(0), corners[:, 2:].amax(0)])

    def _others(self, view: int) -> torch.Tensor:
        """Indices of the free views of its object in other tiles, best first."""
        candidates = (
            self.is_free & (self.classes == self.classes[view]) & (self.tile != self.tile[view])
        ).nonzero()[:, 0]
        regions = self.region[candidates]
        low = torch.maximum(regions[:, :2], self.region[view, :2])
        high = torch.minimum(regions[:, 2:], self.region[view, 2:])
        mine = _clipped(self.boxes[view].expand(len(candidates), 4), low, high)
        theirs = _clipped(self.boxes[candidates], low, high)
        both = _clipped(mine, theirs[:, :2], theirs[:, 2:])
        shared = _area(both)
        union = _area(mine) + _area(theirs) - shared
        return candidates[(shared > _SAME * union) & (shared > 0)]


def _clipped(boxes: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(D, 4) ``xyxy``, within corners (D, 2) each; empty where they do not meet."""
    return torch.cat([torch.maximum(boxes[:, :2], low), torch.minimum(boxes[:, 2:], high)], 1)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
