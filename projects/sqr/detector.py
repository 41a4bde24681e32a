"""The meta-architecture with recollection in training."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import nn

from detection_toolkit.modeling import CascadeDecoder, Execution
from detection_toolkit.structures import StageOutput
from detection_toolkit.training import Criterion
from stageinteractor import StageInteractor

from .criterion import RecollectionCriterion
from .recollection import recollect
from .schedule import RecollectionSchedule, ScheduleError

__all__ = ["RecollectionDetector"]


@META_ARCH_REGISTRY.register()
class RecollectionDetector(StageInteractor):
    """A detector of this family, trained with query recollection.

    Its parameters, their names and its inference are those of
    :class:`~stageinteractor.StageInteractor`, so that the weights of one are the weights
    of the other.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        initial_queries: nn.Module,
        decoder: CascadeDecoder,
        criterion: Criterion | None,
        num_classes: int,
        schedule: RecollectionSchedule,
        batched: bool = True,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        size_divisibility: int = 32,
        max_detections: int = 100,
        execution: Execution | None = None,
    ):
        """
        Args:
            schedule: which queries each stage is given in training.
            batched: how the groups are run; see :func:`sqr.recollect`.

        All others are those of ``StageInteractor``.

        Raises:
            ScheduleError: the schedule is for another number of stages than the decoder has.
        """
        super().__init__(
            backbone=backbone,
            initial_queries=initial_queries,
            decoder=decoder,
            criterion=criterion,
            num_classes=num_classes,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            size_divisibility=size_divisibility,
            max_detections=max_detections,
            execution=execution,
        )
        if not isinstance(schedule, RecollectionSchedule):
            raise ScheduleError(
                f"model.schedule must be a schedule, such as sqr.selective_schedule, or "
                f"sqr.plain_schedule for none; it is {schedule!r}"
            )
        schedule.check_fits(self.decoder.num_stages)
        self.schedule = schedule
        self.batched = batched
        if criterion is not None:
            self.criterion = RecollectionCriterion(criterion, schedule)

    def predict_stages(self, images: ImageList) -> list[StageOutput]:
        """Predictions for a normalised batch: of all groups in training, else of all stages."""
        if not self.training:
            return super().predict_stages(images)
        queries, xyzr = self.initial_queries(images.image_sizes)
        features = self.decoder.prepare_maps(self.extract_features(images), xyzr.dtype)
        return recollect(
            self.decoder,
            self.schedule,
            features,
            strides=self.strides,
            queries=queries,
            xyzr=xyzr,
            batched=self.batched,
        )
