"""How config.yaml of older runs asks for recollection: as a detector of its own."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from detection_toolkit.config import register_moved_names

__all__ = ["MOVED_NAMES"]


def _route_of_the_decoder(model: DictConfig) -> None:
    """``schedule`` and ``batched`` of the detector become the route of its decoder."""
    document = cast("dict[str, Any]", OmegaConf.to_container(model, resolve=False))
    route = {
        "_target_": "sqr.QueryRecollection",
        **{key: document[key] for key in ("schedule", "batched") if key in document},
    }
    schedule = route.get("schedule")
    if isinstance(schedule, dict) and schedule.get("num_stages") == "${..decoder.num_stages}":
        schedule["num_stages"] = "${...num_stages}"
    OmegaConf.update(model, "decoder.route", route, force_add=True)
    for key in ("schedule", "batched"):
        model.pop(key, None)
    model._target_ = "stageinteractor.StageInteractor"


MOVED_NAMES = {
    "sqr.RecollectionDetector": _route_of_the_decoder,
    "sqr.detector.RecollectionDetector": _route_of_the_decoder,
}

register_moved_names(MOVED_NAMES)
