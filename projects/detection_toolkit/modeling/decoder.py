"""Query heads: S stages in cascade.

Letters: B images, N queries, C channels, S stages, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..structures import StageOutput
from .execution import Execution
from .gathering import GatherableMaps

__all__ = ["QUERY_HEADS", "CascadeDecoder"]

QUERY_HEADS = Registry("QUERY_HEADS")
QUERY_HEADS.__doc__ = """
Registry of query heads: ROI-free heads that refine queries against feature maps.

A registered object is a module called as ``head(features, strides, queries, xyzr)`` that returns
a list of :class:`~detection_toolkit.structures.StageOutput`, one a stage.
"""


@QUERY_HEADS.register()
class CascadeDecoder(nn.Module):
    """Runs its stages one after another.

    What stages share besides the queries, they hand on as ``carry``, a value that the decoder does
    not look into; None where a method has none.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        execution: Execution | None = None,
    ):
        """
        Args:
            stages: S modules, called as ``stage(queries, xyzr, features, strides, carry)``, that
                return their :class:`~detection_toolkit.structures.StageOutput` and the next carry.
            execution: how to compute; by default :class:`Execution`'s own choices.
        """
        super().__init__()
        if not stages:
            raise UserError("a decoder needs at least one stage")
        self.execution = execution or Execution()
        self._program: Callable[..., list[StageOutput]] | None = None
        self.stages = nn.ModuleList(stages)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.stages)

    def initial_carry(self) -> Any:
        """What the first stage is handed on; None, unless a method has more."""
        return None

    def prepare_maps(self, features: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """Lay the maps of a batch out for sampling, once for all stages.

        :meth:`forward` does it; who calls :meth:`run_stage` may, which saves time.

        Args:
            features: L maps (B, C, H_l, W_l).
            dtype: type of the geometry.
        """
        groups = getattr(getattr(self.stages[0], "sampling", None), "groups", None)
        is_plain = self.execution.sampling == "grid" or groups is None
        if is_plain or isinstance(features, GatherableMaps):
            return features
        fused = self.execution.sampling == "triton"
        return GatherableMaps(features, groups=groups, dtype=dtype, fused=fused)

    def run_stage(
        self,
        index: int,
        features: Sequence[Tensor],
        strides: Sequence[int],
        queries: Tensor,
        xyzr: Tensor,
        carry: Any,
    ) -> tuple[StageOutput, Any]:
        """Run one stage on any set of queries; see :meth:`forward` for the arguments."""
        arguments = queries, xyzr.detach(), features, strides, carry
        if self.execution.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.stages[index], *arguments, use_reentrant=False)
        return self.stages[index](*arguments)

    def forward(
        self,
        features: Sequence[Tensor],
        strides: Sequence[int],
        queries: Tensor,
        xyzr: Tensor,
    ) -> list[StageOutput]:
        """
        Args:
            features: L maps (B, C, H_l, W_l).
            strides: pixels of the image per cell of each map.
            queries: (B, N, C) initial content.
            xyzr: (B, N, 4) initial geometry.

        Returns:
            the predictions of all S stages.
        """
        if self.execution.compile and not torch.compiler.is_compiling():
            return self._compiled(features, strides, queries, xyzr)
        features = self.prepare_maps(features, xyzr.dtype)
        outputs = []
        carry = self.initial_carry()
        for index in range(self.num_stages):
            output, carry = self.run_stage(index, features, strides, queries, xyzr, carry)
            queries, xyzr = output.queries, output.xyzr
            outputs.append(output)
        return outputs

    def _compiled(self, features, strides, queries, xyzr) -> list[StageOutput]:
        # Batch and queries stay fixed, the size of the image does not: one program for all sizes.
        for feature in features:
            torch._dynamo.maybe_mark_dynamic(feature, (2, 3))
        if self._program is None:
            self._program = torch.compile(
                partial(CascadeDecoder.forward, self), mode=self.execution.compile, fullgraph=True
            )
        return self._program(features, strides, queries, xyzr)
