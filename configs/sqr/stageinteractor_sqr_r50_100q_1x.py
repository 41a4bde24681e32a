"""StageInteractor with SQR, ResNet-50, 100 queries, 12 epochs: no published figure."""

from detectron2.config import LazyCall as L

from sqr import QueryRecollection, selective_schedule

from ..stageinteractor.stageinteractor_r50_100q_1x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.decoder.route = L(QueryRecollection)(
    schedule=L(selective_schedule)(num_stages="${...num_stages}"),
)
train.output_dir = "./output/stageinteractor_sqr_r50_100q_1x"
