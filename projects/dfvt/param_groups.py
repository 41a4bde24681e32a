"""Which parameters of a DFvT the published recipe does not decay."""

from __future__ import annotations

__all__ = ["NO_WEIGHT_DECAY"]

NO_WEIGHT_DECAY = (
    r"^backbone\.bottom_up\.network\.stem\.conv\d\.norm\.",
    r"^backbone\.bottom_up\.network\.stages\.\d\.blocks\.\d+\.norm\d\.",
    r"^backbone\.bottom_up\.network\.stages\.\d\.blocks\.\d+\.attention\.bias_table$",
    r"^backbone\.bottom_up\.network\.widen\.\d\.0\.",
    r"^backbone\.bottom_up\.outputs\.res\d\.norm\.",
)
"""For ``params_with_decay_exceptions``.

The authors spare what has "norm" in its name, and relative position biases. The norms of the local
trunk, the down-sampling and the spatial module, and DANE's, have other names there and do decay, as
do all biases.
"""
