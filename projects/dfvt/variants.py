"""The three published sizes, as arguments of the backbone and of the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["VARIANTS"]

# No dict: LazyConfig would make a config that imports it have it as a key without effect.
VARIANTS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "tiny": dict(embed_dim=48, depths=(1, 1, 2, 1), num_heads=(3, 6, 12, 24), mlp_ratio=4.0),
        "small": dict(embed_dim=96, depths=(1, 1, 2, 1), num_heads=(3, 6, 12, 24), mlp_ratio=2.0),
        "base": dict(embed_dim=128, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32), mlp_ratio=2.0),
    }
)
"""``DFvTBackbone(**VARIANTS["small"], drop_path_rate=0.1)``"""
