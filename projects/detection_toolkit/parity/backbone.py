"""Cases of a backbone with its neck."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from ..checkpoint.official import convert_official_state_dict
from ..errors import UserError
from ..modeling import FrozenStatsBatchNorm2d, SharedNormChannelMapper
from ..modeling.backbones import DeformBottleneckBlock, SwinBackbone
from .case import Case, Config, Inputs, Settings
from .compare import Quantity, expand, value
from .runner import CASE_KINDS, CaseKind

__all__ = ["BackboneCase"]

_BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@CASE_KINDS.register()
class BackboneCase(CaseKind):
    """A normalised image batch, and the maps of the backbone and of the neck."""

    title = "backbone"

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config" in case.names and {"backbone", "neck_out"} <= set(case.config())

    def quantities(self) -> Iterator[Quantity]:
        levels = range(len(self.case.config()["neck_in"]))
        for part in ("backbone", "neck"):
            maps = {str(i): (value, lambda run, part, i=i: run[part][i]) for i in levels}
            yield from expand(maps, f"{part}/", part)

    def compute(self, settings: Settings) -> dict[str, list[Tensor]]:
        inputs, config = Inputs(self.case, settings), self.case.config()
        bottom_up = build_backbone(config["backbone"])
        neck = SharedNormChannelMapper(
            bottom_up, list(bottom_up.output_shape()), int(config["neck_out"])
        )
        model = nn.ModuleDict({"backbone": neck})
        weights = convert_official_state_dict(inputs.weights("weight/"), model)
        model.load_state_dict(weights.model)
        model.to(settings.device, settings.dtype).eval()
        with torch.no_grad():
            image = inputs.tensor("image")
            maps = {"backbone": neck.bottom_up(image), "neck": neck(image)}
        return {part: list(found.values()) for part, found in maps.items()}


def build_backbone(config: Config) -> Backbone:
    """The backbone that a block of official settings describes.

    Raises:
        UserError: a setting is missing, or a type or depth unknown.
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
