"""Numeric cases of Deformable DETR: inference and a training step, from the backbone's maps on.

Letters: B images, N queries, C channels, S stages, K classes, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_toolkit.modeling import QueryDetector
from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    CaseKind,
    Inputs,
    Limit,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.case import Config
from detection_toolkit.parity.compare import EXACT, PIXELS, Table, gradient, of_part, value
from detection_toolkit.parity.detector import (
    CaseFeatures,
    QueryCase,
    Run,
    Trace,
    read_truth,
    supervise,
)
from detection_toolkit.structures import HeadOutput, Predictions
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    Criterion,
    HungarianMatcher,
    LabelNormalizer,
    MatchNormalizer,
    Normalizer,
    StagewiseMatcher,
)

from .checkpoint import DEFORMABLE_DETR
from .criterion import ProposalCriterion, TwoStageCriterion
from .cross_stage import AnyPairMatcher, LastCandidateCriterion
from .decoder import DeformableDETRDecoder, RefiningDeformableDETRDecoder
from .detector import DeformableDETR
from .encoder import DeformableEncoder
from .heads import boxes_in_pixels
from .neck import ExtraLevelMapper
from .positions import to_tokens
from .queries import LearnedQueries, ProposedQueries

__all__ = ["CrossStageDetectorCase", "CrossStageHeadCase", "DeformableCase", "DeformableDETRCase"]

LOSS = Limit(relative=1e-4)
_TERMS = {"loss_cls": "loss_cls", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}


def _stages(field: Callable[[Any], Tensor]) -> Callable[[Run], Tensor]:
    """What all stages predict."""
    return lambda run: torch.stack([field(x) for x in run.outputs])


def _boxes(run: Run) -> Tensor:
    """(S, B, N, 4) predicted boxes, centre and size as shares of their images."""
    image_sizes = run.trace["memory"].image_sizes
    boxes = _stages(lambda x: x.boxes)(run)
    return cxcywh_norm(boxes, image_sizes.flip(-1).to(boxes)[:, None])


def _box_targets(run: Run, index: Tensor) -> Tensor:
    """(S, B, N, 4) likewise, of the objects; zero for background."""
    return cxcywh_norm(replace(run, index=index).boxes, run.truth.image_sizes[:, None])


def _rows(b: int, run: Run) -> np.ndarray:
    """Detections as rows x1, y1, x2, y2, score, class."""
    scores, labels, boxes = run.detections[b]
    return np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)


def _memory(case: Case, run: Run) -> Tensor:
    """The encoder's tokens. On padding, which nothing attends to, the sine code is that of
    half a million turns, a play of rounding: there the reference's stand for ours."""
    maps = run.trace["memory"]
    padding = torch.cat([mask.flatten(1) for mask in maps.padding_masks], dim=1)[..., None]
    tokens = to_tokens(maps.levels)
    reference = torch.from_numpy(case.array("infer/memory")).to(tokens)
    return torch.where(padding, reference, tokens)


def _row_limit(atol: float) -> Limit:
    return Limit(absolute=(*[PIXELS.absolute] * 4, atol, 0.0))


def _proposals(run: Run) -> tuple[Tensor, Tensor]:
    """Class logits and box logits of the encoder's proposals."""
    return run.model.initial_queries.predict(run.trace["memory"])


def _loss(term: str, stage: int, run: Run) -> Tensor:
    main = run.losses.main if hasattr(run.losses, "main") else run.losses
    return getattr(main, term)[stage]


# The tables: name of an array -> its limit, and what it is here.

