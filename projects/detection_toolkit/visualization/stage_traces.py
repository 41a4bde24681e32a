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

from ..modeling import SampledPoints, SamplingModule, require_query_detector
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
    :class:`~detection_toolkit.modeling.SamplingModule`."""
    level_weights: Tensor | None
    """(N, T, L) share of each feature level in each point; sums to 1."""
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
                if isinstance(module, SamplingModule)
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
    # Only what samples knows the boxes of the initial queries.
    whole = outputs[0].boxes.new_tensor([0, 0, width, height]).expand_as(outputs[0].boxes)
    first = next((call.boxes for of_module in sampled[0] for call in of_module), whole)
    boxes_before = [first, *(output.boxes for output in outputs)]
    traces = []
    for index, (output, (instances,)) in enumerate(zip(outputs, detections)):
        points, level_weights = _points_of_first_picture(sampled[index])
        traces.append(
            StageTrace(
                detections=instances.to("cpu"),
                scores=output.logits[0].float().sigmoid().cpu(),
                boxes_before=_to_cpu(boxes_before[index][0]) * scale.repeat(2),
                boxes=_to_cpu(output.boxes[0]) * scale.repeat(2),
                points=None if points is None else points * scale,
                level_weights=level_weights,
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


def _points_of_first_picture(
    calls: Sequence[Sequence[SampledPoints]],
) -> tuple[Tensor | None, Tensor | None]:
    """(N, T, 2) points and (N, T, L) level weights of all sampling modules of a stage."""
    seen = [call for of_module in calls for call in of_module]
    if not seen:
        return None, None
    points = torch.cat([call.xy[0].flatten(1, 2) for call in seen], 1)
    weights = torch.cat([call.level_weights[0].flatten(1, 2) for call in seen], 1)
    return _to_cpu(points), _to_cpu(weights)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
