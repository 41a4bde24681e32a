"""Names of official checkpoints and ours, as pairs of templates that work both ways.

In a template ``{x}`` stands for a number and a final ``*`` for any rest. Each pair may carry a
change of the tensor itself, where the two sides order its elements differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Change",
    "Renamer",
    "Rule",
    "merge_channel_major",
    "merge_neighbour_major",
    "name_pattern",
    "resnet_rules",
    "swin_rules",
]

Change = Callable[[Tensor], Tensor]


class Rule(NamedTuple):
    """One pair of names."""

    official: str
    ours: str
    to_ours: Change | None = None
    to_official: Change | None = None


class Renamer:
    """Applies the templates in one direction."""

    def __init__(self, pairs: Iterable[tuple[str, str, Change | None]]):
        self._entries = [
            (name_pattern(source), target.replace("*", "{rest}"), change)
            for source, target, change in pairs
        ]

    def __call__(self, name: str) -> tuple[str, Change | None] | None:
        """The other side's name, and the change of the tensor if any; None if unknown."""
        for pattern, target, change in self._entries:
            match = pattern.fullmatch(name)
            if match:
                return target.format(**match.groupdict()), change
        return None


def name_pattern(template: str) -> re.Pattern[str]:
    """What the names of a template match, with a group for each number and ``rest``."""
    pattern = re.escape(template).replace(r"\*", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", pattern))


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


def resnet_rules() -> list[Rule]:
    """A ResNet, with deformable convolutions or without, that an FPN or the like wraps."""
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


def swin_rules() -> list[Rule]:
    """A Swin Transformer likewise."""
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
