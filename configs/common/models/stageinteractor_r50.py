"""StageInteractor with ResNet-50 and 100 queries, as released."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from detection_toolkit.modeling import Execution, FrozenStatsBatchNorm2d, SharedNormChannelMapper
from detection_toolkit.training import Criterion, HungarianMatcher
from stageinteractor import (
    CrossStageMatcher,
    InitialQueries,
    StageInteractor,
    StageInteractorDecoder,
)

model = L(StageInteractor)(
    num_classes=80,
    backbone=L(SharedNormChannelMapper)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm=FrozenStatsBatchNorm2d),
            stages=L(ResNet.make_default_stages)(
                depth=50,
                stride_in_1x1=False,  # torchvision's layout
                norm=FrozenStatsBatchNorm2d,
            ),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,  # stem and res2
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
    ),
    initial_queries=L(InitialQueries)(
        num_queries=100,
        channels="${..backbone.out_channels}",
    ),
    decoder=L(StageInteractorDecoder)(
        num_classes="${..num_classes}",
        num_stages=6,
        channels="${..backbone.out_channels}",
        num_heads=8,
        ffn_channels=2048,
        groups=4,
        first_base_points=8,
        base_points=4,
        sub_points=8,
        out_points=128,
        reuse_start=2,
        execution="${..execution}",
    ),
    criterion=L(Criterion)(
        num_classes="${..num_classes}",
        matcher=L(HungarianMatcher)(class_weight=2.0, l1_weight=5.0, giou_weight=2.0),
        label_assigner=L(CrossStageMatcher)(iou_threshold=0.5),
        class_weight=2.0,
        l1_weight=5.0,
        giou_weight=2.0,
    ),
    pixel_mean=[123.675, 116.28, 103.53],  # RGB
    pixel_std=[58.395, 57.12, 57.375],
    max_detections="${.initial_queries.num_queries}",
    stages_at_test=None,  # all
    execution=L(Execution)(
        sampling="auto",  # "triton" on a GPU, else "gather"; or "grid", the plain form
        mixing="factored",  # or "direct" for the plain form
        channels_last=True,
        fold_norms=True,  # fixed batch norms go into the weights of the convolutions
        products="auto",  # on a CPU; auto: by oneDNN where it is AMD's and the model is not small
        checkpoint=False,  # less memory, more time
        compile="",  # mode of torch.compile for the decoder
        cuda_graphs=False,  # at inference: one recording per image size
    ),
)
