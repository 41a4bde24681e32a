"""Numeric cases of detectors trained with query recollection: inference, and a step per schedule.

Letters: B images, N queries, S stages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from adamixer import AdaMixerDecoder
from adamixer.official_names import ADAMIXER
from deformable_detr.parity import DeformableCase
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FeatureMaps, QueryDetector, SharedNormChannelMapper
from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    CaseError,
    Inputs,
    Limit,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.compare import EXACT, LOSS, PIXELS, Table, geometry, of_part, value
from detection_toolkit.parity.detector import CaseFeatures, QueryCase, Run
from detection_toolkit.structures import Queries, StageOutput
from detection_toolkit.training import StagewiseMatcher
from stageinteractor import InitialQueries, StageInteractor
from stageinteractor.boxes import box_to_xyzr
from stageinteractor.parity import LESS_CERTAIN, LOSSES, TOTAL, detector_parts

from .recollection import QueryRecollection
from .schedule import RecollectionSchedule

__all__ = ["DeformableRecollectionCase", "RecollectionCase"]

_QUERY_BOXES = "rpn_head.init_proposal_bboxes.weight"


class CaseQueries(InitialQueries):
    """Initial queries with the boxes of the case, which are not the whole image: these files have
    noise on every tensor, also on this one, which is constant in training."""

    def __init__(self, boxes: Tensor, channels: int):
        super().__init__(len(boxes), channels)
        self.boxes = boxes  # (N, 4) cxcywh as shares of the image

    def forward(self, maps: FeatureMaps) -> Queries:
        sizes = maps.image_sizes.flip(-1).repeat(1, 2).to(self.boxes)
        boxes = box_convert(self.boxes, "cxcywh", "xyxy") * sizes[:, None]
        return super().forward(maps)._replace(geometry=box_to_xyzr(boxes))


def _outputs(field: Callable[[StageOutput], Tensor]) -> Callable[..., Tensor]:
    """What all stages, or the groups of one, predict."""

    def ours(run: Run, t: int | None = None) -> Tensor:
        found = torch.stack([field(x) for x in run.outputs])
        return found if t is None else found[_groups(run, t)]

    return ours


def _neck(i: int, run: Run) -> Tensor:
    features = run.model.backbone.bottom_up.features
    return list(run.model.backbone(features[0]).values())[i]


def _rows(b: int, run: Run) -> np.ndarray:
    """Detections as rows x1, y1, x2, y2, score, class."""
    scores, labels, boxes = run.detections[b]
    return np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)


def _row_limit(atol: float) -> Limit:
    return Limit(absolute=(*[PIXELS.absolute] * 4, atol, 0.0))


def _groups(run: Run, t: int) -> list[int]:
    """Indices of the groups of stage t."""
    return list(run.model.decoder.route.schedule.groups(t))


# The tables: name of an array -> its limit, and what it is here.

# Index 0 of these arrays is that of the stage, or of a stage's groups.
_PREDICTIONS: Table = {
    "logits": (value, _outputs(lambda x: x.logits)),
    "boxes": (PIXELS, _outputs(lambda x: x.boxes)),
}
_STATE: Table = {
    "xyzr": (geometry, _outputs(lambda x: x.queries.geometry)),
    "content": (value, _outputs(lambda x: x.queries.content)),
}
_MATCHES: Table = {"assigned_gt": (EXACT, lambda run, t: run.index[_groups(run, t)])}
_TARGETS: Table = {
    "labels": (EXACT, lambda run, t: run.labels[_groups(run, t)]),
    "bbox_targets": (PIXELS, lambda run, t: run.boxes[_groups(run, t)]),
}
_ACCURACY: Table = {
    "pos_acc": (LOSS, lambda run, t: run.losses.groups.matched_accuracy[_groups(run, t)].sum())
}
_NUM_GROUPS: Table = {
    "num_groups": (
        EXACT,
        lambda run: torch.tensor(run.model.decoder.route.schedule.groups_per_stage),
    )
}

# Argument of the decoder -> entry of a case's config.
_SIZES = {
    "num_classes": "classes",
    "num_stages": "stages",
    "channels": "dim",
    "num_heads": "heads",
    "ffn_channels": "ffn",
    "groups": "groups",
    "points": "in_points",
    "out_points": "out_points",
}


def _schedule(case: Case, name: str, entry: Any, num_stages: int) -> RecollectionSchedule:
    start, end = (tuple(entry[key]) for key in ("start_q", "end_q"))
    try:
        schedule = RecollectionSchedule(start, end)
        schedule.check_fits(num_stages)
    except UserError as error:
        raise CaseError(f"{case.path}: schedule {name}: {error}") from error
    return schedule


@CASE_KINDS.register()
class RecollectionCase(QueryCase):
    """Neck, query head and losses.

    A case whose config says ``"trimmed": true`` may lack inference details and gradients: one cut
    off after some stages, say, as later ones have no part in the outputs of earlier ones, but in
    their gradients.
    """

    title = "AdaMixer with SQR"
    weights = "weights/"
    information = ("config_json", "in/batch_shape")
    official_format = ADAMIXER
    sizes_name = "in/img_shapes"
    padded_size_name = "in/batch_shape"
    less_certain = LESS_CERTAIN

    @classmethod
    def matches(cls, case: Case) -> bool:
        return "config_json" in case.names and {"schedules", "in_points"} <= set(
            case.config("config_json")
        )

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.stages = range(int(self.config["stages"]))
        self.trimmed = bool(self.config.get("trimmed", False))
        self.strides = [int(x) for x in self.config["strides"]]
        self.map_names = [f"in/c{i + 2}" for i in range(len(self.strides))]
        self.schedules = {
            name: _schedule(case, name, entry, len(self.stages))
            for name, entry in self.config["schedules"].items()
        }

    def quantities(self) -> Iterator[Quantity]:
        yield from of_part("infer", self._inference())
        for name in self.schedules:
            yield from of_part(name, self._step(f"train_{name}/"))

    def _inference(self) -> Iterator[Quantity]:
        yield from expand(_PREDICTIONS, "infer/")
        initial: Table = {
            "init_content": (
                value,
                lambda run: run.model.initial_queries(self.sized_maps()).content,
            ),
            "init_xyzr": (
                geometry,
                lambda run: run.model.initial_queries(self.sized_maps()).geometry,
            ),
            "imgs_whwh": (EXACT, lambda run: self.sizes_whwh()),
        }
        in_detail: Table = {
            **_STATE,
            **initial,
            **{f"neck/{i}": (value, partial(_neck, i)) for i in range(len(self.map_names))},
            **{f"detections/{b}": (_row_limit, partial(_rows, b)) for b in self.images},
        }
        yield from expand(in_detail, "infer/", optional=self.trimmed)

    def _step(self, step: str) -> Iterator[Quantity]:
        yield from expand(_NUM_GROUPS, step)
        for t in self.stages:
            stage = f"{step}stage{t}/"
            yield from expand({"xyzr_in": (geometry, self._geometry_in)}, stage, t, optional=True)
            yield from expand({**_PREDICTIONS, **_MATCHES}, stage, t)
            yield from expand({**_STATE, **_TARGETS}, stage, t, optional=True)
            yield from expand({**LOSSES, **_ACCURACY}, f"{step}losses/stage{t}_", t)
        yield from expand(TOTAL, step, optional=self.trimmed)
        yield from self.compare_gradients(
            f"{step}grad_norm/",
            f"{step}grad/",
            norm_of_map=step + "grad_norm_input/{}",
            optional=self.trimmed,
        )

    def _geometry_in(self, run: Run, t: int) -> Tensor:
        """The geometry that each group of stage t begins with."""
        pool = [
            run.model.initial_queries(self.sized_maps()).geometry,
            *(x.queries.geometry for x in run.outputs),
        ]
        return torch.stack([pool[p] for p in run.model.decoder.route.schedule.inputs(t)])

    def compute(self, settings: Settings) -> dict[str, Run]:
        inputs = Inputs(self.case, settings)
        maps = [inputs.tensor(name) for name in self.map_names]
        weights = inputs.weights(self.weights)
        sizes = self.config.integers(_SIZES)
        bottom_up = CaseFeatures(maps, self.strides)
        parts = detector_parts(
            settings,
            num_classes=sizes["num_classes"],
            decoder=AdaMixerDecoder(**sizes, execution=settings.execution),
            label_assigner=StagewiseMatcher(),
        )
        backbone = SharedNormChannelMapper(
            bottom_up, list(bottom_up.output_shape()), sizes["channels"]
        )
        queries = CaseQueries(weights[_QUERY_BOXES], sizes["channels"])
        # Models of all schedules share their parts.
        models = {}
        for name, schedule in self.schedules.items():
            decoder = copy.copy(parts["decoder"])
            # A transcription of the parts need not know of several groups at once.
            decoder.route = QueryRecollection(schedule, batched=settings.replace_parts is None)
            models[name] = StageInteractor(
                backbone=backbone,
                initial_queries=queries,
                max_detections=int(self.config["max_per_img"]),
                **{**parts, "decoder": decoder},
            ).to(settings.device, settings.dtype)
        model = next(iter(models.values()))
        self.load_weights(model, weights)
        # A trimmed case may have no detections to align with.
        names = [f"infer/detections/{b}" for b in self.images]
        rows = [self.case.array(x) if x in self.case.names else np.zeros((0, 6)) for x in names]
        runs = {
            "infer": self.infer(model.eval(), maps, [(r[:, 4], r[:, 5], r[:, :4]) for r in rows])
        }
        for name, model in models.items():
            runs[name] = self.train(model, maps, settings, lambda losses: losses.groups)
        return runs


@CASE_KINDS.register()
class DeformableRecollectionCase(DeformableCase):
    """Deformable DETR without refinement; the groups of all stages stand in one array."""

    title = "Deformable DETR with SQR"

    @classmethod
    def matches(cls, case: Case) -> bool:
        if "config_json" not in case.names:
            return False
        config = case.config("config_json")
        return {"start_q", "dec_layers"} <= set(config)

    def __init__(self, case: Case):
        super().__init__(case)
        # The released list has an entry for one more stage, which is not there.
        count = len(self.stages)
        entry = {key: self.config[key][:count] for key in ("start_q", "end_q")}
        schedule = _schedule(case, "start_q, end_q", entry, count)
        self.schedules = {name.split("/")[0]: schedule for name in case.below("train_")}

    @property
    def steps(self) -> list[str]:
        return list(self.schedules)

    def num_outputs(self, step: str) -> int:
        return sum(self.schedules[step.rstrip("/")].groups_per_stage)

    def prepare(self, model: QueryDetector, name: str) -> None:
        route = QueryRecollection(self.schedules[name])
        decoder: Any = model.decoder
        decoder.route = route
        model.criterion = route.supervise(self.criterion())

    def run_step(self, model: QueryDetector, features: list[Tensor], settings: Settings) -> Run:
        run = self.train(model, features, settings, lambda losses: losses.groups)
        return replace(run, losses=run.losses.groups)
