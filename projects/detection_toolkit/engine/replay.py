"""Try a batch again that training could not use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor, nn

from ..checkpoint.checkpointer import Checkpointer
from ..config import apply_overrides, get_config
from ..visualization import save_picture
from .bad_batch import read_bad_batch

__all__ = ["replay_batches"]


def replay_batches(
    file: str,
    *,
    config_file: str | None = None,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    trust_config: bool = False,
    pictures: str | None = None,
) -> bool:
    """Print what a stored step's batches give now: losses, and what is not finite.

    Args:
        file: of the batches, ``bad_batch/iter*_rank*.pth`` of a run.
        config_file: default: config.yaml of the run's folder.
        weights: default: those that the step was computed with, beside the batches.
        overrides: changes to the config.
        trust_config: see ``get_config``.
        pictures: folder for pictures of the batches with their boxes; None: draw none.

    Returns:
        whether all was finite.

    Raises:
        FileNotFoundError: the run has no config or no weights where they are looked for.
    """
    content = read_bad_batch(file)
    cfg = load_config(file, config_file, overrides, trust_config=trust_config)
    model = build_model(cfg, file, weights)
    print(f"iteration {content['iteration']}: {content['reason']}")
    torch.set_rng_state(content["random_state"])
    precision = getattr(torch, cfg.train.amp.precision) if cfg.train.amp.enabled else None
    finite = True
    for number, batch in enumerate(content["batches"]):
        names = ", ".join(str(x.get("file_name", "?")) for x in batch)
        print(f"\nbatch {number}: {names}")
        if pictures:
            channels = cfg.dataloader.train.mapper.get("image_format", "RGB")
            draw(batch, Path(pictures), number, channels)
        device = torch.device(cfg.train.device).type
        with torch.autocast(device, dtype=precision, enabled=precision is not None):
            finite = replay(model, batch) and finite
    return finite


def load_config(
    file: str, config_file: str | None, overrides: Sequence[str], *, trust_config: bool
) -> DictConfig:
    """The run's config, or the one that is named."""
    path = config_file or Path(file).resolve().parents[1] / "config.yaml"
    if not config_file and not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: name the run's config with --config-file")
    return apply_overrides(get_config(str(path), trust_config=trust_config), overrides)


def build_model(cfg: DictConfig, file: str, weights: str | Path | None) -> nn.Module:
    """The detector in training mode, with the weights of the step."""
    if weights is None:
        path = Path(file)
        weights = path.with_name(f"{path.stem}_weights.pth")
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights} does not exist, as it was a step that was only skipped: name a "
                "checkpoint of the run with --weights"
            )
    model = instantiate(cfg.model).to(cfg.train.device)
    Checkpointer(model, strict=True).load(str(weights))
    return model.train()


class NonFiniteOutputs:
    """Notes the modules of a model whose outputs are not finite, in the order of their calls."""

    def __init__(self, model: nn.Module):
        self.names: list[str] = []
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(partial(self._see, name))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not all(torch.isfinite(t).all() for t in tensors(output) if t.is_floating_point()):
            self.names.append(name)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    return []


def loss_table(losses: dict[str, float]) -> str:
    """One row a stage, one column a kind of loss."""
    stages: dict[str, dict[str, float]] = {}
    for name, value in losses.items():
        kind, _, stage = name.rpartition("_stage")
        stages.setdefault(stage or "-", {})[kind or name] = value
    rows = [{"stage": stage, **kinds} for stage, kinds in stages.items()]
    return tabulate(rows, headers="keys", floatfmt=".5g")


def replay(model: nn.Module, batch: list[dict[str, Any]]) -> bool:
    """Forward and backward pass of one batch; whether all was finite."""
    outputs = NonFiniteOutputs(model)
    try:
        with EventStorage():
            losses = model(batch)
    except FloatingPointError as error:
        print(f"forward pass: {error}")
        losses = {}
    if outputs.names:
        print(f"first module whose output is not finite: {outputs.names[0]}")
    if not losses:
        return False
    values = {name: float(value.detach()) for name, value in losses.items()}
    print(loss_table(values))
    total = sum(values.values())
    print(f"sum of the losses: {total:.6g}")
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    bad = [n for n, g in gradients.items() if not torch.isfinite(g).all()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    print(f"norm of the gradient: {norm:.6g}")
    if bad:
        print(f"gradients that are not finite: {len(bad)} of {len(gradients)}, first {bad[0]}")
    return math.isfinite(total) and not bad and not outputs.names


def draw(batch: list[dict[str, Any]], folder: Path, number: int, channels: str) -> None:
    """Pictures of the images as the model saw them, with the boxes of their objects."""
    for i, x in enumerate(batch):
        image = x["image"].permute(1, 2, 0).numpy().astype("uint8")
        picture = Visualizer(image[:, :, ::-1] if channels == "BGR" else image)
        if "instances" in x:
            picture.overlay_instances(
                boxes=x["instances"].gt_boxes,
                labels=[str(int(c)) for c in x["instances"].gt_classes],
            )
        path = folder / f"batch{number}_image{i}.png"
        save_picture(picture.get_output().get_image(), path)
        print(f"{path}: {x.get('file_name', '?')}")
