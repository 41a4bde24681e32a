"""Any Detectron2 backbone: RegNetX-4GF as an example, as in Detectron2's model zoo."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from detection_toolkit.modeling import FrozenStatsBatchNorm2d

from .stageinteractor_r50_100q_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    freeze_at=2,
    norm=FrozenStatsBatchNorm2d,
    out_features=["s1", "s2", "s3", "s4"],
)
model.backbone.in_features = ["s1", "s2", "s3", "s4"]
# These weights were trained on BGR images.
model.pixel_mean = [103.530, 116.280, 123.675]
model.pixel_std = [57.375, 57.120, 58.395]
dataloader.train.mapper.image_format = "BGR"  # the test mapper follows
train.init_checkpoint = (
    "https://dl.fbaipublicfiles.com/pycls/dds_baselines/160906383/RegNetX-4.0GF_dds_8gpu.pyth"
)
train.output_dir = "output/stageinteractor_regnetx_4gf_100q_1x"
