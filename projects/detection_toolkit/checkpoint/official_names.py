"""Names of the official checkpoints and ours, as pairs of templates that work both ways.

In a template ``{x}`` stands for a number and a final ``*`` for any rest. Each pair may carry a
change of the tensor itself, where the two sides order its elements differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ADAMIXER",
    "FORMATS",
    "STAGEINTERACTOR",
    "OfficialFormat",
    "Rule",
    "whole_image_boxes",
]

Change = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """One pair of names."""

    official: str
    ours: str
    to_ours: Change | None = None
    to_official: Change | None = None


class _Renamer:
    """Applies the templates in one direction."""

    def __init__(self, pairs: Iterable[tuple[str, str, Change | None]]):
        self._entries = [
            (_pattern(source), target.replace("*", "{rest}"), change)
            for source, target, change in pairs
        ]

    def __call__(self, name: str) -> tuple[str, Change | None] | None:
        for pattern, target, change in self._entries:
            match = pattern.fullmatch(name)
            if match:
                return target.format(**match.groupdict()), change
        return None


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\*", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", pattern))


class OfficialFormat:
    """How one released detector names its tensors.

    A tensor is *unused* if the official network holds it without any effect on its output. Ours
    has no such tensor, so a conversion sets it aside, and the way back restores it or, if it is
    lost, fills in the value that the official network starts from.
    """

    def __init__(
        self,
        name: str,
        rules: Sequence[Rule],
        *,
        mark: str,
        our_mark: str,
        unused: Sequence[str],
        initial_unused: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ):
        """
        Args:
            name: of the detector, for messages.
            rules: pairs of names.
            mark, our_mark: regular expressions that only this detector's names match.
            unused: templates of official names of unused tensors.
            initial_unused: our weights -> the unused tensors as initialised, by official name.
        """
        self.name = name
        self.mark = re.compile(mark)
        self.our_mark = re.compile(our_mark)
        self.initial_unused = initial_unused
        self.to_ours = _Renamer((r.official, r.ours, r.to_ours) for r in rules)
        self.to_official = _Renamer((r.ours, r.official, r.to_official) for r in rules)
        self._unused = [_pattern(template) for template in unused]

    def is_unused(self, official_name: str) -> bool:
        """Whether the official network holds this tensor without using it."""
        return any(pattern.fullmatch(official_name) for pattern in self._unused)


def _swap_inner(weight: Tensor) -> Tensor:
    # Both sides number the four neighbours with two bits; they differ in which bit is the row.
    return weight[..., [0, 2, 1, 3]]


def merge_neighbour_major(weight: Tensor) -> Tensor:
    """Patch merging's 4C axis (the last) from the official order to Swin's own.

    The official network unfolds: channel-major, neighbours (0,0), (0,1), (1,0), (1,1). The
    original one concatenates: neighbour-major, neighbours (0,0), (1,0), (0,1), (1,1).
    """
    by_channel = _swap_inner(weight.unflatten(-1, (-1, 4)))
    return by_channel.transpose(-1, -2).flatten(-2).contiguous()


def merge_channel_major(weight: Tensor) -> Tensor:
    """Inverse of :func:`merge_neighbour_major`."""
    by_neighbour = weight.unflatten(-1, (4, -1))
    return _swap_inner(by_neighbour.transpose(-1, -2)).flatten(-2).contiguous()


def _resnet_rules() -> list[Rule]:
    pairs = [("conv1.weight", "stem.conv1.weight"), ("bn1.*", "stem.conv1.norm.*")]
    for stage in range(1, 5):
        official, ours = f"layer{stage}.{{block}}.", f"res{stage + 1}.{{block}}."
        pairs += [
            (official + "conv{conv}.weight", ours + "conv{conv}.weight"),
            (official + "conv{conv}.conv_offset.*", ours + "conv{conv}.offset.*"),
            (official + "bn{conv}.*", ours + "conv{conv}.norm.*"),
            (official + "downsample.0.weight", ours + "shortcut.weight"),
            (official + "downsample.1.*", ours + "shortcut.norm.*"),
        ]
    return [Rule(f"backbone.{a}", f"backbone.bottom_up.{b}") for a, b in pairs]


def _swin_rules() -> list[Rule]:
    official, ours = "backbone.stages.{i}.", "backbone.bottom_up.layers.{i}."
    block, our_block = official + "blocks.{j}.", ours + "blocks.{j}."
    return [
        Rule("backbone.patch_embed.projection.*", "backbone.bottom_up.patch_embed.proj.*"),
        Rule("backbone.patch_embed.norm.*", "backbone.bottom_up.patch_embed.norm.*"),
        Rule(block + "norm{k}.*", our_block + "norm{k}.*"),
        Rule(block + "attn.w_msa.*", our_block + "attn.*"),
        Rule(block + "ffn.layers.0.0.*", our_block + "mlp.fc1.*"),
        Rule(block + "ffn.layers.1.*", our_block + "mlp.fc2.*"),
        Rule(
            official + "downsample.*",
            ours + "downsample.*",
            merge_neighbour_major,
            merge_channel_major,
        ),
        Rule("backbone.norm{i}.*", "backbone.bottom_up.norm{i}.*"),
    ]


def _shared_rules() -> list[Rule]:
    """Everything around sampling and mixing, which the detectors of the family share."""
    official, ours = "roi_head.bbox_head.{t}.", "decoder.stages.{t}."
    head = [
        ("iof_tau", "attention.tau"),
        ("attention.attn.*", "attention.attention.*"),
        ("attention_norm.*", "attention.norm.*"),
        ("ffn.layers.0.0.*", "ffn.linear1.*"),
        ("ffn.layers.1.*", "ffn.linear2.*"),
        ("ffn_norm.*", "ffn.norm.*"),
        ("cls_fcs.0.*", "class_tower.hidden.*"),
        ("cls_fcs.1.*", "class_tower.norm.*"),
        ("fc_cls.*", "class_tower.out.*"),
        ("reg_fcs.0.*", "box_tower.hidden.*"),
        ("reg_fcs.1.*", "box_tower.norm.*"),
        ("fc_reg.*", "box_tower.out.*"),
    ]
    return [
        *_resnet_rules(),
        *_swin_rules(),
        Rule("neck.lateral_convs.{l}.conv.*", "backbone.projections.{l}.*"),
        Rule("neck.gn_out.*", "backbone.norm.*"),
        Rule("rpn_head.init_content_features.weight", "initial_queries.content.weight"),
        *(Rule(official + a, ours + b) for a, b in head),
    ]


def _stage_rules(pairs: Sequence[tuple[str, str]]) -> list[Rule]:
    return [
        Rule("roi_head.bbox_head.{t}." + official, "decoder.stages.{t}." + ours)
        for official, ours in pairs
    ]


def whole_image_boxes(weights: Mapping[str, Tensor]) -> Tensor:
    """(N, 4) cxcywh, as shares of the image, of N queries that begin with all of it."""
    content = weights["initial_queries.content.weight"]
    return content.new_tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(content), 1)


def _stages(weights: Mapping[str, Tensor]) -> list[int]:
    pattern = re.compile(r"decoder\.stages\.(\d+)\.attention\.tau")
    return sorted(int(m.group(1)) for m in map(pattern.fullmatch, weights) if m)


def _stageinteractor_unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query boxes are the constant (0.5, 0.5, 1, 1); the score layers start at zero, and the
    statistics as those of any fresh batch norm (mean 0, variance 1, no batch seen)."""
    unused = {"rpn_head.init_proposal_bboxes": whole_image_boxes(weights)}
    channels = weights["initial_queries.content.weight"].shape[1]
    for t in _stages(weights):
        official, ours = f"roi_head.bbox_head.{t}.", f"decoder.stages.{t}."
        statistics = official + "iou_snyc_statistics."
        unused[statistics + "running_mean"] = torch.zeros(1)
        unused[statistics + "running_var"] = torch.ones(1)
        unused[statistics + "num_batches_tracked"] = torch.tensor(0)
        base = len(weights[ours + "sampling.base_offset.bias"]) // 3  # groups x base points
        sub = len(weights[ours + "sampling.sub_offset.bias"]) // 3
        reused = 0
        while f"{ours}mixing.static_mixing.{reused}.across_base_points.bias" in weights:
            scores = f"{official}dynamic_conv.subbox_score_list.{reused}."
            unused[scores + "weight"] = torch.zeros(base * sub, channels)
            unused[scores + "bias"] = torch.zeros(base * sub)
            reused += 1
    return unused


