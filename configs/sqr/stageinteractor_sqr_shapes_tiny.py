"""The tiny StageInteractor with SQR on the built-in shapes."""

from detectron2.config import LazyCall as L

from sqr import RecollectionDetector, selective_schedule

from ..stageinteractor.shapes_tiny import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.update(
    _target_=RecollectionDetector,
    schedule=L(selective_schedule)(num_stages="${..decoder.num_stages}"),
)
train.output_dir = "./output/stageinteractor_sqr_shapes_tiny"
