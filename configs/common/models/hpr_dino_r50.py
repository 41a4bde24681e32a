"""HPR on DINO with ResNet-50, four levels and 900 queries, as released."""

from hpr import HPR, HybridCriterion, HybridDecoder

from .dino_mmdet_r50 import model

model._target_ = HPR
model.decoder._target_ = HybridDecoder
del model.decoder["shared_head"]  # each stage has its own
model.decoder.update(
    merge="channel",
    merge_start=[1.0, 1.0, 1.0],  # primary, dynamic convolution, regional cross-attention
    inner_channels=64,
    num_samples=5,
    finest_scale=56,
    roi_strides=None,  # those of the maps
)
model.criterion._target_ = HybridCriterion
model.criterion.auxiliary = dict(regional=0.5, dynamic=0.5)
model.pixel_std = [58.335, 57.12, 57.375]  # red as in the released files, 58.395 elsewhere
