"""A trained detector for tools that look inside: nothing is drawn of weights that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..checkpoint.checkpointer import inference_weights
from ..checkpoint.official import adapt_checkpoint
from ..checkpoint.official_files import read_checkpoint
from ..errors import UserError
from ..modeling import require_query_detector
from .predictor import Predictor, predictor_config

__all__ = ["build_inspected_detector"]


def build_inspected_detector(
    config_file: str, overrides: Sequence[str] = (), *, weights: str | None = None
) -> Predictor:
    """The predictor of a config, once it is sure that every weight comes from the checkpoint.

    The decoder is not compiled, whatever the config says, so that its parts can be recorded.

    Args:
        config_file: path of a config, or its name among the packaged ones.
        overrides: ``key=value``, among them ``train.init_checkpoint=FILE``; without it the config
            of the shipped checkpoint uses that.
        weights: checkpoint; takes the place of ``train.init_checkpoint``.

    Raises:
        ValueError: no checkpoint is named but the one that training starts with, it belongs to
            another config, or the detector has no stages.
        FileNotFoundError: no such config or checkpoint.
        KeyError: an override of a key that does not exist.
    """
    cfg = predictor_config(config_file, overrides, weights=weights)
    path = cfg.train.init_checkpoint
    named = weights is not None or any(x.startswith("train.init_checkpoint") for x in overrides)
    # An address in a config is that of the backbone's weights, with which training starts.
    if not path or ("://" in path and not named):
        raise UserError(
            f"no trained weights for {config_file}: name a checkpoint with "
            "train.init_checkpoint=FILE"
        )
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: correct train.init_checkpoint")
    if OmegaConf.select(cfg, "model.execution.compile"):
        cfg.model.execution.compile = ""
    return _CheckedPredictor(cfg, config_file)


class _CheckedPredictor(Predictor):
    """Loads nothing that does not fit: that would be a warning for each tensor."""

    def __init__(self, cfg: DictConfig, config_file: str):
        self._config_file = config_file
        super().__init__(cfg)

    def load_weights(self) -> None:
        require_query_detector(self.model, "a look at stages")
        path = self.cfg.train.init_checkpoint
        if "://" not in path:
            _check_weights(self, path, self._config_file)
        super().load_weights()


def _check_weights(predictor: Predictor, path: str, config_file: str) -> None:
    weights = inference_weights(
        adapt_checkpoint(read_checkpoint(path), predictor.model, path), prefer_ema=False
    )
    needed = predictor.model.state_dict()
    needed = {k: v for k, v in needed.items() if not k.endswith("num_batches_tracked")}
    missing = [name for name in needed if name not in weights]
    other_shape = [
        name
        for name, tensor in needed.items()
        if name in weights and tuple(weights[name].shape) != tuple(tensor.shape)
    ]
    surplus = [name for name in weights if name not in needed and name.startswith("decoder.")]
    wrong = [*missing, *other_shape, *surplus]
    if wrong:
        raise UserError(
            f"checkpoint {path} is not of config {config_file}: {len(missing)} tensors are "
            f"missing, {len(other_shape)} have another shape, {len(surplus)} of the decoder are "
            f"too many ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}). Use the "
            "config and the number of classes that it was trained with"
        )
