"""Stem and the four stages, which the detection backbone and the classifier share.

Source: "Doubly-Fused ViT: Fuse Information from Vision Transformer Doubly with Local
Representation" (Gao et al., ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detection_toolkit.errors import UserError

from .layers import FusedBlock, SpaceToDepthModule, conv_norm, shift_mask

__all__ = ["NUM_STAGES", "SIZE_DIVISIBILITY", "STEM_STRIDE", "DFvTNetwork", "StageFeatures"]

NUM_STAGES = 4
STEM_STRIDE = 4
SIZE_DIVISIBILITY = 32


class StageFeatures(NamedTuple):
    """What one of stages i = 1..4 with C_i channels has to offer."""

    context: Tensor
    """(B, h, w, C_i): tokens of the last block; half the size of ``local``, equal in stage 4."""
    local: Tensor
    """(B, C_i, H, W): the convolutional trunk."""


class Stem(nn.Module):
    """Two convolutions of stride 2. Their biases are of no use ahead of a norm, but have trained
    values."""

    def __init__(self, channels: int, *, norm: str):
        super().__init__()
        self.conv1 = conv_norm(3, channels // 2, 3, stride=2, bias=True, norm=norm)
        self.conv2 = conv_norm(channels // 2, channels, 3, stride=2, bias=True, norm=norm)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 4H, 4W) -> (B, C, H, W)."""
        return self.conv2(self.conv1(images))


class Stage(nn.Module):
    """One stage: local trunk, fused down-sampling, transformer blocks.

    The last stage neither halves the size nor has a spatial module: there the blocks are given the
    stage's input for spatial tokens.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        drop_path_rates: Sequence[float],
        window_size: int,
        mlp_ratio: float,
        is_last: bool,
        always_shift: bool,
        use_checkpoint: bool,
        norm: str,
    ):
        super().__init__()
        self.window_size = window_size
        self.always_shift = always_shift
        self.use_checkpoint = use_checkpoint
        self.local = nn.Sequential(
            conv_norm(channels, channels, 1, norm=norm),
            conv_norm(channels, channels, 3, groups=channels, norm=norm),
            conv_norm(channels, channels, 3, groups=channels, norm=norm),
        )
        stride = 1 if is_last else 2
        self.reduce = nn.Sequential(
            conv_norm(channels, channels, 3, stride=stride, groups=channels, norm=norm),
            conv_norm(channels, channels, 1, norm=norm),
        )
        self.pool = nn.Identity() if is_last else nn.MaxPool2d(3, stride=2, padding=1)
        self.spatial = None if is_last else SpaceToDepthModule(channels, norm=norm)
        self.blocks = nn.ModuleList(
            FusedBlock(
                channels,
                num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_path_rate=rate,
            )
            for rate in drop_path_rates
        )

    def forward(self, x: Tensor) -> StageFeatures:
        """
        Args:
            x: (B, C, H, W); H and W even unless this is the last stage.
        """
        local = self.local(x)
        tokens = (self.pool(x) + self.reduce(local)).permute(0, 2, 3, 1)
        spatial = x if self.spatial is None else self.spatial(local)
        spatial = spatial.permute(0, 2, 3, 1)
        mask = self._shift_mask(tokens)
        for i, block in enumerate(self.blocks):
            block_mask = mask if i % 2 else None
            if self.use_checkpoint and self.training:
                # Blocks alone: they hold no batch norm, whose statistics a second pass would
                # update a second time.
                tokens = checkpoint(block, tokens, spatial, block_mask, use_reentrant=False)
            else:
                tokens = block(tokens, spatial, block_mask)
        return StageFeatures(tokens, local)

    def _shift_mask(self, tokens: Tensor) -> Tensor | None:
        size = self.window_size
        height, width = tokens.shape[1:3]
        fits_a_window = min(height, width) <= size
        if len(self.blocks) < 2 or (fits_a_window and not self.always_shift):
            return None
        return shift_mask(
            height + -height % size,
            width + -width % size,
            window_size=size,
            device=tokens.device,
        )


class DFvTNetwork(nn.Module):
    """Stem and stages i = 1..4 with C * 2**(i-1) channels."""

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        mlp_ratio: float,
        drop_path_rate: float,
        window_size: int,
        always_shift: bool,
        use_checkpoint: bool,
        norm: str,
    ):
        """
        Args:
            embed_dim: C.
            depths: blocks of each stage; every second one has shifted windows.
            num_heads: attention heads of each stage.
            mlp_ratio: hidden width of a block's MLP over its channels.
            drop_path_rate: probability that the last block's branches are skipped for an image;
                it grows linearly from zero at the first block.
            window_size: tokens on a window's side; odd or even.
            always_shift: shift the windows also where a map is no larger than one. Detection
                does, the classifier does not.
            use_checkpoint: recompute the blocks in the backward pass to save memory.
            norm: Detectron2's name of the convolutions' norm, "BN" or "SyncBN".

        Raises:
            ValueError: settings that do not describe four stages.
        """
        super().__init__()
        for name, values in (("depths", depths), ("num_heads", num_heads)):
            if len(values) != NUM_STAGES:
                raise UserError(f"{name}={list(values)} must have {NUM_STAGES} numbers")
        if min(depths) < 1:
            raise UserError(f"depths={list(depths)}: a stage needs a block")
        if embed_dim < 16 or embed_dim % 2:
            raise UserError(f"embed_dim={embed_dim} must be even and at least 16")
        if window_size < 1:
            raise UserError(f"window_size={window_size} must be at least 1")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"drop_path_rate={drop_path_rate} is not in [0, 1)")
        self.channels = [embed_dim * 2**i for i in range(NUM_STAGES)]
        self.stem = Stem(embed_dim, norm=norm)
        self.stages = nn.ModuleList()
        num_blocks = sum(depths)
        rates = [drop_path_rate * k / max(1, num_blocks - 1) for k in range(num_blocks)]
        for i, (channels, depth, heads) in enumerate(zip(self.channels, depths, num_heads)):
            first = sum(depths[:i])
            self.stages.append(
                Stage(
                    channels,
                    heads,
                    drop_path_rates=rates[first : first + depth],
                    window_size=window_size,
                    mlp_ratio=mlp_ratio,
                    is_last=i == NUM_STAGES - 1,
                    always_shift=always_shift,
                    use_checkpoint=use_checkpoint,
                    norm=norm,
                )
            )
        self.widen = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 2 * c, bias=False))
            for c in self.channels[:-1]
        )

    def forward(self, images: Tensor) -> list[StageFeatures]:
        """
        Args:
            images: (B, 3, H, W), normalised. Zeros are added at the bottom and right until both
                sides are multiples of 32, as the maps must be even.

        Raises:
            ValueError: a side is shorter than the stem's stride.
        """
        height, width = images.shape[-2:]
        if min(height, width) < STEM_STRIDE:
            raise UserError(
                f"an image of {height}x{width} pixels is smaller than the stride of the stem, "
                f"{STEM_STRIDE}: DFvT needs at least {STEM_STRIDE}x{STEM_STRIDE}"
            )
        images = F.pad(images, (0, -width % SIZE_DIVISIBILITY, 0, -height % SIZE_DIVISIBILITY))
        x = self.stem(images)
        features = []
        for i, stage in enumerate(self.stages):
            features.append(stage(x))
            if i < len(self.widen):
                x = self.widen[i](features[-1].context).permute(0, 3, 1, 2)
        return features


def init_weights(module: nn.Module) -> None:
    """The authors' initial values; to be given to ``Module.apply``.

    Biases of the stem's convolutions keep PyTorch's.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
