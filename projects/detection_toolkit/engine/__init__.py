"""Training, evaluation and prediction; thin, as Detectron2 does the work.

Its parts are imported when they are first used: a command line needs a few to print its help, and
those load neither PyTorch nor Detectron2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..on_demand import names_on_demand

if TYPE_CHECKING:
    from .detections import to_supervision
    from .errors import user_errors
    from .evaluation import EvaluationFacts
    from .interruption import ended_by_signals
    from .predictor import Predictor
    from .processes import check_gpus_are_there, launch
    from .settings import RunSettings
    from .setup import prepare_config
    from .shipped import shipped_checkpoint, shipped_config
    from .tiling import TiledPredictor, Tiling
    from .tracking import Tracker
    from .trainer import Trainer

__all__ = [
    "EvaluationFacts",
    "Predictor",
    "RunSettings",
    "TiledPredictor",
    "Tiling",
    "Tracker",
    "Trainer",
    "check_gpus_are_there",
    "ended_by_signals",
    "launch",
    "prepare_config",
    "shipped_checkpoint",
    "shipped_config",
    "to_supervision",
    "user_errors",
]

__getattr__ = names_on_demand(
    __name__,
    {
        "EvaluationFacts": "evaluation",
        "Predictor": "predictor",
        "RunSettings": "settings",
        "TiledPredictor": "tiling",
        "Tiling": "tiling",
        "Tracker": "tracking",
        "Trainer": "trainer",
        "check_gpus_are_there": "processes",
        "ended_by_signals": "interruption",
        "launch": "processes",
        "prepare_config": "setup",
        "shipped_checkpoint": "shipped",
        "shipped_config": "shipped",
        "to_supervision": "detections",
        "user_errors": "errors",
    },
)
