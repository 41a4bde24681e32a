"""Runs a decoder on the states of a recollection schedule.

Letters: B images, N queries, C channels, R groups of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stageinteractor.modeling import CascadeDecoder, DynamicFilters, FilterBank
from stageinteractor.structures import StageOutput

from .schedule import RecollectionSchedule

__all__ = ["QueryState", "recollect"]

StageResult = tuple[StageOutput, FilterBank]
Tensors = TypeVar("Tensors", StageOutput, DynamicFilters)
RunStage = Callable[[Tensor, Tensor, FilterBank], StageResult]


class QueryState(NamedTuple):
    """A full set of queries for the whole batch, as a stage left it."""

    queries: Tensor
    """(B, N, C) content."""
    xyzr: Tensor
    """(B, N, 4) geometry that the same stage predicted."""
    bank: FilterBank
    """The filters that each stage so far made of these queries; see :func:`recollect`."""


def recollect(
    decoder: CascadeDecoder,
    schedule: RecollectionSchedule,
    features: Sequence[Tensor],
    *,
    strides: Sequence[int],
    queries: Tensor,
    xyzr: Tensor,
    batched: bool = True,
) -> list[StageOutput]:
    """Predictions of all groups of all stages.

    A group takes the content and geometry of its state. Its filter bank has one entry of every
    stage before, also of those that the state has not passed: their filter is the one that they
    generated from this same state, in the group that did pass them. So a later stage finds in
    each place of the bank what it finds there at inference: a filter of that stage, made of the
    query at hand.

    Args:
        decoder: the cascade; only its :meth:`run_stage` is used.
        schedule: which states each stage is given.
        features: L maps (B, C, H_l, W_l); never copied, whatever the number of groups.
        strides: pixels of the image per cell of each map.
        queries: (B, N, C) initial content.
        xyzr: (B, N, 4) initial geometry.
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
    pool = [QueryState(queries, xyzr, FilterBank())]
    outputs = []
    for t in range(schedule.num_stages):
        run_stage = partial(_run_stage, decoder, t, features, strides)
        positions = schedule.inputs(t)
        results = run_groups(run_stage, [pool[p] for p in positions])
        for p, (output, bank) in zip(positions, results):
            # This stage's filters are now known for the state itself, should a later one read it.
            pool[p] = pool[p]._replace(bank=bank)
            pool.append(QueryState(output.queries, output.xyzr, bank))
            outputs.append(output)
    return outputs


def _run_stage(
    decoder: CascadeDecoder,
    index: int,
    features: Sequence[Tensor],
    strides: Sequence[int],
    queries: Tensor,
    xyzr: Tensor,
    bank: FilterBank,
) -> StageResult:
    return decoder.run_stage(index, features, strides, queries, xyzr, bank)


def _run_one_by_one(run_stage: RunStage, states: Sequence[QueryState]) -> list[StageResult]:
    return [run_stage(*state) for state in states]


def _run_batched(run_stage: RunStage, states: Sequence[QueryState]) -> list[StageResult]:
    """All groups as one batch of R B rows, the groups of an image together.

    Self-attention stays within a row. To the sampling the rows of an image are one larger set of
    queries, so that they share its maps.
    """
    groups = len(states)
    if groups == 1:
        return _run_one_by_one(run_stage, states)
    # All banks of a stage's states have an entry of the same stages.
    entries = zip(*(state.bank.entries for state in states))
    bank = FilterBank(tuple(_fold_all(same_stage) for same_stage in entries))
    queries = _fold([state.queries for state in states])
    xyzr = _fold([state.xyzr for state in states])
    output, bank = run_stage(queries, xyzr, bank)
    outputs = _split_all(output, groups)
    filters = [_split_all(entry, groups) for entry in bank.entries]
    banks = [FilterBank(tuple(entry[r] for entry in filters)) for r in range(groups)]
    return list(zip(outputs, banks))


def _fold(tensors: Sequence[Tensor]) -> Tensor:
    """R tensors (B, ...) -> (B R, ...), those of an image together."""
    return torch.stack(tuple(tensors), dim=1).flatten(0, 1)


def _split(tensor: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Inverse of :func:`_fold`."""
    return tensor.unflatten(0, (-1, groups)).unbind(1)


def _fold_all(tuples: Sequence[Tensors]) -> Tensors:
    """R NamedTuples of tensors -> one of folded tensors."""
    return type(tuples[0])(*map(_fold, zip(*tuples)))


def _split_all(folded: Tensors, groups: int) -> list[Tensors]:
    """Inverse of :func:`_fold_all`."""
    parts = (_split(tensor, groups) for tensor in folded)
    return [type(folded)(*tensors) for tensors in zip(*parts)]
