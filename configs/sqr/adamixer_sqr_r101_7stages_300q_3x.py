"""AdaMixer with SQR, ResNet-101, 7 stages, 300 queries, 36 epochs: 49.8 AP in the paper."""

from detectron2.config import LazyCall as L

from sqr import QueryRecollection, selective_schedule

from ..adamixer.adamixer_r101_300q_3x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.decoder.route = L(QueryRecollection)(
    schedule=L(selective_schedule)(num_stages="${...num_stages}"),
)
train.output_dir = "./output/adamixer_sqr_r101_7stages_300q_3x"

# Of this model only the result is released. Backbone, stages and queries are in its name; inferred
# are the schedule (the selective one, a stage longer), and everything else as AdaMixer's R101 with
# 300 queries: widths, optimiser, learning rate, augmentation, drops after epochs 24 and 33.
model.decoder.num_stages = 7
