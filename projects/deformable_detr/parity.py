"""Numeric cases of Deformable DETR: inference and a training step, from the backbone's maps on.

Letters: B images, N queries, C channels, S stages, K classes, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_toolkit.modeling import QueryDetector
from detection_toolkit.parity import (
    CASE_KINDS,
    Case,
    Inputs,
    Limit,
    Quantity,
    Settings,
    expand,
)
from detection_toolkit.parity.compare import EXACT, PIXELS, Table, of_part, value
from detection_toolkit.parity.detector import CaseFeatures, QueryCase, Run, Trace
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    Criterion,
    HungarianMatcher,
    MatchNormalizer,
    StagewiseMatcher,
)

from .criterion import ProposalCriterion, TwoStageCriterion
from .decoder import DeformableDETRDecoder, RefiningDeformableDETRDecoder
from .detector import DeformableDETR
from .encoder import DeformableEncoder
from .neck import ExtraLevelMapper
from .official_names import DEFORMABLE_DETR
from .positions import to_tokens
from .queries import LearnedQueries, ProposedQueries

__all__ = ["DeformableDETRCase"]

LOSS = Limit(relative=1e-4)
_TERMS = {"loss_cls": "loss_cls", "loss_bbox": "loss_bbox", "loss_iou": "loss_giou"}


def _stages(field: Callable[[Any], Tensor]) -> Callable[[Run], Tensor]:
    """What all stages predict."""
    return lambda run: torch.stack([field(x) for x in run.outputs])


def _shares(boxes: Tensor, run: Run) -> Tensor:
    """Boxes (..., B, N, 4) in pixels as centre and size, shares of their images."""
    maps = run.trace["memory"]
    return cxcywh_norm(boxes, maps.image_sizes.flip(-1).to(boxes)[:, None])


def _boxes(run: Run) -> Tensor:
    return _shares(_stages(lambda x: x.boxes)(run), run)


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
    "bbox_targets": (
        value,
        lambda run: _shares(run.boxes, run) * (run.index >= 0)[..., None],
    ),
}
_PROPOSAL_TARGETS: Table = {
    "enc_assigned_gt": (
        EXACT,
        lambda run: run.losses.branches["encoder"].assignment.object_index[0],
    ),
}
_TOTAL: Table = {"total_loss": (LOSS, lambda run: run.total)}

# Argument of encoder and decoder -> entry of a case's config.
_SIZES = {
    "channels": "dim",
    "num_heads": "heads",
    "num_points": "points",
    "ffn_channels": "ffn",
}


class DeformableCase(QueryCase):
    """A case from the backbone's maps on: how the detector is made."""

    weights = "weights/"
    information = ("config_json", "in/batch_shape")
    official_format = DEFORMABLE_DETR
    sizes_name = "in/img_shapes"
    map_names = ["in/c3", "in/c4", "in/c5"]
    gradient_share = 1e-3

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.strides = [int(x) for x in self.config["strides"]]
        self.stages = range(int(self.config["dec_layers"]))
        self.refines = bool(self.config.get("with_box_refine", False))
        self.is_two_stage = bool(self.config.get("as_two_stage", False))

    def parameter_names(self) -> list[str]:
        # What the stages share is in the file once for each, its gradient with the first.
        shared = re.compile(r"bbox_head\.(cls|reg)_branches\.[1-9]\d*\..*")
        names = super().parameter_names()
        return names if self.refines else [x for x in names if not shared.fullmatch(x)]

    def criterion(
        self, kind: type[Criterion], label_assigner: nn.Module | None = None
    ) -> Criterion:
        """Losses of the stages, or of the proposals."""
        return kind(
            num_classes=int(self.config["classes"]),
            matcher=HungarianMatcher(box_code=cxcywh_norm),
            label_assigner=label_assigner or StagewiseMatcher(),
            box_code=cxcywh_norm,
            giou_eps=1e-7,
            normalizer=MatchNormalizer(),
        )

    def build_criterion(self) -> nn.Module:
        """Losses of the case's detector."""
        main = self.criterion(Criterion)
        if not self.is_two_stage:
            return main
        return TwoStageCriterion(main, self.criterion(ProposalCriterion))

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
        criterion = self.build_criterion()
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


@CASE_KINDS.register()
class DeformableDETRCase(DeformableCase):
    """A forward pass with what lies on its way, and a training step."""

    title = "Deformable DETR"

    @classmethod
    def matches(cls, case: Case) -> bool:
        if "config_json" not in case.names:
            return False
        config = case.config("config_json")
        return "as_two_stage" in config and not {"schedules", "candidates"} & set(config)

    def quantities(self) -> Iterator[Quantity]:
        yield from of_part("infer", self._inference())
        yield from of_part("train", self._training())

    def _inference(self) -> Iterator[Quantity]:
        for i in range(len(self.strides)):
            yield Quantity(f"infer/neck/{i}", value, lambda run, i=i: run.trace["neck"].levels[i])
        yield Quantity("infer/memory", value, partial(_memory, self.case))
        tables = [_ON_THE_WAY, _PREDICTIONS, *([_PROPOSALS] if self.is_two_stage else [])]
        for table in tables:
            yield from expand(table, "infer/")
        for b in self.images:
            yield Quantity(f"infer/detections/{b}", _row_limit, partial(_rows, b))

    def _training(self) -> Iterator[Quantity]:
        tables = [_PREDICTIONS, _TARGETS, _TOTAL]
        if self.is_two_stage:
            tables += [_PROPOSALS, _PROPOSAL_TARGETS]
        for table in tables:
            yield from expand(table, "train/")
        for official, term in _TERMS.items():
            for t in self.stages:
                prefix = "" if t == self.stages[-1] else f"d{t}."
                yield Quantity(f"train/losses/{prefix}{official}", LOSS, partial(_loss, term, t))
            if self.is_two_stage:
                yield Quantity(
                    f"train/losses/enc_{official}",
                    LOSS,
                    lambda run, term=term: getattr(run.losses.branches["encoder"], term)[0],
                )
        yield from self.compare_gradients(
            "train/grad_norm/", "train/grad/", norm_of_map="train/grad_norm_input/{}"
        )

    def compute(self, settings: Settings) -> dict[str, Run]:
        inputs = Inputs(self.case, settings)
        model, features = self.build(inputs, settings)
        rows = [self.case.array(f"infer/detections/{b}") for b in self.images]
        expected = [[x[:, 4], x[:, 5], x[:, :4]] for x in rows]
        by_output = (lambda losses: losses.main) if self.is_two_stage else (lambda losses: losses)
        infer = self.infer(model, features, expected)
        trace = self.trace(model)
        train = self.train(model, features, settings, by_output)
        return {"infer": infer, "train": replace(train, trace=trace)}
