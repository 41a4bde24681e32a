"""A Deformable DETR small enough to train on two CPU cores, refining its boxes."""

from detectron2.config import LazyCall as L

from detection_toolkit.modeling import PlainConvNet

from .deformable_detr_refine_r50 import model


def make_tiny(config):
    """Make a model of this family small."""
    config.num_classes = 6
    config.backbone.bottom_up = L(PlainConvNet)(widths=[32, 64, 96, 96])
    config.backbone.out_channels = 64
    config.backbone.norm_groups = 8
    config.initial_queries.num_queries = 20
    config.encoder.update(num_layers=2, num_heads=4, ffn_channels=128, dropout=0.0)
    config.decoder.update(num_stages=4, num_heads=4, ffn_channels=128, dropout=0.0)
    config.max_detections = 20


make_tiny(model)
