"""StageInteractor with DFvT-S, 100 queries, 12 epochs. Not a released combination."""

from detectron2.config import LazyCall as L

from detection_toolkit.training.param_groups import params_with_decay_exceptions
from dfvt import NO_WEIGHT_DECAY, VARIANTS, DFvTBackbone

from .stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(DFvTBackbone)(**VARIANTS["small"], drop_path_rate=0.1)
optimizer.params = L(params_with_decay_exceptions)(no_weight_decay=list(NO_WEIGHT_DECAY))
# The ImageNet weights, as released or converted; see docs/dfvt.md.
train.init_checkpoint = ""
# See mask_rcnn_dfvt_tiny_1x.py: batch norms with live statistics.
train.ddp.broadcast_buffers = True
train.output_dir = "output/stageinteractor_dfvt_small_100q_1x"
