"""Denoising queries: noised objects that the decoder learns to restore (DN-DETR, section 4).

They are trained with, and stand before, the queries that detect. Each of G groups has a query for
every object, or with contrast two; no group sees another, and the detecting queries see none.

Letters: B images, N detecting queries, M slots of objects (the most in one image of the batch), G
groups, P kinds of queries in a group, C channels, K classes. D = G P M denoising queries, in this
order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from deformable_detr.heads import inverse_sigmoid
from detection_toolkit.errors import UserError
from detection_toolkit.structures import GroundTruth, Queries
from detection_toolkit.structures.boxes import xyxy_norm

__all__ = ["BoxDenoising", "ContrastiveDenoising", "Denoised", "Denoising", "Noise"]

EPS = 1e-3
"""A share of the image that is closer to 0 or 1 begins there, as references do in the decoder."""


class Noise(NamedTuple):
    """What is drawn for every denoising query, uniformly."""

    replace: Tensor
    """(G, P, B, M) in [0, 1): the class is replaced where it is below a rate."""
    labels: Tensor
    """(G, P, B, M) classes to replace with."""
    amount: Tensor
    """(G, P, B, M, 4) in [0, 1): how far each number of the box moves."""
    sign: Tensor
    """(G, P, B, M, 4) 1 or -1: where to."""


class Denoised(NamedTuple):
    """Queries with denoising ones before them."""

    queries: Queries
    """D + N of them, with the mask that keeps the groups apart."""
    object_index: Tensor
    """(B, D) object that each denoising query is to restore, -1 for none."""


class Denoising(nn.Module, ABC):
    """Puts denoising queries before those of any source."""

    num_kinds: int
    """P."""

    def __init__(self, num_classes: int, channels: int, *, label_noise: float, box_noise: float):
        """
        Args:
            num_classes: K.
            channels: of the embedding of a class.
            label_noise: share of the queries whose class is replaced by any.
            box_noise: largest change of a box, in halves of its sides.

        Raises:
            UserError: a share outside [0, 1], or negative noise.
        """
        super().__init__()
        if not 0 <= label_noise <= 1:
            raise UserError(f"model.denoising.label_noise must lie in [0, 1], got {label_noise}")
        if box_noise < 0:
            raise UserError(f"model.denoising.box_noise must not be negative, got {box_noise}")
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.label_embedding = nn.Embedding(num_classes, channels)

    @abstractmethod
    def num_groups(self, num_slots: int) -> int:
        """G, for M slots."""

    @abstractmethod
    def noised(self, corners: Tensor, noise: Noise) -> Tensor:
        """Objects (B, M, 4) with noise: (G, P, B, M, 4), centre and size.

        Both are shares of the image; the objects ``xyxy``.
        """

    def content(self, labels: Tensor) -> Tensor:
        """(...) classes -> (..., C) contents."""
        return self.label_embedding(labels)

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Noise:
        """Noise for (G, P, B, M) queries, of the type and on the device of ``like``."""
        num_classes = self.label_embedding.num_embeddings
        replace = torch.rand(shape, dtype=like.dtype, device=like.device)
        labels = torch.randint(num_classes, shape, device=like.device)
        sign = torch.randint(2, (*shape, 4), device=like.device).to(like.dtype) * 2 - 1
        amount = torch.rand((*shape, 4), dtype=like.dtype, device=like.device)
        return Noise(replace, labels, amount, sign)

    def forward(self, queries: Queries, truth: GroundTruth) -> Denoised:
        """
        Args:
            queries: of N queries without a mask; geometry (B, N, 4) centre and size as shares of
                the image.
            truth: the objects; where there are none in the whole batch, D is 0.
        """
        num_slots = max(truth.num_objects)
        device = truth.labels.device
        counts = torch.tensor(truth.num_objects).to(device, non_blocking=True)
        slots = torch.arange(num_slots, device=device)
        real = slots < counts[:, None]  # (B, M)
        truth = truth.to(queries.geometry.dtype)
        labels = truth.labels[:, :num_slots]
        corners = xyxy_norm(truth.boxes[:, :num_slots], truth.image_sizes[:, None])

        shape = (self.num_groups(num_slots), self.num_kinds, *labels.shape)
        noise = self.draw(shape, corners)
        labels = torch.where(noise.replace < self.label_noise, noise.labels, labels)
        content = self.content(labels) * real[..., None]
        reference = inverse_sigmoid(self.noised(corners, noise), EPS).sigmoid()
        reference = reference.masked_fill(~real[..., None], 0.5)
        # Queries of the first kind are to restore their object, others are background.
        restores = real & (torch.arange(self.num_kinds, device=device) == 0)[:, None, None]
        index = torch.where(restores, slots, -1).expand(shape)
        return Denoised(
            Queries(
                torch.cat([_in_a_row(content), queries.content], dim=1),
                torch.cat([_in_a_row(reference), queries.geometry], dim=1),
                attention_mask=_apart(shape, queries.content.shape[1], device),
            ),
            _in_a_row(index),
        )


class BoxDenoising(Denoising):
    """As in DN-DETR: one query for every object, centre and size noised; the last channel of its
    content, which is 0 in detecting queries, says that it is one."""

    num_kinds = 1

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        num_groups: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
    ):
        """
        Args:
            num_classes: K.
            channels: C.
            num_groups: G.
            label_noise, box_noise: see :class:`Denoising`. A centre moves by halves of the sides,
                a size by whole ones.
        """
        super().__init__(num_classes, channels - 1, label_noise=label_noise, box_noise=box_noise)
        if num_groups < 1:
            raise UserError(f"model.denoising.num_groups must be at least 1, got {num_groups}")
        self._num_groups = num_groups

    def num_groups(self, num_slots: int) -> int:
        """The same, whatever the number of objects."""
        return self._num_groups

    def content(self, labels: Tensor) -> Tensor:
        """With the indicator."""
        embedding = super().content(labels)
        return torch.cat([embedding, torch.ones_like(embedding[..., :1])], dim=-1)

    def noised(self, corners: Tensor, noise: Noise) -> Tensor:
        boxes = box_convert(corners, "xyxy", "cxcywh")
        sizes = boxes[..., 2:]
        reach = torch.cat([sizes / 2, sizes], dim=-1) * self.box_noise
        return (boxes + noise.sign * noise.amount * reach).clamp(0, 1)


class ContrastiveDenoising(Denoising):
    """As in DINO (section 3.3): two queries for every object, whose corners are noised; the one
    with less noise is to restore it, the one with more to say that there is none."""

    num_kinds = 2

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        budget: int = 100,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
    ):
        """
        Args:
            num_classes: K.
            channels: C.
            budget: queries of one kind that the groups together have at most, unless one group has
                more already.
            label_noise, box_noise: see :class:`Denoising`. The authors' ``dn_label_noise_ratio`` is
                twice ``label_noise``.

        Raises:
            UserError: no budget.
        """
        super().__init__(num_classes, channels, label_noise=label_noise, box_noise=box_noise)
        if budget < 1:
            raise UserError(
                f"model.denoising.budget must be at least 1, got {budget}: to leave denoising out, "
                "set model.denoising=null and model.criterion.denoising=null"
            )
        self.budget = budget

    def num_groups(self, num_slots: int) -> int:
        """As many as the budget has room for."""
        return max(1, self.budget // max(1, num_slots))

    def noised(self, corners: Tensor, noise: Noise) -> Tensor:
        sizes = corners[..., 2:] - corners[..., :2]
        reach = sizes.repeat(1, 1, 2) / 2 * self.box_noise
        # Corners of the second kind move by at least their reach.
        more = torch.arange(self.num_kinds, device=corners.device)[:, None, None, None]
        moved = (corners + noise.sign * (noise.amount + more) * reach).clamp(0, 1)
        return box_convert(moved, "xyxy", "cxcywh")


def _in_a_row(x: Tensor) -> Tensor:
    """(G, P, B, M, ...) -> (B, G P M, ...)."""
    return x.movedim(2, 0).flatten(1, 3)


def _apart(shape: tuple[int, ...], num_detecting: int, device: torch.device) -> Tensor:
    """(D + N, D + N) bool: a denoising query is seen by its own group alone."""
    groups, kinds, _, slots = shape
    group = torch.arange(groups, device=device).repeat_interleave(kinds * slots)
    group = torch.cat([group, group.new_full((num_detecting,), -1)])
    return (group >= 0) & (group != group[:, None])