_PREDICTIONS: Table = {
    "logits": (value, _stages(lambda x: x.logits)),
    "boxes": (value, _boxes),
}
_ON_THE_WAY: Table = {
    "init_reference": (
        value,
        lambda run: run.model.initial_queries(run.trace["memory"]).geometry,
    ),
    "inter_references": (value, _stages(lambda x: x.queries.geometry)),
    "hs": (value, _stages(lambda x: x.queries.content)),
}
_PROPOSALS: Table = {
    "enc_logits": (value, lambda run: _proposals(run)[0]),
    "enc_boxes": (value, lambda run: _proposals(run)[1].sigmoid()),
}
_TARGETS: Table = {
    "assigned_gt": (EXACT, lambda run: run.index),
    "labels": (EXACT, lambda run: run.labels),
    "bbox_targets": (value, lambda run: _box_targets(run, run.index)),
}
_PROPOSAL_TARGETS: Table = {
    "enc_assigned_gt": (
        EXACT,
        lambda run: run.losses.branches["encoder"].assignment.object_index[0],
    ),
}
_PROPOSAL_LOSSES: Table = {
    f"losses/enc_{official}": (
        LOSS,
        lambda run, term=term: getattr(run.losses.branches["encoder"], term)[0],
    )
    for official, term in _TERMS.items()
}
_REALLOCATED: Table = {
    "soft_labels": (EXACT, lambda run: run.losses.class_targets.multi_hot),
    "cls_avg_factor": (LOSS, lambda run: run.losses.cls_normalizer),
    "reg_avg_factor": (LOSS, lambda run: run.losses.box_normalizer),
    "reg_weights": (EXACT, lambda run: run.losses.assignment.matched * 1),
    "reg_targets": (value, lambda run: _box_targets(run, run.losses.assignment.object_index)),
}
_INPUT_GRADIENTS: Table = {
    "grad_logits": (gradient(0.0, 1e-3), lambda run: run.gradients["logits"]),
    "grad_boxes": (gradient(0.0, 1e-3), lambda run: run.gradients["boxes"]),
}
_TOTAL: Table = {"total_loss": (LOSS, lambda run: run.total)}

# Argument of encoder and decoder -> entry of a case's config.
_SIZES = {
    "channels": "dim",
    "num_heads": "heads",
    "num_points": "points",
    "ffn_channels": "ffn",
}


def _criterion(
    config: Config,
    label_assigner: nn.Module,
    *,
    kind: type[Criterion] = Criterion,
    normalizer: Normalizer | None = None,
) -> Criterion:
    """Losses of the stages, or of the proposals."""
    return kind(
        num_classes=int(config["classes"]),
        matcher=HungarianMatcher(box_code=cxcywh_norm),
        label_assigner=label_assigner,
        box_code=cxcywh_norm,
        giou_eps=1e-7,
        normalizer=normalizer or MatchNormalizer(),
    )


def _losses(step: str, num_stages: int) -> Iterator[Quantity]:
    """Of all stages; the last one's have no prefix."""
    for official, term in _TERMS.items():
        for t in range(num_stages):
            prefix = "" if t == num_stages - 1 else f"d{t}."
            yield Quantity(f"{step}losses/{prefix}{official}", LOSS, partial(_loss, term, t))


