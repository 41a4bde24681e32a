"""One decoder stage: attention, sampling, mixing, FFN, class and box.

Letters: B images, N queries, C channels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Queries, StageOutput

from .boxes import xyzr_to_box, xyzr_to_size
from .filter_bank import FilterBank

__all__ = ["DecoderStage", "FeedForward", "PredictionTower", "refine_by_box_size"]


class FeedForward(nn.Module):
    """q <- LN(q + Linear(ReLU(Linear(q))))."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.norm(queries + self.linear2(self.linear1(queries).relu()))


class PredictionTower(nn.Module):
    """Linear(ReLU(LN(Linear(q)))): (B, N, C) -> (B, N, out)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.hidden = nn.Linear(channels, channels, bias=True)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, out_channels)
        nn.init.xavier_uniform_(self.hidden.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, queries: Tensor) -> Tensor:
        return self.out(self.norm(self.hidden(queries)).relu())


def refine_by_box_size(xyzr: Tensor, delta: Tensor) -> Tensor:
    """Move centres by delta times the box's width and height, z and r by delta itself.

    Args:
        xyzr: (..., 4) input geometry of the stage.
        delta: (..., 4).
    """
    center = xyzr[..., :2] + delta[..., :2] * xyzr_to_size(xyzr)
    return torch.cat([center, xyzr[..., 2:] + delta[..., 2:]], dim=-1)


class DecoderStage(nn.Module):
    """A stage never knows its neighbours; what it shares with them is in the filter bank."""

    def __init__(
        self,
        *,
        attention: nn.Module,
        sampling: nn.Module,
        mixing: nn.Module,
        ffn: nn.Module,
        channels: int,
        num_classes: int,
        refine=refine_by_box_size,
        prior_probability: float = 0.01,
    ):
        """
        Args:
            attention: (queries, xyzr) -> queries.
            sampling: (queries, xyzr, maps) -> sampled features.
            mixing: (queries, sampled features, bank) -> (queries, bank).
            ffn: queries -> queries.
            channels: C.
            num_classes: K.
            refine: (xyzr, delta) -> xyzr.
            prior_probability: score that every class starts with.
        """
        super().__init__()
        self.attention = attention
        self.sampling = sampling
        self.mixing = mixing
        self.ffn = ffn
        self.refine = refine
        self.class_tower = PredictionTower(channels, num_classes)
        self.box_tower = PredictionTower(channels, 4)
        nn.init.constant_(
            self.class_tower.out.bias, -math.log((1 - prior_probability) / prior_probability)
        )
        nn.init.zeros_(self.box_tower.out.weight)
        nn.init.zeros_(self.box_tower.out.bias)

    def forward(
        self, queries: Queries, maps: FeatureMaps, bank: FilterBank | None
    ) -> tuple[StageOutput, FilterBank | None]:
        """
        Args:
            queries: content (B, N, C) and geometry (B, N, 4) xyzr, through which no gradient goes.
            maps: of the images.
            bank: filters of earlier stages; None where no stage shares any.

        Returns:
            the predictions, and the bank with this stage's filters added.
        """
        content, xyzr = queries.content, queries.geometry.detach()
        content = self.attention(content, xyzr)
        sampled = self.sampling(content, xyzr, maps)
        content, bank = self.mixing(content, sampled, bank)
        content = self.ffn(content)
        logits = self.class_tower(content)
        # Geometry stays in the precision of xyzr under autocast: half precision has 8 to 11
        # bits, a coordinate needs more.
        refined = self.refine(xyzr, self.box_tower(content).to(xyzr.dtype))
        return StageOutput(logits, xyzr_to_box(refined), Queries(content, refined)), bank
