"""Numeric cases of HPR's blocks, each by itself, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformable_detr.attention import DeformableAttention, FeedForward, SelfAttention
from deformable_detr.decoder import DeformableDecoderStage, refining_heads, take_box
from deformable_detr.positions import sine_code, to_maps
from detection_toolkit.checkpoint.name_rules import Renamer
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    CaseError,
    CaseKind,
    Inputs,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.compare import EXACT, PIXELS, Table, gradient, value
from detection_toolkit.structures import Queries

from .decoder import DYNAMIC, REGIONAL
from .dynamic_convolution import DynamicConvolution
from .merge import MERGES
from .official_names import mm_layer_pairs
from .regional_attention import RegionalCrossAttention
from .roi import RoIFeatures
from .stage import HybridStage, Refiner

__all__ = ["NORM_SHARE", "BlocksCase", "as_maps", "merge_of"]

NORM_SHARE = 1e-3
"""Of a gradient's norm."""
_MERGES = {"learnable_channel_aware": "channel", "learnable": "scalar", "add": "fixed"}


def merge_of(name: str) -> str:
    """The merge that the reference calls so.

    Raises:
        CaseError: it is unknown.
    """
    if name not in _MERGES:
        raise CaseError(f"merge {name!r} is none of {', '.join(_MERGES)}")
    return _MERGES[name]


def as_maps(regions: Tensor) -> Tensor:
    """(..., cells, C) -> (..., C, side, side)."""
    side = int(regions.shape[-2] ** 0.5)
    return regions.transpose(-1, -2).unflatten(-1, (side, side))


def _block_names() -> dict[str, Renamer]:
    """Of each block with weights: official names -> ours."""
    layer = [(a, b, None) for a, b in mm_layer_pairs()]
    whole = Renamer(layer)
    inner = {
        "dynamic_conv": ("dy_conv.", f"auxiliary.{DYNAMIC}.look."),
        "regional_ca": ("regional_ca.", f"auxiliary.{REGIONAL}.look."),
    }

    def part(official: str, ours: str) -> Renamer:
        return Renamer(
            (a[len(official) :], b[len(ours) :], None)
            for a, b, _ in layer
            if a.startswith(official)
        )

    return {"layer": whole, **{name: part(*pair) for name, pair in inner.items()}}


class _Given(nn.Module):
    """Stands in for what makes features of boxes."""

    def __init__(self, regions: Tensor):
        super().__init__()
        self.regions = regions

    def forward(self, boxes: Tensor, maps: FeatureMaps) -> Tensor:
        return self.regions