class DeformableCase(QueryCase):
    """A case from the backbone's maps on.

    A case whose config says ``"trimmed": true`` is cut off after some stages, and has only what
    later stages have no part in.
    """

    weights = "weights/"
    information = ("config_json", "in/batch_shape")
    official_format = DEFORMABLE_DETR
    sizes_name = "in/img_shapes"
    padded_size_name = "in/batch_shape"
    map_names = ["in/c3", "in/c4", "in/c5"]
    gradient_share = 1e-3

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.strides = [int(x) for x in self.config["strides"]]
        self.stages = range(int(self.config["dec_layers"]))
        self.refines = bool(self.config.get("with_box_refine", False))
        self.trimmed = bool(self.config.get("trimmed", False))
        self.is_two_stage = bool(self.config.get("as_two_stage", False))

    def parameter_names(self) -> list[str]:
        # What the stages share is in the file once for each, its gradient with the first.
        shared = re.compile(r"bbox_head\.(cls|reg)_branches\.[1-9]\d*\..*")
        names = super().parameter_names()
        return names if self.refines else [x for x in names if not shared.fullmatch(x)]

    def criterion(self) -> nn.Module:
        """Losses of the case's detector."""
        main = _criterion(self.config, StagewiseMatcher())
        if not self.is_two_stage:
            return main
        return TwoStageCriterion(
            main, _criterion(self.config, StagewiseMatcher(), kind=ProposalCriterion)
        )

    def build(self, inputs: Inputs, settings: Settings) -> tuple[QueryDetector, list[Tensor]]:
        """The detector with the case's weights, and the backbone's maps."""
        features = [inputs.tensor(name) for name in self.map_names]
        backbone = CaseFeatures(features, self.strides[: len(features)])
        sizes = self.config.integers(_SIZES)
        num_classes, num_queries = int(self.config["classes"]), int(self.config["queries"])
        layers: dict[str, Any] = dict(
            sizes, num_levels=len(self.strides), dropout=0.0, execution=settings.execution
        )
        kind = RefiningDeformableDETRDecoder if self.refines else DeformableDETRDecoder
        decoder: nn.Module = kind(num_classes, num_stages=len(self.stages), **layers)
        criterion = self.criterion()
        if settings.replace_parts is not None:
            decoder, criterion = map(settings.replace_parts, (decoder, criterion))
        model = DeformableDETR(
            backbone=ExtraLevelMapper(
                backbone,
                list(backbone.output_shape()),
                sizes["channels"],
                norm_groups=int(self.config["gn_groups"]),
            ),
            encoder=DeformableEncoder(num_layers=int(self.config["enc_layers"]), **layers),
            initial_queries=ProposedQueries(num_queries, sizes["channels"], num_classes)
            if self.is_two_stage
            else LearnedQueries(num_queries, sizes["channels"]),
            decoder=decoder,
            criterion=criterion,
            num_classes=num_classes,
            max_detections=int(self.config.get("max_per_img", num_queries)),
            execution=settings.execution,
        )
        self.load_weights(model, inputs.weights(self.weights))
        return model.to(settings.device, settings.dtype).eval(), features

    def trace(self, model: QueryDetector) -> Trace:
        """Maps of the neck and of the encoder."""
        trace = Trace()
        trace.input("neck", model.encoder)
        trace.output("memory", model.encoder)
        return trace

    def quantities(self) -> Iterator[Quantity]:
        yield from of_part("infer", self._inference())
        for name in self.steps:
            yield from of_part(name, self.step(name + "/"))

    @property
    def steps(self) -> list[str]:
        """Names of the training steps."""
        return ["train"]

    def num_outputs(self, step: str) -> int:
        """Of stages that a training step supervises."""
        return len(self.stages)

    def _inference(self) -> Iterator[Quantity]:
        in_detail: Table = {
            **{
                f"neck/{i}": (value, lambda run, i=i: run.trace["neck"].levels[i])
                for i in range(len(self.strides))
            },
            "memory": (value, partial(_memory, self.case)),
            **{f"detections/{b}": (_row_limit, partial(_rows, b)) for b in self.images},
        }
        yield from expand(in_detail, "infer/", optional=self.trimmed)
        tables = [_ON_THE_WAY, _PREDICTIONS, *([_PROPOSALS] if self.is_two_stage else [])]
        for table in tables:
            yield from expand(table, "infer/")

    def step(self, step: str) -> Iterator[Quantity]:
        """What a training step is compared with."""
        yield from expand({**_PREDICTIONS, **_TARGETS}, step)
        yield from _losses(step, self.num_outputs(step))
        yield from expand(_TOTAL, step, optional=self.trimmed)
        yield from self.compare_gradients(
            step + "grad_norm/",
            step + "grad/",
            norm_of_map=step + "grad_norm_input/{}",
            optional=self.trimmed,
        )

    def compute(self, settings: Settings) -> dict[str, Run]:
        inputs = Inputs(self.case, settings)
        model, features = self.build(inputs, settings)
        # A trimmed case has no detections to align with.
        names = [f"infer/detections/{b}" for b in self.images]
        rows = [self.case.array(x) if x in self.case.names else np.zeros((0, 6)) for x in names]
        expected = [[x[:, 4], x[:, 5], x[:, :4]] for x in rows]
        runs = {"infer": self.infer(model, features, expected)}
        trace = self.trace(model)
        for name in self.steps:
            self.prepare(model, name)
            runs[name] = self.run_step(model, features, settings)
            # Of the same weights and maps, but for the gradients.
            runs[name] = replace(runs[name], trace=trace)
        return runs

    def prepare(self, model: QueryDetector, name: str) -> None:
        """Make the model ready for a training step."""

    def run_step(self, model: QueryDetector, features: list[Tensor], settings: Settings) -> Run:
        """A training step."""
        return self.train(model, features, settings)


