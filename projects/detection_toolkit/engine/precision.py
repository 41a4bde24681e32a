"""The types that autocast may use."""

from __future__ import annotations

import torch

from ..errors import UserError

__all__ = ["autocast_dtype"]

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast_dtype(precision: str, device: str) -> torch.dtype:
    """The type behind ``train.amp.precision``.

    Args:
        precision: "float16" (CUDA only) or "bfloat16".
        device: what the model is on, such as "cuda:0" or "cpu".

    Raises:
        ValueError: an unknown precision, or float16 on a CPU.
    """
    if precision not in _PRECISIONS:
        raise UserError(
            f"train.amp.precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}"
        )
    device_type = torch.device(device).type
    if precision == "float16" and device_type != "cuda":
        raise UserError(
            "train.amp.precision=float16 needs a GPU; use train.amp.precision=bfloat16 on "
            f"{device_type}"
        )
    return _PRECISIONS[precision]
