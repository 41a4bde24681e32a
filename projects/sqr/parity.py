"""Cases of AdaMixer trained with query recollection: inference, and a step of each schedule."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor
from torchvision.ops import box_convert

from adamixer import AdaMixerDecoder
from adamixer.official_names import ADAMIXER
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
)
from detection_toolkit.modeling import FeatureMaps, SharedNormChannelMapper
from detection_toolkit.structures import GroundTruth, Queries, StageOutput
from detection_toolkit.training import Criterion, HungarianMatcher, StagewiseMatcher
from sqr import QueryRecollection, RecollectionSchedule, ScheduleError
from stageinteractor import InitialQueries, StageInteractor
from stageinteractor.boxes import box_to_xyzr

from .case import Case, CaseError, Inputs, Settings
from .compare import PIXELS, Limit, Measurement, exact, geometry, gradient, loss, pixels, value
from .decoder import CaseFeatures, align_detections, measure_gradient, sized_maps
from .runner import CaseKind, Layout, register_kind

__all__ = ["RecollectionCase"]

WEIGHTS = "weights/"
_QUERY_BOXES = "rpn_head.init_proposal_bboxes.weight"
_LOSSES = ("loss_cls", "loss_bbox", "loss_iou", "pos_acc")
# What the files hold of some schedules only.
_IN_DETAIL = ("xyzr_in", "xyzr", "content", "labels", "bbox_targets")


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


@register_kind
class RecollectionCase(CaseKind):
    """Neck, query head and losses.

    A case whose config says ``"trimmed": true`` may lack inference details and gradients: one cut
    off after some stages, say, as later ones have no part in the outputs of earlier ones, but in
    their gradients.
    """

    title = "AdaMixer with SQR"

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = _config(case)
        self.num_stages = int(self._size("stages"))
        self.schedules = {
            name: self._schedule(name, entry) for name, entry in self._size("schedules").items()
        }
        self.trimmed = bool(self.config.get("trimmed", False))
        self.strides = [int(x) for x in self._size("strides")]
        self.image_sizes = [(int(h), int(w)) for h, w in case.array("in/img_shapes")]

    @classmethod
    def matches(cls, case: Case) -> bool:
        if "config_json" not in case.names:
            return False
        config = _config(case)
        return "schedules" in config and "in_points" in config

    def _size(self, key: str) -> Any:
        try:
            return self.config[key]
        except KeyError:
            raise CaseError(f"config_json in {self.case.path} lacks {key!r}") from None

    def _schedule(self, name: str, entry: dict[str, Any]) -> RecollectionSchedule:
        try:
            schedule = RecollectionSchedule(tuple(entry["start_q"]), tuple(entry["end_q"]))
            schedule.check_fits(self.num_stages)
        except KeyError as error:
            raise CaseError(f"{self.case.path}: schedule {name} lacks {error}") from None
        except ScheduleError as error:
            raise CaseError(f"{self.case.path}: schedule {name}: {error}") from error
        return schedule

    @property
    def images(self) -> range:
        """Indices of the images."""
        return range(len(self.image_sizes))

    @property
    def map_names(self) -> list[str]:
        """Arrays of the backbone's maps, finest first."""
        return [f"in/c{i + 2}" for i in range(len(self.strides))]

    def parameter_names(self) -> list[str]:
        """Official names of all weights."""
        return [name[len(WEIGHTS) :] for name in self.case.below(WEIGHTS)]

    def layout(self) -> Layout:
        inputs = {"in/img_shapes", *self.map_names}
        inputs |= {WEIGHTS + _QUERY_BOXES, *self.case.below(WEIGHTS)}
        inputs |= {f"gt/{b}/{x}" for b in self.images for x in ("boxes", "labels")}
        required = {"infer/logits", "infer/boxes"}
        optional = {f"infer/{x}" for x in ("xyzr", "content", "init_xyzr", "init_content")}
        optional |= {f"infer/neck/{i}" for i in range(len(self.strides))} | {"infer/imgs_whwh"}
        optional |= {f"infer/detections/{b}" for b in self.images}
        if not self.trimmed:
            required |= optional
        for name in self.schedules:
            step = f"train_{name}/"
            for t in range(self.num_stages):
                stage = f"{step}stage{t}/"
                required |= {stage + x for x in ("logits", "boxes", "assigned_gt")}
                required |= {f"{step}losses/stage{t}_{x}" for x in _LOSSES}
                optional |= {stage + x for x in _IN_DETAIL}
            required |= {step + "num_groups"}
            gradients = {step + "total_loss"}
            gradients |= {f"{step}grad_norm/{x}" for x in self.parameter_names()}
            gradients |= {f"{step}grad_norm_input/{i}" for i in range(len(self.strides))}
            optional |= {f"{step}grad/{x}" for x in self.parameter_names()}
            if self.trimmed:
                optional |= gradients
            else:
                required |= gradients
        compared = required | (optional & self.case.names)
        return Layout(inputs, compared, {"config_json", "in/batch_shape"})

    def measure(self, settings: Settings) -> Iterator[Measurement]:
        inputs = Inputs(self.case, settings)
        maps = [inputs.tensor(name) for name in self.map_names]
        weights = {name: inputs.tensor(WEIGHTS + name) for name in self.parameter_names()}
        parts = self._parts(maps, weights, settings)
        # Models of all schedules share their parts.
        models = {}
        for name, schedule in self.schedules.items():
            decoder = copy.copy(parts["decoder"])
            # A transcription of the parts need not know of several groups at once.
            decoder.route = QueryRecollection(schedule, batched=settings.replace_parts is None)
            models[name] = StageInteractor(**{**parts, "decoder": decoder}).to(
                settings.device, settings.dtype
            )
        model = next(iter(models.values()))
        try:
            converted = convert_official_state_dict(weights, model, require_unused=True)
        except CheckpointMismatchError as error:
            raise CaseError(f"{self.case.path}: {error}") from error
        model.load_state_dict(converted.model)
        yield from self._measure_inference(model.eval(), settings)
        for name, model in models.items():
            yield from self._measure_step(name, model.train(), maps, settings)

    def _parts(
        self, maps: list[Tensor], weights: dict[str, Tensor], settings: Settings
    ) -> dict[str, Any]:
        dim, classes = int(self._size("dim")), int(self._size("classes"))
        bottom_up = CaseFeatures(maps, self.strides)
        try:
            parts = dict(
                backbone=SharedNormChannelMapper(bottom_up, list(bottom_up.output_shape()), dim),
                initial_queries=CaseQueries(weights[_QUERY_BOXES], dim),
                decoder=AdaMixerDecoder(
                    classes,
                    num_stages=self.num_stages,
                    channels=dim,
                    num_heads=int(self._size("heads")),
                    ffn_channels=int(self._size("ffn")),
                    groups=int(self._size("groups")),
                    points=int(self._size("in_points")),
                    out_points=int(self._size("out_points")),
                    execution=settings.execution,
                ),
                criterion=Criterion(
                    num_classes=classes,
                    matcher=HungarianMatcher(),
                    label_assigner=StagewiseMatcher(),
                ),
                num_classes=classes,
                max_detections=int(self._size("max_per_img")),
                execution=settings.execution,
            )
        except ValueError as error:
            raise CaseError(f"{self.case.path}: {error}") from error
        if settings.replace_parts is not None:
            for name in ("decoder", "criterion"):
                parts[name] = settings.replace_parts(parts[name])
        return parts

    def _images(self, map_: Tensor) -> ImageList:
        """The batch of images that the maps would come from."""
        height, width = (x * self.strides[0] for x in map_.shape[-2:])
        return ImageList(map_.new_zeros(len(map_), 3, height, width), self.image_sizes)

    def _truth(self, settings: Settings) -> GroundTruth:
        inputs = Inputs(self.case, settings)
        return GroundTruth.collate(
            [inputs.tensor(f"gt/{b}/boxes", exact=True) for b in self.images],
            [inputs.tensor(f"gt/{b}/labels") for b in self.images],
            self.image_sizes,
        )

    @torch.no_grad()
    def _measure_inference(
        self, model: StageInteractor, settings: Settings
    ) -> Iterator[Measurement]:
        maps = model.backbone.bottom_up.features
        outputs = model.predict(self._images(maps[0])).stages
        content, xyzr = model.initial_queries(sized_maps(self.image_sizes))[:2]
        stacked = self._stacked(outputs)
        sizes = torch.tensor([(w, h, w, h) for h, w in self.image_sizes])[:, None]
        every = {
            "logits": (stacked["logits"], value(settings.atol)),
            "boxes": (stacked["boxes"], pixels()),
            "xyzr": (stacked["xyzr"], geometry(settings.atol, 2)),
            "content": (stacked["content"], value(settings.atol)),
            "init_xyzr": (xyzr, geometry(settings.atol, 2)),
            "init_content": (content, value(settings.atol)),
            "imgs_whwh": (sizes, exact()),
        }
        for i, level in enumerate(model.backbone(maps[0]).values()):
            every[f"neck/{i}"] = (level, value(settings.atol))
        for b, instances in enumerate(model.inference(outputs[-1], self.image_sizes)):
            columns = Limit(absolute=(*[PIXELS] * 4, settings.atol, 0.0))
            every[f"detections/{b}"] = (self._rows(f"infer/detections/{b}", instances), columns)
        yield from self._those_there("infer/", every)

    def _rows(self, name: str, instances: Instances) -> np.ndarray:
        """Detections as (x1, y1, x2, y2, score, class), in the order of the reference where scores
        tie."""
        boxes = instances.pred_boxes.tensor.cpu().double().numpy()
        scores = instances.scores.cpu().double().numpy()
        labels = instances.pred_classes.cpu().numpy()
        if name in self.case.names and len(self.case.array(name)) == len(scores):
            reference = self.case.array(name)
            expected = (reference[:, 4], reference[:, 5], reference[:, :4])
            order = align_detections((scores, labels, boxes), expected)
            boxes, scores, labels = boxes[order], scores[order], labels[order]
        return np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)

    def _measure_step(
        self, name: str, model: StageInteractor, maps: list[Tensor], settings: Settings
    ) -> Iterator[Measurement]:
        model.zero_grad()
        for map_ in maps:
            map_.requires_grad_().grad = None
        predictions = model.predict(self._images(maps[0]))
        outputs = predictions.stages
        truth = self._truth(settings)
        result = model.criterion(predictions, truth)
        total = sum(result.as_dict().values())
        total.backward()

        step = f"train_{name}/"
        sizes = torch.tensor(model.decoder.route.schedule.groups_per_stage)
        yield from self._those_there(step, {"num_groups": (sizes, exact())})
        first = model.initial_queries(sized_maps(self.image_sizes))
        geometries = [first.geometry, *(x.queries.geometry for x in outputs)]  # of the pool
        for t in range(self.num_stages):
            groups = list(model.decoder.route.schedule.groups(t))
            every = {
                "xyzr_in": (
                    torch.stack([geometries[p] for p in model.decoder.route.schedule.inputs(t)]),
                    geometry(settings.atol, 2),
                ),
                **self._predictions([outputs[g] for g in groups], settings),
                **self._targets(result.groups.assignment.object_index[groups], truth),
            }
            yield from self._those_there(f"{step}stage{t}/", every)
            losses = {
                "loss_cls": result.loss_cls[t],
                "loss_bbox": result.loss_bbox[t],
                "loss_iou": result.loss_giou[t],
                "pos_acc": result.groups.matched_accuracy[groups].sum(),
            }
            yield from self._those_there(
                f"{step}losses/stage{t}_", {key: (ours, loss()) for key, ours in losses.items()}
            )
        yield from self._those_there(step, {"total_loss": (total, loss())})
        yield from self._measure_gradients(step, model, maps)

    @staticmethod
    def _predictions(
        outputs: list[StageOutput], settings: Settings
    ) -> dict[str, tuple[Tensor, Limit]]:
        stacked = RecollectionCase._stacked(outputs)
        return {
            "logits": (stacked["logits"], value(settings.atol)),
            "boxes": (stacked["boxes"], pixels()),
            "xyzr": (stacked["xyzr"], geometry(settings.atol, 2)),
            "content": (stacked["content"], value(settings.atol)),
        }

    @staticmethod
    def _stacked(outputs: list[StageOutput]) -> dict[str, Tensor]:
        return {
            "logits": torch.stack([x.logits for x in outputs]),
            "boxes": torch.stack([x.boxes for x in outputs]),
            "xyzr": torch.stack([x.queries.geometry for x in outputs]),
            "content": torch.stack([x.queries.content for x in outputs]),
        }

    def _targets(self, index: Tensor, truth: GroundTruth) -> dict[str, tuple[Tensor, Limit]]:
        matched, safe = index >= 0, index.clamp(min=0)
        groups = len(index)
        labels = truth.labels.expand(groups, -1, -1).gather(2, safe)
        background = torch.full_like(labels, int(self._size("classes")))
        boxes = truth.boxes.expand(groups, -1, -1, -1)
        boxes = boxes.gather(2, safe[..., None].expand(-1, -1, -1, 4)) * matched[..., None]
        return {
            "assigned_gt": (index, exact()),
            "labels": (torch.where(matched, labels, background), exact()),
            "bbox_targets": (boxes, pixels()),
        }

    def _measure_gradients(
        self, step: str, model: StageInteractor, maps: list[Tensor]
    ) -> Iterator[Measurement]:
        ours = {name: p.grad for name, p in model.named_parameters()}
        references = self.case.below(f"{step}grad")
        largest = max(
            (float(self.case.array(x)) for x in references if "/grad_norm/" in x), default=0.0
        )
        for quantity in references:
            kind, parameter = quantity[len(step) :].split("/", 1)
            if kind == "grad_norm_input" and int(parameter) < len(maps):
                found = maps[int(parameter)].grad
            elif kind in ("grad", "grad_norm"):
                renamed = ADAMIXER.to_ours(parameter)
                found = ours.get(renamed[0]) if renamed else None
            else:
                continue  # reported as an array that nothing is known about
            yield measure_gradient(
                quantity,
                found,
                self.case.array(quantity),
                limit=gradient(quantity, largest),
                is_norm=kind != "grad",
            )

    def _those_there(
        self, prefix: str, every: dict[str, tuple[Any, Limit]]
    ) -> Iterator[Measurement]:
        """Compare what the case has a reference for."""
        for name, (ours, limit) in every.items():
            if prefix + name in self.case.names:
                reference = self.case.array(prefix + name)
                yield Measurement(prefix + name, ours, reference, limit)


def _config(case: Case) -> dict[str, Any]:
    """Sizes and schedules, which these files keep as a text."""
    try:
        config = json.loads(str(case.array("config_json")))
    except ValueError as error:
        raise CaseError(f"'config_json' in {case.path} is no JSON document: {error}") from error
    if not isinstance(config, dict):
        raise CaseError(f"'config_json' in {case.path} is no JSON object")
    return config
