"""Training, evaluation and prediction; thin, as Detectron2 does the work."""

from .errors import user_errors
from .evaluation import EvaluationFacts
from .interruption import ended_by_signals
from .launch import check_gpus_are_there, launch
from .predictor import Predictor
from .settings import RunSettings
from .setup import prepare_config
from .shipped import shipped_checkpoint, shipped_config
from .trainer import Trainer

__all__ = [
    "EvaluationFacts",
    "Predictor",
    "RunSettings",
    "Trainer",
    "check_gpus_are_there",
    "ended_by_signals",
    "launch",
    "prepare_config",
    "shipped_checkpoint",
    "shipped_config",
    "user_errors",
]
