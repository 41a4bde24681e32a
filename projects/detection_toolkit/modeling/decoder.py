"""Query heads: S stages in cascade.

Letters: B images, N queries, C channels, S stages, L levels.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..structures import Queries, StageOutput
from .execution import Execution
from .feature_maps import FeatureMaps

__all__ = ["QUERY_HEADS", "CascadeDecoder", "Route"]

QUERY_HEADS = Registry("QUERY_HEADS")
QUERY_HEADS.__doc__ = """
Registry of query heads: ROI-free heads that refine queries against feature maps.

A registered object is a module called as ``head(maps, queries)`` that returns a list of
:class:`~detection_toolkit.structures.StageOutput`, one a stage.
"""


class Route(ABC):
    """How queries pass the stages in training, where that is not one stage after another."""

    @abstractmethod
    def check_fits(self, num_stages: int) -> None:
        """Raise UserError where the route is for another number of stages."""

    @abstractmethod
    def __call__(
        self, decoder: CascadeDecoder, maps: FeatureMaps, queries: Queries
    ) -> list[StageOutput]:
        """All predictions that the route leads to, in an order of its own."""

    @abstractmethod
    def supervise(self, criterion: nn.Module) -> nn.Module:
        """The criterion of these predictions, made of the plain cascade's."""


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
        route: Route | None = None,
    ):
        """
        Args:
            stages: S modules, called as ``stage(queries, maps, carry)``, that return their
                :class:`~detection_toolkit.structures.StageOutput` and the next carry.
            execution: how to compute; by default :class:`Execution`'s own choices.
            route: how queries pass the stages in training; None: one stage after another.

        Raises:
            UserError: no stage, or a route for another number of stages.
        """
        super().__init__()
        if not stages:
            raise UserError("a decoder needs at least one stage")
        if route is not None and not isinstance(route, Route):
            raise UserError(f"model.decoder.route must be a route, or null for none, not {route!r}")
        self.execution = execution or Execution()
        self._program: Callable[..., list[StageOutput]] | None = None
        self.stages = nn.ModuleList(stages)
        self.route = route
        self.predicts_auxiliary = False
        self._stages_at_test: int | None = None
        self._runs_all_stages = False
        if route is not None:
            route.check_fits(self.num_stages)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.stages)

    @property
    def num_stages_at_test(self) -> int:
        """Stages that an answer at test time takes: S, or fewer."""
        return self.num_stages if self._stages_at_test is None else self._stages_at_test

    @property
    def num_stages_run(self) -> int:
        """Stages that the next forward pass runs: in training always S."""
        all_stages = self.training or self._runs_all_stages
        return self.num_stages if all_stages else self.num_stages_at_test

    def limit_stages_at_test(self, count: int | None) -> None:
        """Run the first stages alone out of training. All stages keep their parameters.

        Args:
            count: of the stages; None: all.

        Raises:
            UserError: it is no number from 1 to S.
        """
        if count is not None and (type(count) is not int or not 1 <= count <= self.num_stages):
            raise UserError(
                f"model.stages_at_test={count!r}: the decoder has {self.num_stages} stages, so "
                f"set a whole number from 1 to {self.num_stages}, or null for all"
            )
        self._stages_at_test = count

    @contextlib.contextmanager
    def with_all_stages(self) -> Iterator[None]:
        """Meanwhile all stages run out of training, too, whatever their limit."""
        before, self._runs_all_stages = self._runs_all_stages, True
        try:
            yield
        finally:
            self._runs_all_stages = before

    @property
    def auxiliary_names(self) -> tuple[str, ...]:
        """Names of the further heads of each stage, which training alone uses."""
        return ()

    @contextlib.contextmanager
    def with_auxiliary(self) -> Iterator[None]:
        """Meanwhile the further heads predict out of training, too."""
        self.predicts_auxiliary = True
        try:
            yield
        finally:
            self.predicts_auxiliary = False

    def initial_carry(self) -> Any:
        """What the first stage is handed on; None, unless a method has more."""
        return None

    def run_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: Any
    ) -> tuple[StageOutput, Any]:
        """Run one stage on any set of queries.

        Args:
            index: of the stage.
            queries: of (R B, N) queries; see :meth:`FeatureMaps.sample` for R sets of queries.
            maps: as :meth:`FeatureMaps.laid_out` returns them, which saves time, or plain.
            carry: what the stages before have handed on.
        """
        arguments = index, queries, maps, carry
        if self.execution.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.pass_stage, *arguments, use_reentrant=False)
        return self.pass_stage(*arguments)

    def pass_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: Any
    ) -> tuple[StageOutput, Any]:
        """What :meth:`run_stage` computes. A method whose stages share modules calls them here."""
        return self.stages[index](queries, maps, carry)

    def forward(self, maps: FeatureMaps, queries: Queries) -> list[StageOutput]:
        """
        Args:
            maps: of B images.
            queries: initial ones.

        Returns:
            the predictions of all stages that are run, see :attr:`num_stages_run`; in training,
            with a route, what it leads to.
        """
        if self.training and self.route is not None:
            return self.route(self, self._lay_out(maps, queries), queries)
        # A program is for one number of queries. A mask tells of denoising ones among them, whose
        # number changes from batch to batch.
        fixed = queries.attention_mask is None
        if self.execution.compile and fixed and not torch.compiler.is_compiling():
            return self._compiled(maps, queries)
        return self._cascade(self._lay_out(maps, queries), queries)

    def _lay_out(self, maps: FeatureMaps, queries: Queries) -> FeatureMaps:
        return maps.laid_out(self.execution, queries.geometry.dtype)

    def _cascade(self, maps: FeatureMaps, queries: Queries) -> list[StageOutput]:
        outputs = []
        carry = self.initial_carry()
        for index in range(self.num_stages_run):
            output, carry = self.run_stage(index, queries, maps, carry)
            queries = output.queries
            outputs.append(output)
        return outputs

    def _compiled(self, maps: FeatureMaps, queries: Queries) -> list[StageOutput]:
        # Batch and queries stay fixed, the size of the image does not: one program for all sizes.
        for level in maps.levels:
            torch._dynamo.maybe_mark_dynamic(level, (2, 3))
        if self._program is None:
            self._program = torch.compile(
                partial(_program, self), mode=self.execution.compile, fullgraph=True
            )
        rest = maps.strides, maps.image_sizes, maps.padded_size
        return self._program(maps.levels, rest, queries)


def _program(
    decoder: CascadeDecoder, levels: tuple[Tensor, ...], rest: tuple, queries: Queries
) -> list[StageOutput]:
    # Tensors and tuples are what a compiled program takes; the maps are put together within.
    maps = decoder._lay_out(FeatureMaps(levels, *rest), queries)
    return decoder._cascade(maps, queries)
