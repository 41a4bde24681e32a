"""Deformable DETR with ResNet-50 and 300 queries, as released, without refinement."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from deformable_detr import (
    DeformableDETR,
    DeformableDETRDecoder,
    DeformableEncoder,
    ExtraLevelMapper,
    LearnedQueries,
)
from detection_toolkit.modeling import Execution
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    Criterion,
    HungarianMatcher,
    MatchNormalizer,
    StagewiseMatcher,
)


def criterion(kind, num_classes):
    """The losses of the paper: of the stages, or of the proposals."""
    return L(kind)(
        num_classes=num_classes,
        matcher=L(HungarianMatcher)(
            class_weight=2.0, l1_weight=5.0, giou_weight=2.0, box_code=cxcywh_norm
        ),
        label_assigner=L(StagewiseMatcher)(),
        class_weight=2.0,
        l1_weight=5.0,
        giou_weight=2.0,
        box_code=cxcywh_norm,
        giou_eps=1e-7,
        normalizer=L(MatchNormalizer)(),
    )


_layers = dict(
    channels="${..backbone.out_channels}",
    num_levels=4,
    num_heads=8,
    num_points=4,
    ffn_channels=1024,
    dropout=0.1,
    execution="${..execution}",
)

model = L(DeformableDETR)(
    num_classes=80,
    backbone=L(ExtraLevelMapper)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,  # stem and res2
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
    ),
    encoder=L(DeformableEncoder)(num_layers=6, **_layers),
    initial_queries=L(LearnedQueries)(num_queries=300, channels="${..backbone.out_channels}"),
    decoder=L(DeformableDETRDecoder)(num_classes="${..num_classes}", num_stages=6, **_layers),
    criterion=criterion(Criterion, num_classes="${..num_classes}"),
    pixel_mean=[123.675, 116.28, 103.53],  # RGB
    pixel_std=[58.395, 57.12, 57.375],
    max_detections=100,
    stages_at_test=None,  # all
    execution=L(Execution)(
        sampling="auto",  # "triton" on a GPU, else "gather"; or "grid", the plain form
        mixing="factored",  # of other detectors
        channels_last=True,
        fold_norms=True,  # fixed batch norms go into the weights of the convolutions
        products="auto",  # on a CPU; auto: by oneDNN where it is AMD's and the model is not small
        checkpoint=False,  # less memory, more time
        compile="",  # mode of torch.compile for the decoder
        cuda_graphs=False,  # at inference: one recording per image size
    ),
)
