"""The route of recollection through a decoder.

Letters: B images, N queries, C channels, R groups of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection_toolkit.modeling import CascadeDecoder, FeatureMaps, Route
from detection_toolkit.structures import Queries, StageOutput, map_tensors

from .criterion import RecollectionCriterion
from .schedule import RecollectionSchedule, ScheduleError

__all__ = ["QueryRecollection", "QueryState", "recollect"]

StageResult = tuple[StageOutput, Any]
RunStage = Callable[[Queries, Any], StageResult]


class QueryState(NamedTuple):
    """A full set of queries for the whole batch, as a stage left it."""

    queries: Queries
    """Of B images."""
    carry: Any
    """What each stage so far has handed on of these queries; see :func:`recollect`."""


class QueryRecollection(Route):
    """The route of a decoder that is trained with query recollection.

    The decoder's parameters, their names and its inference are those of the plain one, so that
    the weights of one are the weights of the other.
    """

    def __init__(self, schedule: RecollectionSchedule, *, batched: bool = True):
        """
        Args:
            schedule: which queries each stage is given in training.
            batched: how the groups are run; see :func:`recollect`.

        Raises:
            ScheduleError: it is none.
        """
        if not isinstance(schedule, RecollectionSchedule):
            raise ScheduleError(
                "model.decoder.route.schedule must be a schedule, such as sqr.selective_schedule, "
                f"or sqr.plain_schedule for none; it is {schedule!r}"
            )
        self.schedule = schedule
        self.batched = batched

    def check_fits(self, num_stages: int) -> None:
        """See :meth:`RecollectionSchedule.check_fits`."""
        self.schedule.check_fits(num_stages)

    def __call__(
        self, decoder: CascadeDecoder, maps: FeatureMaps, queries: Queries
    ) -> list[StageOutput]:
        """The predictions of all groups; see :func:`recollect`."""
        return recollect(decoder, self.schedule, maps, queries, batched=self.batched)

    def supervise(self, criterion: nn.Module) -> RecollectionCriterion:
        """A criterion of all groups, made of the plain cascade's."""
        return RecollectionCriterion(criterion, self.schedule)


def recollect(
    decoder: CascadeDecoder,
    schedule: RecollectionSchedule,
    maps: FeatureMaps,
    queries: Queries,
    *,
    batched: bool = True,
) -> list[StageOutput]:
    """Predictions of all groups of all stages.

    A group takes the content and geometry of its state, and what the stages have handed on of it
    (for StageInteractor the filter bank). The bank has one entry of every stage before, also of
    those that the state has not passed: their filter is the one that they generated from this
    same state, in the group that did pass them. So a later stage finds in each place of the bank
    what it finds there at inference: a filter of that stage, made of the query in question.

    Args:
        decoder: the cascade; only its
            :meth:`~detection_toolkit.modeling.CascadeDecoder.run_stage` is used.
        schedule: which states each stage is given.
        maps: of B images; never copied, whatever the number of groups.
        queries: initial ones, of B images.
        batched: the groups of a stage run at once, as further rows of the batch; False: one after
            another. The results agree to round-off. The decoder's ``execution.checkpoint`` saves
            memory with either.

    Returns:
        the groups' predictions in the schedule's order; the last of each stage is the ordinary
        cascade.

    Raises:
        ScheduleError: the schedule is for another number of stages.
    """
    schedule.check_fits(decoder.num_stages)
    run_groups = _run_batched if batched else _run_one_by_one
    pool = [QueryState(queries, decoder.initial_carry())]
    outputs = []
    for t in range(schedule.num_stages):
        run_stage = partial(_run_stage, decoder, t, maps)
        positions = schedule.inputs(t)
        results = run_groups(run_stage, [pool[p] for p in positions])
        for p, (output, carry) in zip(positions, results):
            # What this stage hands on is now known of the state itself, should a later one read it.
            pool[p] = pool[p]._replace(carry=carry)
            pool.append(QueryState(output.queries, carry))
            outputs.append(output)
    return outputs


def _run_stage(
    decoder: CascadeDecoder, index: int, maps: FeatureMaps, queries: Queries, carry: Any
) -> StageResult:
    return decoder.run_stage(index, queries, maps, carry)


def _run_one_by_one(run_stage: RunStage, states: Sequence[QueryState]) -> list[StageResult]:
    return [run_stage(*state) for state in states]


def _run_batched(run_stage: RunStage, states: Sequence[QueryState]) -> list[StageResult]:
    """All groups at once whose tensors have the same shapes. Initial queries may differ, where
    they have points and the stages make boxes of them."""
    alike: dict[tuple, list[int]] = {}
    for place, state in enumerate(states):
        alike.setdefault(_shapes(state), []).append(place)
    results: dict[int, StageResult] = {}
    for places in alike.values():
        results.update(zip(places, _run_as_one(run_stage, [states[i] for i in places])))
    return [results[place] for place in range(len(states))]


def _shapes(state: QueryState) -> tuple[torch.Size, ...]:
    shapes: list[torch.Size] = []
    map_tensors(lambda x: shapes.append(x.shape), state)
    return tuple(shapes)


def _run_as_one(run_stage: RunStage, states: Sequence[QueryState]) -> list[StageResult]:
    """All groups as one batch of R B rows, the groups of an image together.

    Self-attention stays within a row. To the sampling the rows of an image are one larger set of
    queries, so that they share its maps.
    """
    groups = len(states)
    if groups == 1:
        return _run_one_by_one(run_stage, states)
    # Who sees whom is the same in all groups, and no row of the batch.
    mask = states[0].queries.attention_mask
    states = [x._replace(queries=x.queries._replace(attention_mask=None)) for x in states]
    # What is handed on is nested alike: all states of a stage have passed the same stages.
    queries, carry = map_tensors(_fold, *states)
    output, carry = run_stage(queries._replace(attention_mask=mask), carry)
    result = output._replace(queries=output.queries._replace(attention_mask=None)), carry
    parts: list[tuple[Tensor, ...]] = []  # of each tensor, those of the groups
    map_tensors(lambda x: parts.append(x.unflatten(0, (-1, groups)).unbind(1)), result)
    results = []
    for of_group in zip(*parts):
        tensors = iter(of_group)
        output, carry = map_tensors(lambda _, tensors=tensors: next(tensors), result)
        masked = output.queries._replace(attention_mask=mask)
        results.append((output._replace(queries=masked), carry))
    return results


def _fold(*tensors: Tensor) -> Tensor:
    """R tensors (B, ...) -> (B R, ...), those of an image together."""
    return torch.stack(tensors, dim=1).flatten(0, 1)
