"""What each further stage costs, and what it gains: AP and milliseconds where a detector ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from ..evaluation import evaluate_stages
from ..modeling import QueryDetector
from .timing import alternate

__all__ = ["StageCosts", "stage_costs", "stage_table", "time_stages"]


class StageCosts(NamedTuple):
    """Of a detector whose first stages alone are run."""

    stages: int
    """``model.stages_at_test``."""
    milliseconds: float
    """Of an image, from the resized picture to its detections; median."""
    metrics: dict[str, float | None]
    """COCO's, of boxes."""


def stage_costs(
    detector: QueryDetector,
    loader: Iterable[list[dict[str, Any]]],
    *,
    dataset_name: str,
    max_dets_per_image: int | None = None,
    backend: str = "pycocotools",
    timed_batches: int = 8,
    rounds: int = 7,
) -> list[StageCosts]:
    """AP after each stage, from one pass over a data set, and the time that it takes until there.

    Args:
        detector: in evaluation mode.
        loader: as ``build_test_loader`` makes it.
        dataset_name, max_dets_per_image, backend: see :func:`evaluate_stages`.
        timed_batches: the first ones of the loader, which are timed afterwards.
        rounds: see :func:`time_stages`.

    Raises:
        UserError: see :func:`evaluate_stages`.
    """
    _, metrics = evaluate_stages(
        detector,
        loader,
        dataset_name=dataset_name,
        max_dets_per_image=max_dets_per_image,
        backend=backend,
    )
    batches = list(itertools.islice(loader, timed_batches))
    milliseconds = time_stages(detector, batches, rounds=rounds)
    return [
        StageCosts(of_stage["stage"], time, {k: v for k, v in of_stage.items() if k[:2] == "AP"})
        for of_stage, time in zip(metrics["stages"], milliseconds)
    ]


@torch.no_grad()
def time_stages(
    detector: QueryDetector, batches: Sequence[list[dict[str, Any]]], *, rounds: int = 7
) -> list[float]:
    """Milliseconds of an image with 1, 2, ... S stages.

    Args:
        detector: in evaluation mode; limits of its stages are as before afterwards.
        batches: its inputs.
        rounds: passes over the batches that count, with each number of stages in turn.
    """
    decoder = detector.decoder
    before = decoder.num_stages_at_test

    def run(count: int) -> None:
        decoder.limit_stages_at_test(count)
        for batch in batches:
            detector(batch)

    counts = range(1, decoder.num_stages + 1)
    try:
        seconds = alternate(
            {str(count): lambda count=count: run(count) for count in counts},
            device=detector.device,
            rounds=rounds,
        )
    finally:
        decoder.limit_stages_at_test(before)
    images = sum(map(len, batches))
    return [1000 * seconds[str(count)] / images for count in counts]


def stage_table(costs: Sequence[StageCosts]) -> str:
    """A row a number of stages, for Markdown."""
    slowest = costs[-1].milliseconds
    rows = [
        [
            f"model.stages_at_test={x.stages}",
            *(x.metrics[name] for name in ("AP", "AP50", "AP75")),
            x.milliseconds,
            slowest / x.milliseconds,
        ]
        for x in costs
    ]
    headers = ["", "AP", "AP50", "AP75", "ms per image", "times as fast"]
    formats = ("", ".1f", ".1f", ".1f", ".2f", ".2f")
    return tabulate(rows, headers, "pipe", floatfmt=formats, missingval="-")