def _adamixer_unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The query boxes are a parameter that no gradient reaches: the constant (0.5, 0.5, 1, 1)."""
    return {"rpn_head.init_proposal_bboxes.weight": whole_image_boxes(weights)}


STAGEINTERACTOR = OfficialFormat(
    "StageInteractor",
    [
        *_shared_rules(),
        *_stage_rules(
            [
                ("feat_extractor.gen_one_d.0.*", "sampling.base_offset.*"),
                ("feat_extractor.gen_double_d.0.*", "sampling.sub_offset.*"),
                ("dynamic_conv.parameter_generator.*", "mixing.filter_generator.*"),
                ("dynamic_conv.mix_bias.*", "mixing.bias_generator.*"),
                ("dynamic_conv.Wv.*", "mixing.out_proj.*"),
                ("dynamic_conv.Wv_layer_norm.*", "mixing.norm.*"),
                (
                    "dynamic_conv.subbox_local_list.{j}.*",
                    "mixing.static_mixing.{j}.across_sub_points.*",
                ),
                (
                    "dynamic_conv.axis_atten_list.{j}.*",
                    "mixing.static_mixing.{j}.across_base_points.*",
                ),
                ("dynamic_conv.M_score_list.*", "mixing.channel_adapter.gates.*"),
                ("dynamic_conv.M_score_list_mix_bias.*", "mixing.channel_adapter.bias.*"),
                ("dynamic_conv.S_score_list.*", "mixing.spatial_adapter.filter_gates.*"),
                ("dynamic_conv.S_score_list2.*", "mixing.spatial_adapter.point_gates.*"),
            ]
        ),
    ],
    mark=r"roi_head\.bbox_head\.\d+\.(dynamic_conv|feat_extractor)\..*",
    our_mark=r"decoder\.stages\.\d+\.sampling\.(base|sub)_offset\..*",
    unused=[
        "rpn_head.init_proposal_bboxes",
        "roi_head.bbox_head.{t}.iou_snyc_statistics.*",
        "roi_head.bbox_head.{t}.dynamic_conv.subbox_score_list.{j}.*",
    ],
    initial_unused=_stageinteractor_unused,
)

ADAMIXER = OfficialFormat(
    "AdaMixer",
    [
        *_shared_rules(),
        *_stage_rules(
            [
                ("sampling_n_mixing.sampling_offset_generator.0.*", "sampling.offset.*"),
                (
                    "sampling_n_mixing.adaptive_mixing.parameter_generator.0.*",
                    "mixing.filter_generator.*",
                ),
                ("sampling_n_mixing.adaptive_mixing.out_proj.*", "mixing.out_proj.*"),
                ("sampling_n_mixing.norm.*", "mixing.norm.*"),
            ]
        ),
    ],
    mark=r"roi_head\.bbox_head\.\d+\.sampling_n_mixing\..*",
    our_mark=r"decoder\.stages\.\d+\.sampling\.offset\..*",
    unused=["rpn_head.init_proposal_bboxes.weight"],
    initial_unused=_adamixer_unused,
)

FORMATS = (STAGEINTERACTOR, ADAMIXER)
