"""What a model costs: parameters, multiply-adds, activations and memory, module by module."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fvcore.nn
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..config import apply_overrides, get_config
from ..modeling.detector import QueryDetector
from ..modeling.execution import PLAIN

__all__ = [
    "ModelCosts",
    "ModuleCosts",
    "Published",
    "analyze",
    "count",
    "model_table",
    "module_table",
    "operator_table",
    "peak_memory",
    "prepare",
]

PROPOSALS, DETECTIONS = 1000, 100
LAYERS = ("conv", "linear", "batch_norm", "layer_norm", "group_norm")


@dataclass(frozen=True)
class Published:
    """What authors state of a model; None where they do not."""

    mparams: float | None = None
    gflops: float | None = None


@dataclass
class ModuleCosts:
    """Costs of a module with all below it."""

    name: str
    kind: str
    parameters: int
    trainable: int
    flops: float
    activations: int
    peak_memory: int | None = None
    """Bytes in use at the worst moment while it runs; None where that was not measured."""


@dataclass
class ModelCosts:
    """Costs of a model; the first module is the model itself."""

    config: str
    height: int
    width: int
    modules: list[ModuleCosts]
    operators: dict[str, float]
    """FLOPs by operator."""
    not_counted: dict[str, int]
    """Calls of operators that count nothing."""
    published: Published = field(default_factory=Published)

    @property
    def total(self) -> ModuleCosts:
        return self.modules[0]


def _numel(value: Any) -> int:
    return math.prod(get_shape(value))


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return _numel(inputs[1]) * get_shape(inputs[2])[-1]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Products of queries (..., N, d) with keys (..., M, d), and of the result with values."""
    return 2 * _numel(inputs[0]) * get_shape(inputs[1])[-2]


def _multi_head_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """PyTorch's fused self-attention of (B, N, C): four projections and two products."""
    batch, length, channels = get_shape(inputs[0])
    return batch * length * channels * (4 * channels + 2 * length)


def _lerp(inputs: list[Any], outputs: list[Any]) -> int:
    return _numel(outputs[0])


def _embedding_bag(inputs: list[Any], outputs: list[Any]) -> int:
    """Weighted sums of rows."""
    return _numel(inputs[1]) * get_shape(inputs[0])[-1]


def _deform_conv(inputs: list[Any], outputs: list[Any]) -> int:
    """The convolution, and four neighbours of each of its inputs."""
    out_channels, in_per_group, *kernel = get_shape(inputs[1])
    batch, in_channels = get_shape(inputs[0])[:2]
    places = batch * math.prod(get_shape(outputs[0])[-2:]) * math.prod(kernel)
    return places * (out_channels * in_per_group + 4 * in_channels)


FLOP_HANDLES = {
    "aten::baddbmm": _baddbmm,
    "aten::scaled_dot_product_attention": _attention,
    "aten::_native_multi_head_attention": _multi_head_attention,
    "aten::lerp": _lerp,
    "aten::embedding_bag": _embedding_bag,
    "torchvision::deform_conv2d": _deform_conv,
}
_ACTIVATION_HANDLES = {
    name: fvcore.nn.jit_handles.generic_activation_jit(name.split("::")[1])
    for name in ("aten::baddbmm", "aten::mm", "torchvision::deform_conv2d")
}


