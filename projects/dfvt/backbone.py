"""DFvT as a Detectron2 backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from detection_toolkit.errors import UserError

from .network import (
    NUM_STAGES,
    SIZE_DIVISIBILITY,
    STEM_STRIDE,
    DFvTNetwork,
    StageFeatures,
    init_weights,
)
from .variants import VARIANTS

__all__ = ["DFvTBackbone", "add_dfvt_config", "build_dfvt_fpn_backbone"]

FEATURES = tuple(f"res{i + 2}" for i in range(NUM_STAGES))


class OutputFusion(nn.Module):
    """From what a stage offers to a map at the stage's own stride.

    The context, normalised and repeated to twice the size, is joined with the local trunk; in the
    last stage, which does not halve the size, it is the map.
    """

    def __init__(self, channels: int, *, is_last: bool):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fuse = None if is_last else Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, features: StageFeatures) -> Tensor:
        """(B, C, H, W)."""
        context = self.norm(features.context).permute(0, 3, 1, 2)
        if self.fuse is None:
            return context.contiguous()
        context = F.interpolate(context, scale_factor=2.0, mode="nearest")
        return self.fuse(torch.cat([context, features.local], dim=1))


@BACKBONE_REGISTRY.register()
class DFvTBackbone(Backbone):
    """Doubly-Fused ViT (Gao et al., ECCV 2022) for detection; the defaults are DFvT-S.

    The maps ``res2`` .. ``res5`` have strides 4, 8, 16, 32 and C, 2C, 4C, 8C channels. Any image
    size from 4x4 on is fine: what is no multiple of 32 is padded at the bottom and right, and the
    maps are those of the padded image, as if Detectron2 had padded it (``size_divisibility``).
    """

    @configurable
    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 2, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        window_size: int = 7,
        out_features: Sequence[str] = FEATURES,
        use_checkpoint: bool = False,
        norm: str = "BN",
    ):
        """
        Args:
            embed_dim: C, channels of the first map.
            depths: transformer blocks of each stage.
            num_heads: attention heads of each stage.
            mlp_ratio: hidden width of a block's MLP over its channels.
            drop_path_rate: of the last block; it grows linearly from zero at the first.
            window_size: tokens on a window's side.
            out_features: the maps to return, res5 among them.
            use_checkpoint: recompute the blocks in the backward pass to save memory.
            norm: of the convolutions: "BN" as released, "SyncBN" or "FrozenBN".

        Raises:
            ValueError: settings that describe no network, or an unknown map.
        """
        super().__init__()
        if not set(out_features) <= set(FEATURES) or FEATURES[-1] not in out_features:
            # Without the last map the last stage would have parameters but no gradient.
            raise UserError(
                f"out_features={list(out_features)}: choose from {', '.join(FEATURES)}, "
                f"{FEATURES[-1]} among them"
            )
        self.network = DFvTNetwork(
            embed_dim,
            depths,
            num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            window_size=window_size,
            always_shift=True,
            use_checkpoint=use_checkpoint,
            norm=norm,
        )
        self._out_features = [name for name in FEATURES if name in out_features]
        self._out_feature_channels = dict(zip(FEATURES, self.network.channels))
        self._out_feature_strides = {name: STEM_STRIDE * 2**i for i, name in enumerate(FEATURES)}
        self.outputs = nn.ModuleDict(
            {
                name: OutputFusion(self._out_feature_channels[name], is_last=name == FEATURES[-1])
                for name in self._out_features
            }
        )
        self.apply(init_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from ``cfg.MODEL.DFVT``, for Detectron2's ``build_backbone``.

        Raises:
            ValueError: the images do not have three channels.
        """
        if input_shape.channels != 3:
            raise UserError(f"DFvT takes images of 3 channels, not {input_shape.channels}")
        return {name.lower(): value for name, value in cfg.MODEL.DFVT.items()}

    @property
    def size_divisibility(self) -> int:
        return SIZE_DIVISIBILITY

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            map name -> (B, C_i, ceil(H / 32) * 32 / stride, ceil(W / 32) * 32 / stride).

        Raises:
            ValueError: a side is shorter than 4 pixels.
        """
        features = dict(zip(FEATURES, self.network(images)))
        return {name: output(features[name]) for name, output in self.outputs.items()}


def add_dfvt_config(cfg: CfgNode) -> None:
    """Add ``cfg.MODEL.DFVT``, the arguments of :class:`DFvTBackbone` in capitals, for DFvT-S.

    Only for Detectron2's yaml configs; a LazyConfig names the class itself.
    """
    arguments = dict(VARIANTS["small"], drop_path_rate=0.1, window_size=7, out_features=FEATURES)
    arguments.update(use_checkpoint=False, norm="BN")
    node = {k.upper(): list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    cfg.MODEL.DFVT = CfgNode(node)


@BACKBONE_REGISTRY.register()
def build_dfvt_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """DFvT with the FPN of ``cfg.MODEL.FPN`` and a fifth level, as Detectron2 has for ResNet."""
    return FPN(
        bottom_up=DFvTBackbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
