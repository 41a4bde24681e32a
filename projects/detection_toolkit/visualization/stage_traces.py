"""What happens inside of the decoder for one picture, collected by forward hooks.

Letters: S stages, N queries, K classes, L levels, T sampling points of a query (all groups), n
earlier stages whose channel filters a stage reuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from stageinteractor.boxes import xyzr_to_box

from ..errors import UserError

__all__ = ["StageTrace", "check_has_stages", "resize_trace", "trace_stages"]


class StageTrace(NamedTuple):
    """One stage and one picture; geometry in pixels of the original picture, all on the CPU."""

    detections: Instances
    """What the detector would answer if the decoder ended here."""
    scores: Tensor
    """(N, K) class scores."""
    boxes_before: Tensor
    """(N, 4) ``xyxy`` that the stage starts from."""
    boxes: Tensor
    """(N, 4) ``xyxy`` after the stage."""
    points: Tensor | None
    """(N, T, 2) sampling points; None if the stage does not sample at points."""
    level_weights: Tensor | None
    """(N, T, L) share of each feature level in each point; sums to 1."""
    channel_sources: tuple[int, ...]
    """The n earlier stages, counted from 0, whose channel filters are reused."""
    channel_shares: Tensor
    """(N, n) share of the reused filter in the adapted one, ``M'' = M + diag(r) (M_j - M)
    diag(c)``: the mean of ``r c`` over entries and groups, between 0 and 1."""
    spatial_source: int | None
    """The earlier stage whose spatial filters are reused."""
    spatial_shares: Tensor | None
    """(N,) likewise the mean of ``a b`` over the entries of the adapted spatial filters."""


def check_has_stages(detector: nn.Module) -> None:
    """
    Raises:
        ValueError: the detector has no cascade of stages to look at.
    """
    stages = getattr(getattr(detector, "decoder", None), "stages", None)
    if stages is None or not callable(getattr(detector, "inference_stages", None)):
        raise UserError(
            f"{type(detector).__name__} has no cascade of stages to look at: choose the config of "
            "a StageInteractor, AdaMixer or SQR detector"
        )


@torch.no_grad()
def trace_stages(detector: nn.Module, batched_input: dict[str, Any]) -> list[StageTrace]:
    """Run a detector on one picture and keep what its stages did.

    Args:
        detector: in evaluation mode, with a ``decoder`` of stages and ``inference_stages``. Its
            decoder must not be compiled, as hooks would not be called.
        batched_input: Detectron2's dict of the picture.

    Returns:
        S traces.

    Raises:
        ValueError: the detector has no stages.
    """
    check_has_stages(detector)
    stages = list(detector.decoder.stages)
    with _recording(stages) as seen:
        outputs, detections = detector.inference_stages([batched_input])
    height, width = batched_input["image"].shape[-2:]
    scale = torch.tensor(
        [batched_input.get("width", width) / width, batched_input.get("height", height) / height]
    )
    traces = []
    for index, (output, (instances,)) in enumerate(zip(outputs, detections)):
        record = seen[index]
        points = record.get("points")
        shares = record.get("channel")
        num_reused = 0 if shares is None else shares.shape[1]
        traces.append(
            StageTrace(
                detections=instances.to("cpu"),
                scores=output.logits[0].float().sigmoid().cpu(),
                boxes_before=_to_cpu(xyzr_to_box(record["xyzr"])[0]) * scale.repeat(2),
                boxes=_to_cpu(output.boxes[0]) * scale.repeat(2),
                points=None if points is None else points * scale,
                level_weights=record.get("weights"),
                channel_sources=tuple(range(index - num_reused, index)),
                channel_shares=torch.zeros(len(output.logits[0]), 0) if shares is None else shares,
                spatial_source=index - 1 if "spatial" in record else None,
                spatial_shares=record.get("spatial"),
            )
        )
    return traces


def resize_trace(trace: StageTrace, height: int, width: int) -> StageTrace:
    """The same trace in pixels of the picture at another size; the given one stays as it is."""
    old_height, old_width = trace.detections.image_size
    scale = torch.tensor([width / old_width, height / old_height])
    fields = dict(trace.detections.get_fields())
    fields["pred_boxes"] = Boxes(fields["pred_boxes"].tensor * scale.repeat(2))
    return trace._replace(
        detections=Instances((height, width), **fields),
        boxes_before=trace.boxes_before * scale.repeat(2),
        boxes=trace.boxes * scale.repeat(2),
        points=None if trace.points is None else trace.points * scale,
    )


@contextlib.contextmanager
def _recording(stages: list[nn.Module]) -> Iterator[list[dict[str, Tensor]]]:
    """Hooks on the stages' parts; the tensors of the first (only) picture that they see."""
    seen: list[dict[str, Tensor]] = [{} for _ in stages]
    handles = []
    try:
        for record, stage in zip(seen, stages):
            handles.append(stage.register_forward_pre_hook(_keep_geometry(record)))
            if hasattr(getattr(stage, "sampling", None), "points"):
                handles.append(stage.sampling.register_forward_pre_hook(_keep_points(record)))
            if isinstance(getattr(stage, "mixing", None), nn.Module):
                handles.append(stage.mixing.register_forward_pre_hook(_keep_gates(record)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_geometry(record: dict[str, Tensor]):
    def hook(stage: nn.Module, arguments: tuple) -> None:
        record["xyzr"] = arguments[0].geometry

    return hook


def _keep_points(record: dict[str, Tensor]):
    def hook(sampling: nn.Module, arguments: tuple) -> None:
        queries, xyzr, maps = arguments
        points = sampling.points(queries, xyzr)
        weights = sampling.level_weights(points.z, maps.strides)
        record["points"] = _to_cpu(points.xy[0].flatten(1, 2))
        record["weights"] = _to_cpu(weights[0].flatten(1, 2))

    return hook


def _keep_gates(record: dict[str, Tensor]):
    def hook(mixing: nn.Module, arguments: tuple) -> None:
        queries = arguments[0]
        channel = getattr(mixing, "channel_adapter", None)
        if channel is not None:
            column, row = channel.gate_values(queries)[0].unbind(-2)  # (N, G, e, n) each
            # The mean of all products r_i c_k is the product of the means.
            record["channel"] = _to_cpu((column.mean(2) * row.mean(2)).mean(1))
        spatial = getattr(mixing, "spatial_adapter", None)
        if spatial is not None:
            a, b = (gates[0] for gates in spatial.gate_values(queries))
            record["spatial"] = _to_cpu((a.mean(2) * b.mean(2)).mean(1))

    return hook


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