class _AllStages(nn.Module):
    """Every stage's answer up to the answering one's: a trace leaves out what that one does not
    need, but it is run."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return self.model.inference_stages(inputs)[1][: self.model.answering_stage + 1]


def count(model: nn.Module, inputs: Any) -> tuple[list[ModuleCosts], Counter, Counter]:
    """Count what a model does with some inputs.

    Args:
        model: in evaluation mode; any device.
        inputs: its argument, as Detectron2's list of dicts, or a tuple of its arguments.

    Returns:
        the model (named "") and all its modules in their order; FLOPs by operator; number of
        calls of operators that count nothing.
    """
    is_cascade = isinstance(model, QueryDetector)
    traced = _AllStages(model) if is_cascade else model
    path = "model.model" if is_cascade else "model"  # within fvcore's wrapper
    flops = FlopCountAnalysis(traced, inputs)
    flops.set_op_handle(**FLOP_HANDLES)
    adapter = TracingAdapter(traced, inputs, allow_non_tensor=True)
    activations = fvcore.nn.ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    activations.set_op_handle(**_ACTIVATION_HANDLES)
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
    with torch.no_grad():
        flops_of, activations_of = flops.by_module(), activations.by_module()
    modules = []
    for name, module in model.named_modules():
        key = f"{path}.{name}" if name else path
        parameters = list(module.parameters())
        modules.append(
            ModuleCosts(
                name,
                type(module).__name__,
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                flops_of[key],
                activations_of[key],
            )
        )
    return modules, flops.by_operator(), flops.unsupported_ops()


@torch.no_grad()
def peak_memory(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Bytes of parameters, buffers and tensors at the worst moment of one inference.

    Returns:
        for the model (named "") and, on the CPU, each of its modules that is called: what is in
        use in the whole process, not by the module alone, at the worst moment while it runs.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        model(inputs)
        return {"": torch.cuda.max_memory_allocated(device)}
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with _named_calls(model):
            model(inputs)
    events = recorded.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times = np.array([time for time, _ in allocations], dtype=np.int64)
    in_use = sum(stored.values()) + np.cumsum([0, *(nbytes for _, nbytes in allocations)])
    peaks: dict[str, int] = {}
    for event in events:
        if event.name().startswith(_CALL):
            name = event.name()[len(_CALL) :]
            start, end = event.start_ns(), event.start_ns() + event.duration_ns()
            # Element k of in_use is what is left after k allocations.
            first, last = np.searchsorted(times, start), np.searchsorted(times, end, "right")
            peaks[name] = max(peaks.get(name, 0), int(in_use[first : last + 1].max()))
    return peaks


_CALL = "call of "


@contextlib.contextmanager
def _named_calls(model: nn.Module) -> Iterator[None]:
    """Let a profiler see when which module runs."""
    running: list[record_function] = []
    handles = []

    def start(name: str, *_: Any) -> None:
        running.append(record_function(_CALL + name).__enter__())

    def stop(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(start, name)))
        handles.append(module.register_forward_hook(stop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prepare(cfg: DictConfig, device: str, *, step_by_step: bool = True) -> nn.Module:
    """The model of a config, untrained, in evaluation mode.

    A two-stage detector is made to find as many objects as there is room for: every class score
    counts, and no box suppresses another.

    Args:
        cfg: changed in place.
        device: where the model is to be.
        step_by_step: compute as the equations have it, in operators that fvcore knows; otherwise
            in the faster ways that the config chooses.
    """
    if step_by_step and OmegaConf.select(cfg, "model.execution") is not None:
        cfg.model.execution.update(PLAIN)
    if OmegaConf.select(cfg, "model.roi_heads.box_predictor") is not None:
        predictor = cfg.model.roi_heads.box_predictor
        predictor.update(test_score_thresh=0.0, test_nms_thresh=2.0)
        predictor.test_topk_per_image = DETECTIONS
        if "soft_nms" in predictor:
            predictor.soft_nms = False
        cfg.model.proposal_generator.nms_thresh = 2.0
        cfg.model.proposal_generator.post_nms_topk = [PROPOSALS, PROPOSALS]
    if OmegaConf.select(cfg, "model.backbone.bottom_up.pretrained"):
        cfg.model.backbone.bottom_up.pretrained = False  # costs need no download
    torch.manual_seed(0)
    return instantiate(cfg.model).to(device).eval()


def analyze(
    config: str,
    overrides: Sequence[str] = (),
    *,
    size: tuple[int, int] = (800, 1333),
    device: str = "cpu",
    with_memory: bool = True,
    published: Mapping[str, Published] | None = None,
    trust_config: bool = False,
) -> ModelCosts:
    """Costs of one config's model for one image of (height, width) pixels.

    Args:
        published: by the config's name below ``configs/``; left out where there are overrides.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

    Raises:
        FileNotFoundError, UserError: there is no such config, or an override does not fit.
    """
    cfg = apply_overrides(get_config(config, trust_config=trust_config), list(overrides))
    height, width = size
    image = torch.zeros(3, height, width)
    inputs: Any = [{"image": image, "height": height, "width": width}]
    if OmegaConf.select(cfg, "model.pixel_mean") is None:
        inputs = image[None].to(device)  # a network that leaves the normalising to others
    modules, operators, not_counted = count(prepare(cfg.copy(), device), inputs)
    if with_memory:
        peaks = peak_memory(prepare(cfg.copy(), device, step_by_step=False), inputs)
        for module in modules:
            module.peak_memory = peaks.get(module.name)
    known = "/".join(Path(config).parts[-2:])
    return ModelCosts(
        config=known,
        height=height,
        width=width,
        modules=modules,
        operators=dict(operators),
        not_counted=dict(not_counted),
        published=Published() if overrides else (published or {}).get(known, Published()),
    )


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:.0f}"


def module_table(costs: ModelCosts, depth: int) -> str:
    """A row for each module down to a depth, in Markdown."""
    rows = []
    for module in costs.modules:
        level = module.name.count(".") + 1 if module.name else 0
        if level > depth or not (module.parameters or module.flops):
            continue
        rows.append(
            [
                module.name or "all",
                module.kind,
                f"{module.parameters:,}",
                f"{module.trainable:,}",
                f"{module.flops / 1e9:.3f}",
                f"{module.activations / 1e6:.2f}",
                _mebibytes(module.peak_memory),
            ]
        )
    headers = ["module", "class", "parameters", "trainable", "GFLOPs", "activations, M"]
    headers.append("peak memory, MiB")
    alignment = ["left", "left", *["right"] * 5]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment)


def model_table(all_costs: Sequence[ModelCosts]) -> str:
    """A row for each config, in Markdown."""

    def text(value: float | None, places: str) -> str:
        return "" if value is None else format(value, places)

    rows = [
        [
            costs.config[: -len(".py")] if costs.config.endswith(".py") else costs.config,
            f"{costs.total.parameters / 1e6:.2f}",
            text(costs.published.mparams, "g"),
            f"{costs.total.trainable / 1e6:.2f}",
            f"{costs.total.flops / 1e9:.1f}",
            text(costs.published.gflops, "g"),
            f"{costs.total.activations / 1e6:.0f}",
            _mebibytes(costs.total.peak_memory),
        ]
        for costs in all_costs
    ]
    headers = [
        "config",
        "parameters, M",
        "published",
        "trainable, M",
        "GFLOPs",
        "published",
        "activations, M",
        "peak memory, MiB",
    ]
    alignment = ["left", *["right"] * 7]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment)


def operator_table(all_costs: Sequence[ModelCosts]) -> str:
    """A row for each operator that counts, a column for each config, in Markdown."""
    counted = [{k: v for k, v in costs.operators.items() if v} for costs in all_costs]
    names = sorted(set().union(*counted))

    def row(label: str, parts: Sequence[str]) -> list[str]:
        return [label, *(f"{sum(c.get(part, 0) for part in parts) / 1e9:.4f}" for c in counted)]

    rows = [row(name, [name]) for name in names]
    rows += [row("layers", LAYERS), row("all", names)]
    headers = ["GFLOPs", *(Path(costs.config).stem for costs in all_costs)]
    alignment = ["left", *["right"] * len(counted)]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment)
