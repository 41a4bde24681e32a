"""Small detectors with and without recollection, for tests."""

from __future__ import annotations

import copy

import torch
from detectron2.config import instantiate
from loaded_configs import load_config
from small_runs import SMALL_MODEL

from detection_toolkit.config import apply_overrides
from sqr import QueryRecollection
from stageinteractor import StageInteractor

NUM_STAGES = 4
SMALL = {
    "stageinteractor": [*SMALL_MODEL, f"model.decoder.num_stages={NUM_STAGES}"],
    "adamixer": [
        *(x for x in SMALL_MODEL if "base_points" not in x and "sub_points" not in x),
        "model.decoder.points=4",
        f"model.decoder.num_stages={NUM_STAGES}",
    ],
}
CONFIGS = {"stageinteractor": "stageinteractor/shapes_tiny.py"}
CONFIGS["adamixer"] = "adamixer/adamixer_shapes_tiny.py"


def make_plain(family, *overrides, dtype=torch.float64):
    """The detector without recollection, past its initialisation, where many layers are zero."""
    cfg = apply_overrides(load_config(CONFIGS[family]), [*SMALL[family], *overrides])
    torch.manual_seed(0)
    detector = instantiate(cfg.model).to(dtype)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector.train()


def with_recollection(plain, schedule, **options):
    """The same detector, sharing its weights, trained by a schedule."""
    decoder = copy.copy(plain.decoder)
    decoder.route = QueryRecollection(schedule, **options)
    detector = StageInteractor(
        backbone=plain.backbone,
        initial_queries=plain.initial_queries,
        decoder=decoder,
        criterion=plain.criterion,
        num_classes=plain.num_classes,
        max_detections=plain.max_detections,
    )
    return detector.to(plain.pixel_mean.dtype).train()


def losses_and_gradients(detector, batch, **kwargs):
    """(names, losses, gradients of every parameter) of one training step."""
    detector.zero_grad()
    losses = detector(batch, **kwargs)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in detector.named_parameters()}
    return {name: x.detach() for name, x in losses.items()}, gradients
