"""Detectron2's ``inference_on_dataset``, for predictions that may not be finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn

from ..errors import NonFinitePredictionError
from ..modeling import QueryDetector

__all__ = ["run_evaluator"]


class _FailedElsewhere(Exception):
    """Another process cannot go on."""


class _Agreeing(DatasetEvaluator):
    """Evaluates where every process has come to the end of its images."""

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: Any, outputs: Any) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> Any:
        if any(comm.all_gather(False)):
            raise _FailedElsewhere
        return self.evaluator.evaluate()


def run_evaluator(
    model: nn.Module, loader: Iterable[Any], evaluator: DatasetEvaluator
) -> dict[str, Any]:
    """Evaluate a model; all processes come to the same end, and the model is in its mode again.

    A query-based detector hands a batch's detections to the evaluator by one copy from the device.

    Args:
        model: in any mode.
        loader: this process' share of the images.
        evaluator: of Detectron2.

    Returns:
        the results; empty but in the main process.

    Raises:
        NonFinitePredictionError: an image has no finite prediction, in this process or another.
    """
    was_training = model.training
    try:
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, QueryDetector):
                    stack.enter_context(module.answering_on_host())
            return inference_on_dataset(model, loader, _Agreeing(evaluator)) or {}
    except _FailedElsewhere:
        raise NonFinitePredictionError([]) from None
    except NonFinitePredictionError:
        comm.all_gather(True)  # the others wait for this process before they evaluate
        raise
    finally:
        model.train(was_training)  # Detectron2 does so only where nothing is raised
