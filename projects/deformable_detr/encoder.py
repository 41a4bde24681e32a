"""The encoder: every cell of all levels attends to a few points around it on all levels.

Letters: B images, C channels, L levels, T tokens (see :mod:`.positions`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import Execution, FeatureMaps

from .attention import DeformableAttention, FeedForward
from .positions import (
    TEMPERATURE,
    cell_centers,
    coordinate_type,
    mask_positions,
    to_maps,
    to_tokens,
)

__all__ = ["DeformableEncoder", "EncoderLayer"]


class EncoderLayer(nn.Module):
    """x <- LN(x + DeformableAttention(x + p, x)), then the feed-forward network."""

    def __init__(self, attention: DeformableAttention, ffn: FeedForward, dropout: float):
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(attention.output_proj.out_features)
        self.ffn = ffn

    def forward(
        self, tokens: Tensor, position: Tensor, references: Tensor, maps: FeatureMaps
    ) -> Tensor:
        """
        Args:
            tokens, position: (B, T, C).
            references: (B, T, L, 2) where a token lies on each level, as shares of the padded map.
            maps: of the sizes of the tokens' maps.
        """
        attended = self.attention(tokens + position, references, to_maps(tokens, maps))
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DeformableEncoder(nn.Module):
    """Deformable attention of the backbone's maps to one another; the defaults are released."""

    def __init__(
        self,
        channels: int = 256,
        *,
        num_layers: int = 6,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 1024,
        dropout: float = 0.1,
        position_temperature: float = TEMPERATURE,
        position_offset: float = -0.5,
        execution: Execution | None = None,
    ):
        """
        Args:
            channels: C, a multiple of 4.
            num_layers: of the encoder.
            num_levels: L.
            num_heads, num_points: of the attention.
            ffn_channels: hidden width of the FFN.
            dropout: of attention and FFN.
            position_temperature, position_offset: of the tokens' sine codes, see
                :func:`~deformable_detr.positions.mask_positions`. Weights do not tell them.
            execution: how to compute.
        """
        super().__init__()
        if channels % 4:
            raise UserError(f"channels must be a multiple of 4, got {channels}")
        self.position_temperature = position_temperature
        self.position_offset = position_offset
        self.execution = execution or Execution()
        self.level_embedding = nn.Parameter(torch.empty(num_levels, channels))
        nn.init.normal_(self.level_embedding)
        self.layers = nn.ModuleList(
            EncoderLayer(
                DeformableAttention(
                    channels,
                    num_heads=num_heads,
                    num_levels=num_levels,
                    num_points=num_points,
                    execution=execution,
                ),
                FeedForward(channels, ffn_channels, dropout),
                dropout,
            )
            for _ in range(num_layers)
        )

    def forward(self, maps: FeatureMaps) -> FeatureMaps:
        """
        Args:
            maps: L levels with C channels.

        Returns:
            maps of the same sizes, the memory that queries look at.

        Raises:
            UserError: another number of levels.
        """
        num_levels, channels = self.level_embedding.shape
        if len(maps.levels) != num_levels:
            raise UserError(
                f"the encoder is built for {num_levels} levels, but the backbone yields "
                f"{len(maps.levels)}: set model.encoder.num_levels and model.decoder.num_levels"
            )
        tokens = to_tokens(maps.levels)
        dtype = coordinate_type(maps)
        position = to_tokens(
            [
                mask_positions(
                    mask,
                    channels,
                    dtype,
                    temperature=self.position_temperature,
                    offset=self.position_offset,
                )
                + embedding[:, None, None]
                for mask, embedding in zip(maps.padding_masks, self.level_embedding)
            ]
        )
        ratios = maps.valid_ratios.to(dtype)
        references = cell_centers(maps)[:, :, None] * ratios[:, None]
        for layer in self.layers:
            arguments = tokens, position, references, maps
            if self.execution.checkpoint and torch.is_grad_enabled():
                tokens = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                tokens = layer(*arguments)
        return to_maps(tokens, maps)
