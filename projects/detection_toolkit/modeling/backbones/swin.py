"""Detectron2's Swin Transformer, free of its dependency on timm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

__all__ = ["SwinBackbone"]


class _LinspaceOnHost(TorchFunctionMode):
    """Detectron2 reads its drop path schedule back from a tensor, which the meta device cannot."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@BACKBONE_REGISTRY.register()
class SwinBackbone(SwinTransformer):
    """Swin Transformer (Liu et al., ICCV 2021); the defaults are Swin-S, window 7.

    It is Detectron2's ``SwinTransformer`` with torchvision's ``StochasticDepth`` in place of
    timm's ``DropPath``, and with ``size_divisibility``, which Detectron2's raises for. The maps
    ``p0`` .. ``p3`` have strides 4, 8, 16 and 32; each passes through a LayerNorm of its own.
    Any image size is fine: patches, windows and patch merging pad at the bottom and right.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ):
        """
        Args:
            embed_dim: channels of the first map; each later one has twice as many.
            depths: blocks of each stage.
            num_heads: attention heads of each stage.
            window_size: tokens on a window's side.
            mlp_ratio: hidden width of a block's MLP over its channels.
            drop_path_rate: probability that the last block's branches are skipped for an image;
                it grows linearly from zero at the first block.
            patch_norm: a LayerNorm after the patch embedding.
            out_indices: stages whose maps are returned.
            frozen_stages: -1 freezes nothing; see Detectron2.
            use_checkpoint: recompute activations in the backward pass to save memory.
        """
        depths = list(depths)
        with _LinspaceOnHost():
            super().__init__(
                embed_dim=embed_dim,
                depths=depths,
                num_heads=list(num_heads),
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_path_rate=0.0,
                patch_norm=patch_norm,
                out_indices=tuple(out_indices),
                frozen_stages=frozen_stages,
                use_checkpoint=use_checkpoint,
            )
        blocks = [block for layer in self.layers for block in layer.blocks]
        for i, block in enumerate(blocks):
            rate = drop_path_rate * i / max(1, len(blocks) - 1)
            if rate > 0:
                block.drop_path = StochasticDepth(rate, mode="row")

    @property
    def size_divisibility(self) -> int:
        return 32
