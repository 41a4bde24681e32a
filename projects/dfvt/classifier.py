"""DFvT as ImageNet classifier, for checking released weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .network import DFvTNetwork, init_weights

__all__ = ["DFvTClassifier"]


class DFvTClassifier(nn.Module):
    """Doubly-Fused ViT (Gao et al., ECCV 2022) with its classification head.

    Unlike the detection backbone it does not shift the windows of a map that is no larger than
    one, in either direction. The released weights belong to squares of 224 pixels; multiples of
    224 divide into whole windows, other sizes are padded as in the backbone.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 2, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        num_classes: int = 1000,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        window_size: int = 7,
        norm: str = "BN",
    ):
        """
        Args:
            num_classes: of the head.
            embed_dim, depths, num_heads, mlp_ratio, drop_path_rate, window_size, norm: see
                :class:`dfvt.DFvTBackbone`.
        """
        super().__init__()
        self.network = DFvTNetwork(
            embed_dim,
            depths,
            num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            window_size=window_size,
            always_shift=False,
            use_checkpoint=False,
            norm=norm,
        )
        channels = self.network.channels[-1]
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)
        self.apply(init_weights)

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, 8C): the normalised tokens' mean."""
        return self.norm(self.network(images)[-1].context).mean(dim=(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> logits (B, num_classes)."""
        return self.head(self.pooled(images))
