"""Loading and saving, on Detectron2's checkpointer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from tabulate import tabulate

from .official import adapt_checkpoint
from .official_files import read_checkpoint

__all__ = ["BEST_CHECKPOINT", "Checkpointer", "ResumeError", "inference_weights"]

logger = logging.getLogger(__name__)

BEST_CHECKPOINT = "model_best"


class ResumeError(ValueError):
    """A checkpoint does not belong to the model that was to be resumed."""


class Checkpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer``, which says what it could not load.

    As an initialisation, a checkpoint whose classes or queries differ from the config's is loaded
    as far as it fits, and one table lists the tensors left out. As the state to resume from, it
    is refused.

    Files are read with ``weights_only=True``; the pickles of Detectron2's model zoo
    (``detectron2://...pkl``) are read as Detectron2 reads them. Checkpoints of the authors' code,
    and ImageNet weights of torchvision and timm, are recognised and converted. A checkpoint with
    averaged (EMA) weights initialises a model with the plain ones, unless ``prefer_ema`` is set.

    Attributes:
        loaded_ema: whether the weights in the model are the averaged ones of a checkpoint.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        prefer_ema: bool = False,
        **checkpointables: Any,
    ):
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: see ``DetectionCheckpointer``.
            prefer_ema: load averaged weights into the model where the file has them.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.prefer_ema = prefer_ema
        self.loaded_ema = False
        self._resuming = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Raises:
            FileNotFoundError: there is no such file.
            CheckpointFileError: it is damaged, or opening it would run code.
            CheckpointMismatchError: it is an official checkpoint, or ImageNet weights, of another
                network.
            ResumeError: see :meth:`resume_or_load`.
        """
        if path and "://" not in path and not Path(path.split("?")[0]).is_file():
            raise FileNotFoundError(
                f"checkpoint {path} does not exist"
                + (
                    f", although {Path(self.save_dir, 'last_checkpoint')} names it: write another "
                    "file's name there"
                    if self._resuming
                    else ": set train.init_checkpoint to a file, to detectron2://..., or to "
                    '"" to start from random weights'
                )
            )
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's; a checkpoint to resume from must fit the model exactly.

        Raises:
            ResumeError: it does not; the message lists the tensors.
            FileNotFoundError: there is no such file.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # The best checkpoint lacks nothing, but resuming must go on from the newest one.
        if not last_filename_basename.startswith(BEST_CHECKPOINT):
            super().tag_last_checkpoint(last_filename_basename)

    def _torch_load(self, f: str) -> Any:
        return adapt_checkpoint(read_checkpoint(f), self.model, f)

    def _load_model(self, checkpoint: Any):
        self.loaded_ema = self.prefer_ema and "ema" in checkpoint
        if self.loaded_ema:
            logger.info("using the averaged (EMA) weights of the checkpoint")
            checkpoint["model"] = inference_weights(checkpoint)
        elif "ema" in checkpoint and not self._resuming:
            logger.info(
                "using the plain weights of the checkpoint, not the averaged (EMA) ones that it "
                "holds too; train.ema.enabled=true with --eval-only evaluates those"
            )
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        rows = [
            (key, _shape(in_checkpoint), _shape(in_model))
            for key, in_checkpoint, in_model in incompatible.incorrect_shapes
        ]
        table = tabulate(rows, headers=["tensor", "in the checkpoint", "in the model"])
        if self._resuming and (rows or incompatible.missing_keys or incompatible.unexpected_keys):
            missing = ", ".join(incompatible.missing_keys[:5]) or "none"
            surplus = ", ".join(incompatible.unexpected_keys[:5]) or "none"
            raise ResumeError(
                "the last checkpoint in the output directory belongs to another model and cannot "
                "be resumed: use the config that it was made with, or another train.output_dir, "
                "or name it as train.init_checkpoint without --resume.\n"
                f"{table}\nmissing: {missing}\nsurplus: {surplus}"
            )
        if rows:
            logger.warning(
                "%d tensors of the checkpoint do not fit the model, as its number of classes or "
                "queries differs. They are left as initialised; the rest is loaded.\n%s",
                len(rows),
                table,
            )
        left_out = {key for key, *_ in rows}
        super()._log_incompatible_keys(
            incompatible._replace(
                incorrect_shapes=[],
                missing_keys=[k for k in incompatible.missing_keys if k not in left_out],
            )
        )


def inference_weights(checkpoint: dict[str, Any], *, prefer_ema: bool = True) -> dict[str, Any]:
    """The model weights of a checkpoint: averaged ones if it has them and they are preferred."""
    if prefer_ema and "ema" in checkpoint:
        prefix = "module."
        return {
            key[len(prefix) :]: value
            for key, value in checkpoint["ema"].items()
            if key.startswith(prefix)
        }
    return checkpoint.get("model", checkpoint)


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"
