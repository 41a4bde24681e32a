"""Swin-S, 300 queries, multi-scale and crop augmentation, 36 epochs: 52.7 AP published."""

from detectron2.config import LazyCall as L

from detection_toolkit.training.param_groups import params_with_decay_exceptions

from ..common.models.stageinteractor_swin_s import model
from ..common.schedule import multistep_schedule
from .stageinteractor_r50_300q_crop_3x import dataloader, optimizer, train  # noqa: F401

model.initial_queries.num_queries = 300
# ImageNet-1k, 224 pixels, as published with Swin.
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_small_patch4_window7_224.pth"
)
# Released: no decay where the official name holds "norm" or "relative_position_bias_table". In
# the decoder these are the norms after attention, mixing and FFN; those of the prediction towers
# and of the neck are called otherwise there and do decay.
optimizer.params = L(params_with_decay_exceptions)(
    no_weight_decay=[
        r"^backbone\.bottom_up\..*norm",
        r"relative_position_bias_table",
        r"^decoder\.stages\.\d+\.(attention|mixing|ffn)\.norm\.",
    ]
)
lr_multiplier = multistep_schedule(36, (24, 33), warmup_iters=1000)
train.output_dir = "output/stageinteractor_swin_s_300q_3x"
