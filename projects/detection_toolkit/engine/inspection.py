"""A trained detector for tools that look inside."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from ..modeling import require_query_detector
from .predictor import Predictor, predictor_config

__all__ = ["build_inspected_detector"]


def build_inspected_detector(
    config_file: str, overrides: Sequence[str] = (), *, trust_config: bool = False
) -> Predictor:
    """The predictor of a config, which must be a query-based detector's.

    The decoder is not compiled, whatever the config says, so that its parts can be recorded.

    Args:
        config_file: path of a config, or its name among the packaged ones.
        overrides: ``key=value``, among them ``train.init_checkpoint=FILE``; without it the config
            of the shipped checkpoint uses that.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

    Raises:
        ValueError: no checkpoint is named but the one that training starts with, it belongs to
            another config, or the detector has no stages.
        FileNotFoundError: no such config or checkpoint.
        KeyError: an override of a key that does not exist.
    """
    cfg = predictor_config(config_file, overrides, trust_config=trust_config)
    if OmegaConf.select(cfg, "model.execution.compile"):
        cfg.model.execution.compile = ""
    return _InspectedPredictor(cfg)


class _InspectedPredictor(Predictor):
    """Says that a detector has no stages before its weights are looked at."""

    def load_weights(self) -> None:
        require_query_detector(self.model, "a look at stages")
        super().load_weights()
