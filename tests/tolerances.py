"""How far two ways to compute one thing may lie apart: what rounding explains, and no more."""

from __future__ import annotations

import torch


def tolerance(dtype: torch.dtype, scale: float, operations: int) -> dict[str, float]:
    """Limits for ``torch.testing.assert_close``, the same on every processor.

    Instruction sets add in different orders and fuse different multiplications with additions, so
    no limit may be chosen by what one machine happened to give.

    Args:
        dtype: of the least precise step of the two ways.
        scale: the largest absolute value on the way, in the unit of what is compared. For a sum it
            is that of its addends together, which may cancel.
        operations: roundings that a value goes through, one after the other.
    """
    return {"rtol": 0.0, "atol": torch.finfo(dtype).eps * scale * operations}