@CASE_KINDS.register()
class DeformableDETRCase(DeformableCase):
    """A forward pass with what lies on its way, and a training step."""

    title = "Deformable DETR"

    @classmethod
    def matches(cls, case: Case) -> bool:
        if "config_json" not in case.names:
            return False
        config = case.config("config_json")
        return "as_two_stage" in config and not {"start_q", "candidates"} & set(config)

    def step(self, step: str) -> Iterator[Quantity]:
        yield from super().step(step)
        if self.is_two_stage:
            yield from expand({**_PROPOSALS, **_PROPOSAL_TARGETS, **_PROPOSAL_LOSSES}, step)

    def run_step(self, model: QueryDetector, features: list[Tensor], settings: Settings) -> Run:
        by_output = (lambda losses: losses.main) if self.is_two_stage else (lambda losses: losses)
        return self.train(model, features, settings, by_output)


def _candidates(case: Case) -> dict[str, list[list[int]]]:
    """Offsets of the candidates of each stage, by the name of the list."""
    lists = case.config("config_json")["candidates"]
    return {name: entry["candidate_offsets"] for name, entry in lists.items()}


def _released(config: Config, offsets: list[list[int]]) -> Criterion:
    """The released head's cross-stage rule."""
    return _criterion(
        config,
        AnyPairMatcher(offsets),
        kind=LastCandidateCriterion,
        normalizer=LabelNormalizer(),
    )


def _before_reallocation(run: Run) -> Run:
    """The run with each stage's own match as index."""
    logits, boxes = (
        torch.stack([x.detach() for x in of_stages])
        for of_stages in zip(*((x.logits, x.boxes) for x in run.outputs))
    )
    own = run.model.criterion.matcher(logits, boxes, run.truth)
    return replace(run, index=own.object_index)


@CASE_KINDS.register()
class CrossStageDetectorCase(DeformableCase):
    """Training steps with the cross-stage labels of the released head."""

    title = "Deformable DETR with cross-stage labels"

    @classmethod
    def matches(cls, case: Case) -> bool:
        if "config_json" not in case.names:
            return False
        return {"as_two_stage", "candidates"} <= set(case.config("config_json"))

    @property
    def steps(self) -> list[str]:
        return [f"train_{name}" for name in _candidates(self.case)]

    def step(self, step: str) -> Iterator[Quantity]:
        yield from super().step(step)
        yield from expand(_REALLOCATED, step)

    def prepare(self, model: QueryDetector, name: str) -> None:
        offsets = _candidates(self.case)[name[len("train_") :]]
        model.criterion = _released(self.config, offsets)

    def run_step(self, model: QueryDetector, features: list[Tensor], settings: Settings) -> Run:
        return _before_reallocation(self.train(model, features, settings))


@CASE_KINDS.register()
class CrossStageHeadCase(CaseKind):
    """Matching, labels, losses and their gradients on given predictions, without a network."""

    title = "cross-stage labels of Deformable DETR's head"
    information = ("config_json",)

    @classmethod
    def matches(cls, case: Case) -> bool:
        return {"config_json", "in/logits"} <= case.names and "candidates" in case.config(
            "config_json"
        )

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.image_sizes = [(int(h), int(w)) for h, w in case.array("in/img_shapes")]

    def quantities(self) -> Iterator[Quantity]:
        num_stages = len(self.case.array("in/logits"))
        own: Table = {"assigned_gt": _TARGETS["assigned_gt"]}
        for name in _candidates(self.case):
            tables = {**own, **_REALLOCATED, **_TOTAL, **_INPUT_GRADIENTS}
            yield from of_part(name, expand(tables, f"{name}/"))
            yield from of_part(name, _losses(f"{name}/", num_stages))

    def compute(self, settings: Settings) -> dict[str, Run]:
        inputs = Inputs(self.case, settings)
        truth = read_truth(inputs, "gt/", self.image_sizes)
        sizes = torch.tensor(self.image_sizes)
        num_classes = self.case.array("in/logits").shape[-1]
        runs = {}
        for name, offsets in _candidates(self.case).items():
            logits, boxes = (inputs.tensor(x).requires_grad_() for x in ("in/logits", "in/boxes"))
            criterion = _released(
                Config({**self.config, "classes": num_classes}, self.case.path), offsets
            )
            outputs = [HeadOutput(x, boxes_in_pixels(y, sizes)) for x, y in zip(logits, boxes)]
            run = supervise(criterion, Predictions(outputs), truth)
            run.total.backward()
            run = replace(run, model=SimpleNamespace(criterion=criterion))
            gradients = {"logits": logits.grad, "boxes": boxes.grad}
            runs[name] = replace(_before_reallocation(run), gradients=gradients)
        return runs
