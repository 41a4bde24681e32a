"""DINO, ResNet-50, four levels, 12 epochs: 49.0 AP published."""

from detectron2.config import LazyCall as L

from detection_toolkit.training.param_groups import params_with_decay_exceptions

from ..common.models.dino_r50 import model
from ..common.schedule import ITERATIONS_PER_FULL_EPOCH as _EPOCH
from ..common.schedule import one_drop_schedule
from ..deformable_detr.deformable_detr_r50_50e import dataloader, optimizer, train

dataloader.train.total_batch_size = 16

optimizer.lr = 1e-4
optimizer.params = L(params_with_decay_exceptions)(
    base_lr="${..lr}", lr_factors={r"^backbone\.bottom_up\.": 0.1}
)
lr_multiplier = one_drop_schedule(12, 11)

train.max_iter = 12 * _EPOCH
train.eval_period = _EPOCH
train.checkpointer.period = _EPOCH
train.output_dir = "./output/dino_r50_4scale_12e"