class _Block:
    """One block: its module, inputs and outputs."""

    def __init__(self, name: str, inputs: Inputs, case: Case, module: nn.Module | None):
        self.name, self.inputs, self.case, self.module = name, inputs, case, module
        self.tensors = {
            key[len(f"{name}/in/") :]: inputs.tensor(key) for key in case.below(f"{name}/in/")
        }
        self.differentiable = [
            key[len(f"{name}/grad_in/") :] for key in case.below(f"{name}/grad_in/")
        ]
        for key in self.differentiable:
            self.tensors[key].requires_grad_()

    def load(self, rename: Callable[[str], str]) -> None:
        """The case's weights."""
        assert self.module is not None
        weights = self.inputs.weights(f"{self.name}/weights/")
        self.names = {official: rename(official) for official in weights}
        ours = {self.names[official]: x for official, x in weights.items()}
        missing, surplus = self.module.load_state_dict(ours, strict=False)
        missing = [x for x in missing if not x.startswith("head.")]
        if missing or surplus:
            raise CaseError(f"{self.case.path}: weights of {self.name}: {missing}, {surplus}")
        dtype, device = next(iter(weights.values())).dtype, next(iter(weights.values())).device
        self.module.to(device, dtype)

    def run(self, forward: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
        """Outputs, and gradients of their sum weighted by the cotangents."""
        outputs = forward(self)
        total = sum(
            (outputs[key] * self.inputs.tensor(f"{self.name}/cotangent/{key}")).sum()
            for key in outputs
        )
        total.backward()
        found: dict[str, Any] = {f"out/{key}": x.detach() for key, x in outputs.items()}
        found |= {f"grad_in/{key}": self.tensors[key].grad for key in self.differentiable}
        if self.module is not None:
            parameters = dict(self.module.named_parameters())
            for official, ours in self.names.items():
                if ours in parameters:
                    found[f"grad/{official}"] = parameters[ours].grad
        return found


@CASE_KINDS.register()
class BlocksCase(CaseKind):
    """Each block of HPR by itself, with gradients."""

    title = "blocks of HPR"
    information = ("config_json",)

    @classmethod
    def matches(cls, case: Case) -> bool:
        return {"config_json", "roi/levels"} <= case.names

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.blocks = sorted({name.split("/")[0] for name in case.names if "/" in name})

    def quantities(self) -> Iterator[Quantity]:
        for block in self.blocks:
            largest = max(
                (float(np.linalg.norm(self.case.array(x))) for x in self._gradients(block)),
                default=0.0,
            )
            for name in self.case.below(f"{block}/out/"):
                yield Quantity(name, value, partial(_found, name, None))
            for name in self._gradients(block):
                reference = self.case.array(name)
                is_norm = reference.ndim == 0
                limit = gradient(largest, NORM_SHARE)
                yield Quantity(name, limit, partial(_found, name, is_norm))
        extras: Table = {
            "roi/rois_xyxy": (PIXELS, lambda run: run["roi/rois_xyxy"]),
            "roi/levels": (EXACT, lambda run: run["roi/levels"]),
            "regional_ca/key_pos": (value, lambda run: run["regional_ca/key_pos"]),
            "box_encoding/enc": (value, lambda run: run["box_encoding/enc"]),
        }
        present = {k: v for k, v in extras.items() if k.split("/")[0] in self.blocks}
        yield from expand(present)

    def _gradients(self, block: str) -> list[str]:
        return [*self.case.below(f"{block}/grad_in/"), *self.case.below(f"{block}/grad/")]

    def compute(self, settings: Settings) -> dict[str, Any]:
        inputs = Inputs(self.case, settings)
        found: dict[str, Any] = {}
        for block in self.blocks:
            if block.startswith("merge_"):
                results = self._merge(block, inputs)
            else:
                results = getattr(self, f"_{block}")(inputs, settings)
            found |= {f"{block}/{key}": x for key, x in results.items()}
        return found

    def _roi(self, inputs: Inputs, settings: Settings) -> dict[str, Any]:
        module = RoIFeatures(
            finest_scale=float(self.config["finest"]),
            strides=[int(x) for x in self.config["featmap_strides"]],
            execution=settings.execution,
        )
        block = _Block("roi", inputs, self.case, None)
        sizes = inputs.tensor("roi/image_wh").repeat(1, 2)[:, None]
        center, size = inputs.tensor("roi/boxes").split(2, dim=-1)
        boxes = torch.cat([center - size / 2, center + size / 2], dim=-1) * sizes

        def forward(block: _Block) -> dict[str, Tensor]:
            levels = [block.tensors[f"map{i}"] for i in range(len(block.tensors))]
            height, width = (int(x) for x in self.config["image"])
            maps = FeatureMaps(
                tuple(levels),
                module.strides,
                sizes[:, 0, :2].flip(-1),
                (height, width),
            )
            return {"feats": as_maps(module(boxes, maps)).flatten(0, 1)}

        return {
            **block.run(forward),
            "rois_xyxy": boxes,
            "levels": module.levels(boxes, len(block.tensors)),
        }

    def _dynamic_conv(self, inputs: Inputs, settings: Settings) -> dict[str, Any]:
        module = DynamicConvolution(int(self.config["D"]), inner_channels=int(self.config["dyf"]))
        block = _Block("dynamic_conv", inputs, self.case, module)
        block.load(_renaming("dynamic_conv"))
        return block.run(
            lambda block: {"y": module(block.tensors["query"], _cells(block.tensors["roi"]))}
        )

    def _regional_ca(self, inputs: Inputs, settings: Settings) -> dict[str, Any]:
        module = RegionalCrossAttention(
            int(self.config["D"]),
            num_heads=int(self.config["H"]),
            num_samples=int(self.config["S"]),
            execution=settings.execution,
        )
        block = _Block("regional_ca", inputs, self.case, module)
        block.load(_renaming("regional_ca"))

        def forward(block: _Block) -> dict[str, Tensor]:
            query = block.tensors["query"]
            return {"y": query + module(query, _cells(block.tensors["roi"]))}

        return {**block.run(forward), "key_pos": as_maps(module.key_position)}

    def _merge(self, name: str, inputs: Inputs) -> dict[str, Any]:
        kind, channels = MERGES[merge_of(name[len("merge_") :])], int(self.config["D"])
        module = kind([1.0, 1.0, 1.0], channels, 3)
        block = _Block(name, inputs, self.case, module)
        block.load(lambda official: official)
        return block.run(lambda block: {"y": module([block.tensors[f"x{i}"] for i in range(3)])})

    def _box_encoding(self, inputs: Inputs, settings: Settings) -> dict[str, Any]:
        x, y, width, height = inputs.tensor("box_encoding/boxes").unbind(-1)
        channels = self.case.array("box_encoding/enc").shape[-1] // 4
        return {"enc": sine_code(torch.stack([y, x, width, height], -1), channels).flatten(-2)}

    def _layer(self, inputs: Inputs, settings: Settings) -> dict[str, Any]:
        config, execution = self.config, settings.execution
        channels, heads, ffn = (int(config[x]) for x in ("D", "H", "ffn"))
        shapes = self.case.array("layer/in/spatial_shapes")
        attention = DeformableAttention(
            channels,
            num_heads=heads,
            num_levels=len(shapes),
            num_points=int(config["P"]),
            execution=execution,
        )

        def parts() -> tuple[SelfAttention, FeedForward]:
            return SelfAttention(channels, heads, 0.0), FeedForward(channels, ffn, 0.0)

        own_attention, own_ffn = parts()
        (head,) = refining_heads(1, channels, 1, first_size_logit=0.0)
        primary = DeformableDecoderStage(
            self_attention=own_attention,
            attention=attention,
            ffn=own_ffn,
            head=head,
            next_reference=take_box,
            dropout=0.0,
        )
        convolution = DynamicConvolution(channels, inner_channels=int(config["dyf"]))
        regional = RegionalCrossAttention(
            channels, num_heads=heads, num_samples=int(config["S"]), execution=execution
        )
        stage = HybridStage(
            primary,
            {DYNAMIC: Refiner(convolution, *parts()), REGIONAL: Refiner(regional, *parts())},
            merge=partial(MERGES["channel"], [1.0, 1.0, 1.0], channels, 3),
            roi_features=RoIFeatures(execution=execution),
        )
        block = _Block("layer", inputs, self.case, stage)
        block.load(_renaming("layer"))
        regions = _cells(block.tensors["roi"]).unflatten(0, block.tensors["query"].shape[:2])
        stage.roi_features = _Given(regions)

        def forward(block: _Block) -> dict[str, Tensor]:
            tensors = block.tensors
            queries = Queries(
                tensors["query"],
                tensors["reference"],
                tensors["query_pos"],
                tensors["self_attn_mask"],
            )
            maps = _maps_of(tensors, shapes, self.config)
            content, found = stage.refine(queries, maps)
            last = {name: stage.auxiliary[name].ffn.norm(x) for name, x in found.items()}
            return {
                "query": content,
                "aux_regional": last[REGIONAL],
                "aux_dynamic": last[DYNAMIC],
            }

        return block.run(forward)


def _maps_of(tensors: dict[str, Tensor], shapes: np.ndarray, config: Any) -> FeatureMaps:
    """Maps with the memory, masks and ratios of a case."""
    memory = tensors["memory"]
    sizes = [(int(h), int(w)) for h, w in shapes]
    empty = tuple(memory.new_zeros(len(memory), 1, h, w) for h, w in sizes)
    strides = tuple(int(x) for x in config["featmap_strides"])
    height, width = (int(x) for x in config["image"])
    whole = memory.new_tensor([[height, width]]).expand(len(memory), 2)
    maps = to_maps(memory, FeatureMaps(empty, strides, whole, (height, width)))
    masks = tensors["memory_mask"].split([h * w for h, w in sizes], dim=1)
    masks = tuple(mask.unflatten(1, size) for mask, size in zip(masks, sizes))
    object.__setattr__(maps, "_padding_masks", masks)
    object.__setattr__(maps, "_valid_ratios", tensors["valid_ratios"])
    return maps


def _cells(roi: Tensor) -> Tensor:
    """(n, C, side, side) -> (n, cells, C)."""
    return roi.flatten(2).transpose(1, 2)


def _renaming(block: str) -> Callable[[str], str]:
    names = _block_names()[block]

    def rename(official: str) -> str:
        renamed = names(official)
        if renamed is None:
            raise CaseError(f"unknown weight {official} of {block}")
        return renamed[0]

    return rename


def _found(name: str, is_norm: bool | None, run: Any) -> Tensor:
    return run[name].norm() if is_norm else run[name]
