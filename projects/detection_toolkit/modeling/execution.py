"""How a detector computes what it computes: the one place where optimisations are switched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError

__all__ = ["PLAIN", "Execution"]

PLAIN: Mapping[str, Any] = {
    "sampling": "grid",
    "mixing": "direct",
    "channels_last": False,
    "fold_norms": False,
    "products": "torch",
    "checkpoint": False,
    "compile": "",
    "cuda_graphs": False,
}
"""As the equations have it, step by step."""

CHOICES = {
    "sampling": ("auto", "gather", "triton", "grid"),
    "mixing": ("factored", "direct"),
    "products": ("auto", "torch", "onednn", "bfloat16"),
    "compile": ("", "default", "reduce-overhead", "max-autotune"),
}


class Execution:
    """Ways of computing the same function.

    Results agree up to the rounding of the arithmetic type, whatever is chosen. Weights do not
    depend on the choice. ``Execution(**PLAIN)`` follows the equations step by step.
    """

    # No dataclass: a config holds those as text, and at text LazyConfig.to_py stops.
    def __init__(
        self,
        *,
        sampling: str = "auto",
        mixing: str = "factored",
        channels_last: bool = True,
        fold_norms: bool = True,
        products: str = "auto",
        checkpoint: bool = False,
        compile: str = "",
        cuda_graphs: bool = False,
    ):
        """
        Args:
            sampling: ``auto``: ``triton`` on a GPU that has it, unless coordinates are float64,
                else ``gather``; ``gather``: rows of channels-last maps, with one gradient buffer
                for all stages; ``triton``: the same in one GPU kernel, in float32; ``grid``:
                ``grid_sample`` level by level.
            mixing: ``factored``: no adapted channel filter is written out, and less is kept for
                the backward pass; ``direct``: every filter as the equations have it.
            channels_last: run the backbone in channels-last memory format.
            fold_norms: let the backbone's convolutions take norms with fixed statistics into their
                weights, see :class:`~detection_toolkit.modeling.folding.FoldedConv2d`.
            products: of matrices, in float32 on a CPU. ``torch``: by PyTorch's usual library,
                mostly MKL; ``onednn``: by oneDNN; ``auto``: ``onednn`` where the processor is AMD's
                and the model is not small, see :mod:`~detection_toolkit.modeling.products`.
                ``bfloat16``: products and convolutions of rounded numbers, added up in float32, by
                autocast, on any device.
            checkpoint: keep only the inputs of each stage for the backward pass, and compute the
                stage again.
            compile: mode of ``torch.compile`` for the decoder, "" for none. ``reduce-overhead``
                uses CUDA graphs, which are recorded anew for every image size. The first call takes
                minutes.
            cuda_graphs: at inference on a GPU, record the whole network once per batch and image
                size, and replay it; the numbers are the same. The first image of a size takes
                longer, and 32 sizes are kept. Forward hooks of modules see the recording alone.

        Raises:
            UserError: an unknown choice, or two that exclude each other.
        """
        self.sampling = sampling
        self.mixing = mixing
        self.channels_last = channels_last
        self.fold_norms = fold_norms
        self.products = products
        self.checkpoint = checkpoint
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"model.execution.{name}={value!r} is not one of "
                    + ", ".join(repr(choice) for choice in choices)
                )
        if compile and checkpoint:
            raise UserError(
                "model.execution.compile chooses by itself what is kept: leave "
                "model.execution.checkpoint=false with it"
            )
        if compile and cuda_graphs:
            raise UserError(
                "model.execution.cuda_graphs records the network as it is: leave "
                'model.execution.compile="" with it, or use compile="reduce-overhead" alone'
            )
