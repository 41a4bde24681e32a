"""Cases of a backbone with its neck."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, BottleneckBlock, ResNet
from torch import nn

from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
)
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FrozenStatsBatchNorm2d, SharedNormChannelMapper
from detection_toolkit.modeling.backbones import DeformBottleneckBlock, SwinBackbone

from .case import Case, CaseError, Inputs, Settings
from .compare import Measurement, value
from .runner import CaseKind, Layout, register_kind

__all__ = ["BackboneCase"]

_BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@register_kind
class BackboneCase(CaseKind):
    """A normalised image batch, and the maps of the backbone and of the neck."""

    title = "backbone"

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and {"backbone", "neck_out"} <= set(case.json())

    def layout(self) -> Layout:
        levels = range(len(self.case.json()["neck_in"]))
        return Layout(
            {"image"}, {f"{part}/{i}" for part in ("backbone", "neck") for i in levels}, set()
        )

    def measure(self, settings: Settings) -> Iterator[Measurement]:
        inputs = Inputs(self.case, settings)
        config = self.case.json()
        try:
            bottom_up = build_backbone(config["backbone"])
            neck = SharedNormChannelMapper(
                bottom_up, list(bottom_up.output_shape()), int(config["neck_out"])
            )
            model = nn.ModuleDict({"backbone": neck})
            weights = convert_official_state_dict(inputs.weights(), model)
        except (CheckpointMismatchError, KeyError, ValueError) as error:
            raise CaseError(f"{self.case.path}: {error}") from error
        model.load_state_dict(weights.model)
        model.to(settings.device, settings.dtype).eval()
        with torch.no_grad():
            image = inputs.tensor("image")
            maps = neck.bottom_up(image)
            projected = neck(image)
        for part, found in (("backbone", maps), ("neck", projected)):
            for i, level in enumerate(found.values()):
                name = f"{part}/{i}"
                yield Measurement(name, level, self.case.array(name), value(settings.atol))


def build_backbone(config: Mapping[str, Any]) -> Backbone:
    """The backbone that a block of official settings describes.

    Raises:
        KeyError: a setting is missing.
        ValueError: an unknown type or depth.
    """
    kind = config["type"]
    if kind == "SwinTransformer":
        return SwinBackbone(
            config["embed_dims"],
            config["depths"],
            config["num_heads"],
            window_size=config["window_size"],
            mlp_ratio=config["mlp_ratio"],
            drop_path_rate=config["drop_path_rate"],
            patch_norm=config["patch_norm"],
        )
    if kind not in ("ResNet", "ResNeXt"):
        raise UserError(f"backbone type {kind!r} is none of ResNet, ResNeXt, SwinTransformer")
    if config["depth"] not in _BLOCKS_PER_STAGE:
        raise UserError(f"no ResNet of depth {config['depth']} is known")
    base, groups = config["base_channels"], config.get("groups", 1)
    channels = config["stem_channels"]
    stem = BasicStem(in_channels=3, out_channels=channels, norm=FrozenStatsBatchNorm2d)
    with_dcn = config.get("stage_with_dcn", [False] * 4)
    stages = []
    for i, blocks in enumerate(_BLOCKS_PER_STAGE[config["depth"]]):
        planes = base * 2**i
        width = planes
        if kind == "ResNeXt":
            width = planes * config["base_width"] // base * groups
        stages.append(
            ResNet.make_stage(
                DeformBottleneckBlock if with_dcn[i] else BottleneckBlock,
                blocks,
                in_channels=channels,
                out_channels=4 * planes,
                bottleneck_channels=width,
                stride_per_block=[1 if i == 0 else 2] + [1] * (blocks - 1),
                num_groups=groups,
                norm=FrozenStatsBatchNorm2d,
            )
        )
        channels = 4 * planes
    return ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"])
