"""How a detector computes what it computes: the one place where optimisations are switched."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

__all__ = ["Execution"]

CHOICES = {
    "sampling": ("gather", "triton", "grid"),
    "mixing": ("factored", "direct"),
    "compile": ("", "default", "reduce-overhead", "max-autotune"),
}


@dataclass(frozen=True)
class Execution:
    """Ways of computing the same function.

    Results agree up to the rounding of the arithmetic type, whatever is chosen. Weights do not
    depend on the choice. ``Execution(sampling="grid", mixing="direct", channels_last=False)``
    follows the equations step by step.
    """

    sampling: str = "gather"
    """``gather``: rows of channels-last maps, with one gradient buffer for all stages; ``triton``:
    the same in one CUDA kernel; ``grid``: ``grid_sample`` level by level."""

    mixing: str = "factored"
    """``factored``: no adapted channel filter is written out, and less is kept for the backward
    pass; ``direct``: every filter as the equations have it."""

    channels_last: bool = True
    """Run the backbone in channels-last memory format."""

    checkpoint: bool = False
    """Keep only the inputs of each stage for the backward pass, and compute the stage again."""

    compile: str = ""
    """Mode of ``torch.compile`` for the decoder, "" for none. ``reduce-overhead`` uses CUDA graphs,
    which are recorded anew for every image size. The first call takes minutes."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"model.execution.{name}={value!r} is not one of "
                    + ", ".join(repr(choice) for choice in choices)
                )
        if self.compile and self.checkpoint:
            raise UserError(
                "model.execution.compile chooses by itself what is kept: leave "
                "model.execution.checkpoint=false with it"
            )
