"""Mask R-CNN with DFvT-T, 12 epochs: 34.8 box AP and 32.6 mask AP in the paper."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from detection_toolkit.training.param_groups import params_with_decay_exceptions
from dfvt import (
    NO_WEIGHT_DECAY,
    VARIANTS,
    DFvTBackbone,
    RandomPolygonCrop,
    SoftNMSFastRCNNOutputLayers,
    SoftNMSRPN,
    get_instance_segmentation_dataset,
)

from ..common.data.coco_crop import dataloader
from ..common.schedule import schedule_1x as lr_multiplier
from ..common.train import train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(DFvTBackbone)(
    **VARIANTS["tiny"],
    drop_path_rate=0.1,
    out_features=["res2", "res3", "res4", "res5"],
    use_checkpoint=False,
)
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = "RGB"

# One switch for both: model.roi_heads.box_predictor.soft_nms
model.roi_heads.box_predictor._target_ = SoftNMSFastRCNNOutputLayers
model.roi_heads.box_predictor.soft_nms = False
model.proposal_generator._target_ = SoftNMSRPN
model.proposal_generator.soft_nms = "${..roi_heads.box_predictor.soft_nms}"

dataloader.train.dataset = L(get_instance_segmentation_dataset)(
    names="coco_2017_train",
    json_file=None,
    image_root=None,
    name=None,
    filter_empty=True,
    require_polygons=True,
)
dataloader.train.mapper.use_instance_mask = True
dataloader.train.mapper.instance_mask_format = "polygon"
dataloader.train.mapper.augmentations[1].tfm_or_aug.augs[1]._target_ = RandomPolygonCrop
dataloader.test.dataset = L(get_instance_segmentation_dataset)(
    names="coco_2017_val", json_file=None, image_root=None, name=None, filter_empty=False
)

optimizer = L(torch.optim.AdamW)(
    params=L(params_with_decay_exceptions)(no_weight_decay=list(NO_WEIGHT_DECAY)),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)

# The ImageNet weights, as released or converted; see docs/dfvt.md.
train.init_checkpoint = ""
train.output_dir = "output/mask_rcnn_dfvt_tiny_1x"
train.max_iter = 87960
train.eval_period = 7330
train.checkpointer.period = 7330
train.clip_grad.enabled = False
train.amp.enabled = train.device == "cuda"
# Batch norms learn from each process' own images. Without this their averages would differ between
# processes, and with them the evaluation of each process' share of the test set.
train.ddp.broadcast_buffers = True
