"""Random weights under the names of MMDetection's Deformable DETRs, at the released size."""

from __future__ import annotations

import gzip
import re
from functools import cache
from pathlib import Path

import torch
from loaded_configs import build_empty, load_config
from torch import Tensor, nn

from detection_toolkit.config import apply_overrides

DATA = Path(__file__).resolve().parent / "data"
CONFIGS = {
    "plain": "deformable_detr/deformable_detr_r50_50e.py",
    "refine": "deformable_detr/deformable_detr_refine_r50_50e.py",
    "two_stage": "deformable_detr/deformable_detr_two_stage_r50_50e.py",
}
# Version 2 -> version 3, in this order.
RENAMED = [
    (r"^bbox_head\.transformer\.(encoder|decoder)\.", r"\1."),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"\.ffns\.0\.", ".ffn."),
    (r"^bbox_head\.transformer\.level_embeds$", "level_embed"),
    (r"^bbox_head\.transformer\.reference_points\.", "reference_points_fc."),
    (r"^bbox_head\.transformer\.enc_output\.", "memory_trans_fc."),
    (r"^bbox_head\.transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"^bbox_head\.transformer\.pos_trans\.", "pos_trans_fc."),
    (r"^bbox_head\.transformer\.pos_trans_norm\.", "pos_trans_norm."),
    (r"^bbox_head\.query_embedding\.", "query_embedding."),
]


def random_checkpoint(variant: str) -> dict[str, Tensor]:
    """Random values for every tensor of the released model; what its stages share is the same.

    The tensors are shared between calls: to be replaced, not to be written to.
    """
    return dict(_drawn(variant))


@cache
def _drawn(variant: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    with gzip.open(DATA / f"keys_deformable_detr_r50_{variant}.tsv.gz", "rt") as file:
        for line in file:
            if line.startswith("#"):
                continue
            name, shape, dtype, same = line.rstrip("\n").split("\t")
            size = () if shape == "scalar" else tuple(map(int, shape.split("x")))
            if same:
                weights[name] = weights[same]
            elif dtype == "float32":
                weights[name] = torch.randn(size, generator=generator)
            else:
                weights[name] = torch.randint(1000, size, generator=generator)
    return weights


def empty_model(variant: str, *overrides: str) -> nn.Module:
    return build_empty(apply_overrides(load_config(CONFIGS[variant]), overrides))


def version_3(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
