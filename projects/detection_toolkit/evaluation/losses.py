"""The losses of training, on a test set."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import NonFinitePredictionError
from ..modeling import CascadeDecoder, QueryDetector
from ..structures import StageOutput
from ..training import Criterion
from .truth import (
    annotated_records,
    collate_objects,
    count_needed_classes,
    objects_as_seen,
    objects_of,
)

__all__ = ["VALIDATION", "LossEvaluator", "build_loss_evaluator"]

logger = logging.getLogger(__name__)

# Its name among the results.
VALIDATION = "validation"
# Without "loss", which Detectron2 would have on every later line of the console.
_NAMES = ("cls", "bbox", "giou")
_NONE = "there is no validation loss: %s"


class LossEvaluator(DatasetEvaluator):
    """The losses of every stage on a test set, from the forward passes of an evaluation.

    They are sums over all images, divided by what the criterion's normaliser makes of the counts
    of all images: neither batches nor processes matter. Crowds are no objects, as in training.
    """

    def __init__(
        self, records: Sequence[Mapping[str, Any]], decoder: CascadeDecoder, criterion: Criterion
    ):
        """
        Args:
            records: Detectron2's dicts of the data set, with "annotations" of the model's classes.
            decoder: of the model that is evaluated.
            criterion: of its stages.
        """
        self._truth = {record["image_id"]: objects_of(record) for record in records}
        self._criterion = criterion
        self._decoder = decoder
        self._outputs: Sequence[StageOutput] = ()
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self._problem = ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, all stages of the decoder are run, and what they predict is noted."""

        def note(module: nn.Module, inputs: Any, outputs: Sequence[StageOutput]) -> None:
            self._outputs = outputs

        handle = self._decoder.register_forward_hook(note)
        try:
            with self._decoder.with_all_stages():
                yield
        finally:
            handle.remove()
            self._outputs = ()

    @torch.no_grad()
    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: of the model.
            outputs: of the model; what its stages have predicted before counts instead.
        """
        stages, self._outputs = self._outputs, ()
        if self._problem:
            return
        if not stages or len(stages[0].logits) != len(inputs):
            self._problem = "the model answers in another way than by one pass through its stages"
            return
        keys = {"image_id", "width", "height"}
        strange = [x for x in inputs if not keys <= x.keys() or x["image_id"] not in self._truth]
        if strange:
            self._problem = f"{strange[0].get('file_name', 'an image')} is none of the data set's"
            return
        objects = [objects_as_seen(self._truth[x["image_id"]], x) for x in inputs]
        truth = collate_objects(objects, inputs, device=stages[0].boxes.device)
        try:
            sums = self._criterion.loss_sums(stages, truth).double()
        except NonFinitePredictionError as error:
            self._problem = str(error)
            return
        self._sums = sums if self._sums is None else self._sums + sums

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            {"validation": {"total", "cls", "bbox", "giou", "stage0/cls", ...}}; empty but in the
            main process, and where the losses are not those of all images.
        """
        own = None if self._sums is None else self._sums.cpu()
        gathered = comm.gather((own, self._problem))
        if not comm.is_main_process():
            return {}
        problems = [problem for _, problem in gathered if problem]
        sums = [part for part, _ in gathered if part is not None]
        if problems or not sums:
            logger.warning(_NONE, (*problems, "no image")[0])
            return {}
        losses = self._criterion.losses_of_sums(torch.stack(sums).sum(0))  # (S, 3)
        values = {"total": float(losses.sum())}
        values |= dict(zip(_NAMES, losses.sum(0).tolist()))
        for stage, of_stage in enumerate(losses.tolist()):
            for name, value in zip(_NAMES, of_stage):
                values[f"stage{stage}/{name}"] = value
        return {VALIDATION: values}


def build_loss_evaluator(model: nn.Module, dataset_name: str) -> LossEvaluator | None:
    """That of a model on a data set; None where there are no losses.

    These are other models than query-based detectors, those without a criterion or with one of
    another kind, and data sets without annotations, or with objects of classes that the model
    lacks, which is logged.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, QueryDetector):
        return None
    criterion = getattr(model.criterion, "of_stages", None)
    if not isinstance(criterion, Criterion):
        return None
    records = annotated_records(dataset_name)
    if not records:
        return None
    needed = count_needed_classes(records)
    if needed > model.num_classes:
        reason = f"{dataset_name} needs {needed} classes, and the model has {model.num_classes}"
        logger.warning(_NONE, reason)
        return None
    return LossEvaluator(records, model.decoder, criterion)
