"""ResNeXt-101 32x4d with deformable convolution, 300 queries, 36 epochs: 51.3 AP published."""

from ..common.models.stageinteractor_x101_dcn import model
from .stageinteractor_r50_300q_crop_3x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)

model.initial_queries.num_queries = 300
# The weights that the authors start from, named as torchvision's.
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
)
train.output_dir = "output/stageinteractor_dx101_300q_3x"
