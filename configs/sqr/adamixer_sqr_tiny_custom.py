"""The tiny AdaMixer with SQR on a data set of your own."""

from detectron2.config import LazyCall as L

from sqr import QueryRecollection, selective_schedule

from ..adamixer.adamixer_tiny_custom import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    recipe,
    train,
)

model.decoder.route = L(QueryRecollection)(
    schedule=L(selective_schedule)(num_stages="${...num_stages}"),
)
train.output_dir = "./output/adamixer_sqr_tiny_custom"
