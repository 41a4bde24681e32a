"""What happens inside of the decoder for one picture.

Letters: S stages, N queries, K classes, L levels, T sampling points of a query (all groups).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..modeling import PointSampler, SampledPoints, require_query_detector
from .viewers import STAGE_VIEWERS

__all__ = ["StageTrace", "resize_trace", "trace_stages"]


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
    """(N, T, 2) sampling points; None if the stage has no
    :class:`~detection_toolkit.modeling.PointSampler`."""
    level_weights: Tensor | None
    """(N, T, L) share of each feature level in each point; sums to 1."""
    groups: Tensor | None
    """(T,) which of its module's groups, or heads, each point belongs to."""
    shares: Tensor | None
    """(N, T) share of each point in the sum of its group; None where points are not summed."""
    records: Mapping[str, Any]
    """What is a method's own, by the names of the viewers in
    :data:`~detection_toolkit.visualization.STAGE_VIEWERS` that recorded it."""


@torch.no_grad()
def trace_stages(detector: nn.Module, batched_input: dict[str, Any]) -> list[StageTrace]:
    """Run a detector on one picture and keep what its stages did.

    Args:
        detector: a :class:`~detection_toolkit.modeling.QueryDetector` in evaluation mode. Its
            decoder must not be compiled, as nothing would be recorded.
        batched_input: Detectron2's dict of the picture.

    Returns:
        S traces.

    Raises:
        UserError: the detector has no stages.
    """
    detector = require_query_detector(detector, "a look at stages")
    stages = list(detector.decoder.stages)
    with contextlib.ExitStack() as stack:
        sampled = [
            [
                stack.enter_context(module.recording())
                for module in stage.modules()
                if isinstance(module, PointSampler)
            ]
            for stage in stages
        ]
        viewers = {name: viewer() for name, viewer in STAGE_VIEWERS}
        records = {
            name: stack.enter_context(viewer.recording(stages))
            for name, viewer in viewers.items()
            if viewer.applies_to(stages)
        }
        outputs, detections = detector.inference_stages([batched_input])
    height, width = batched_input["image"].shape[-2:]
    scale = torch.tensor(
        [batched_input.get("width", width) / width, batched_input.get("height", height) / height]
    )
    # Only what samples knows the boxes of the initial queries, and whether stages start from others
    # than the stage before has predicted.
    whole = outputs[0].boxes.new_tensor([0, 0, width, height]).expand_as(outputs[0].boxes)
    predicted = [whole, *(output.boxes for output in outputs)]
    traces = []
    for index, (output, (instances,)) in enumerate(zip(outputs, detections)):
        calls = [call for of_module in sampled[index] for call in of_module]
        before = calls[0].boxes if calls else predicted[index]
        traces.append(
            StageTrace(
                detections=instances.to("cpu"),
                scores=output.logits[0].float().sigmoid().cpu(),
                boxes_before=_to_cpu(before[0]) * scale.repeat(2),
                boxes=_to_cpu(output.boxes[0]) * scale.repeat(2),
                points=_of_first_picture([call.xy for call in calls], scale),
                level_weights=_of_first_picture([call.level_weights for call in calls]),
                groups=_groups(calls),
                shares=_shares(calls),
                records={name: of_stages[index] for name, of_stages in records.items()},
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


def _of_first_picture(values: Sequence[Tensor], scale: Tensor | None = None) -> Tensor | None:
    """(N, T, ...) of the (B, N, G, P, ...) values of all calls in a stage; None of no call."""
    if not values:
        return None
    joined = _to_cpu(torch.cat([value[0].flatten(1, 2) for value in values], 1))
    return joined if scale is None else joined * scale


def _groups(calls: Sequence[SampledPoints]) -> Tensor | None:
    """(T,) of all calls in a stage."""
    if not calls:
        return None
    of_calls = []
    for call in calls:
        num_groups, num_points = call.xy.shape[2:4]
        of_calls.append(torch.arange(num_groups).repeat_interleave(num_points))
    return torch.cat(of_calls)


def _shares(calls: Sequence[SampledPoints]) -> Tensor | None:
    """(N, T) of all calls in a stage; None unless all sum their points."""
    shares = [call.shares for call in calls if call.shares is not None]
    return _of_first_picture(shares) if len(shares) == len(calls) else None


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
