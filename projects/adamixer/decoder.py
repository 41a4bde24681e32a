"""AdaMixer's query head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import QUERY_HEADS, CascadeDecoder, Execution, Route
from stageinteractor import DecoderStage, IoFBiasedSelfAttention
from stageinteractor.stage import FeedForward

from .mixing import AdaptiveMixing
from .sampling import AdaptiveSampling

__all__ = ["AdaMixerDecoder", "refine_by_scale"]


def refine_by_scale(xyzr: Tensor, delta: Tensor) -> Tensor:
    """Move centres by delta times the scale 2^z in x and in y, z and r by delta itself.

    Args:
        xyzr: (..., 4) input geometry of the stage.
        delta: (..., 4).
    """
    center = xyzr[..., :2] + delta[..., :2] * torch.exp2(xyzr[..., 2:3])
    return torch.cat([center, xyzr[..., 2:] + delta[..., 2:]], dim=-1)


@QUERY_HEADS.register()
class AdaMixerDecoder(CascadeDecoder):
    """Stages of adaptive 3-D sampling and adaptive mixing; the defaults are released."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        groups: int = 4,
        points: int = 32,
        out_points: int = 128,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            num_classes: K.
            num_stages: S.
            channels: C.
            num_heads: heads of the self-attention.
            ffn_channels: hidden width of the FFN.
            groups: G of sampling and mixing.
            points: sampling points of a group.
            out_points: spatial filters of a group.
            execution, route: see :class:`~detection_toolkit.modeling.CascadeDecoder`.

        Raises:
            ValueError: sizes that do not fit one another.
        """
        if num_stages < 1:
            raise UserError(f"num_stages must be at least 1, got {num_stages}")
        super().__init__(
            [
                DecoderStage(
                    attention=_attention(channels, num_heads),
                    sampling=AdaptiveSampling(channels, groups=groups, points=points),
                    mixing=AdaptiveMixing(
                        channels, groups=groups, points=points, out_points=out_points
                    ),
                    ffn=FeedForward(channels, ffn_channels),
                    channels=channels,
                    num_classes=num_classes,
                    refine=refine_by_scale,
                )
                for _ in range(num_stages)
            ],
            execution=execution,
            route=route,
        )


def _attention(channels: int, num_heads: int) -> IoFBiasedSelfAttention:
    attention = IoFBiasedSelfAttention(channels, num_heads)
    # AdaMixer draws this bias as that of any linear layer; PyTorch's attention starts it at zero.
    bound = channels**-0.5
    nn.init.uniform_(attention.attention.out_proj.bias, -bound, bound)
    return attention
