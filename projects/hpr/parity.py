"""Numeric cases of HPR: detectors from the backbone's maps on; blocks are in :mod:`.parity_blocks`.

Letters: B images, N queries, D denoising ones before them, C channels, S stages, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deformable_detr import DeformableEncoder, ExtraLevelMapper
from deformable_detr.positions import to_tokens
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
from detection_toolkit.parity.detector import (
    CaseFeatures,
    QueryCase,
    Run,
    Trace,
    align_detections,
)
from detection_toolkit.structures import Queries
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    BranchedCriterion,
    Criterion,
    HungarianMatcher,
    MatchNormalizer,
    StagewiseMatcher,
)
from dino import ContrastiveDenoising, FocalCost, MixedQueries
from dino.denoising import Noise
from dino.official_names import Names

from .criterion import HybridCriterion
from .decoder import DYNAMIC, REGIONAL, HybridDecoder
from .detector import HPR
from .official_names import HPR_WEIGHTS, HPRWeights
from .parity_blocks import NORM_SHARE, as_maps, merge_of
from .stage import HybridStage

__all__ = ["HybridCase", "PlainBaseCase"]

LOSS = Limit(relative=1e-4)
ELEMENT_SHARE = 1e-2
"""Of a gradient's largest element: one of a million ReLU inputs may round to the other side."""
_TERMS = {"cls": "loss_cls", "bbox": "loss_bbox", "iou": "loss_giou"}
HEADS = {"main": "", "aux0": REGIONAL, "aux1": DYNAMIC}
# Argument of encoder and decoder -> entry of a case's config.
_SIZES = {"channels": "D", "num_heads": "H", "num_points": "P", "ffn_channels": "F"}


def _elements(reference: np.ndarray, floor: float) -> Limit:
    """Of a gradient element by element."""
    return Limit(absolute=ELEMENT_SHARE * max(float(np.abs(reference).max(initial=0.0)), floor))


def _full(run: Run) -> Any:
    """The stages' predictions of all queries, denoising ones among them."""
    return run.trace["stages"]


def boxes_in_shares(boxes: Tensor, run: Run) -> Tensor:
    """(S, B, N, 4) pixels -> centre and size as shares of their images."""
    return cxcywh_norm(boxes, run.trace["memory"].image_sizes.flip(-1).to(boxes)[:, None])


def _logits_of(head: str, run: Run) -> Tensor:
    outputs = [x.auxiliary[head] if head else x for x in _full(run)]
    return torch.stack([x.logits for x in outputs])


def _boxes_of(head: str, run: Run) -> Tensor:
    outputs = [x.auxiliary[head] if head else x for x in _full(run)]
    return boxes_in_shares(torch.stack([x.boxes for x in outputs]), run)


def _stacked(key: str, run: Run) -> Tensor:
    """What went through a part that all stages share."""
    return torch.stack(run.trace.all(key))


def _both_auxiliary(keys: Sequence[Any], run: Run) -> Tensor:
    """(S, B, 2 N, C) of both auxiliary refiners, regional cross-attention first."""
    return torch.cat([_stacked(key, run) for key in keys], dim=2)


def _proposals(run: Run) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits, boxes = run.model.initial_queries.predict(run.trace["memory"])
    return logits, boxes.sigmoid()


def _chosen(run: Run) -> Any:
    branches = run.trace["predictions"].branches
    return next(branch.outputs[0] for branch in branches if branch.name == "encoder")


def _mask(run: Run) -> Tensor:
    return torch.cat([mask.flatten(1) for mask in run.trace["memory"].padding_masks], dim=1)


def _shapes(run: Run) -> Tensor:
    return torch.tensor([level.shape[-2:] for level in run.trace["memory"].levels])


_OUTPUTS: Table = {
    "hs": (value, partial(_stacked, "hs")),
    "inter_references": (
        value,
        lambda run: torch.stack([x.queries.geometry for x in _full(run)]),
    ),
    "init_reference": (value, lambda run: run.trace["queries"].geometry),
    "init_query": (value, lambda run: run.trace["queries"].content),
}
_INFER: Table = {
    **_OUTPUTS,
    "enc_pos": (value, lambda run: run.trace["enc_pos"]),
    "valid_ratios": (value, lambda run: run.trace["memory"].valid_ratios),
    "memory_mask": (EXACT, _mask),
    "spatial_shapes": (EXACT, _shapes),
    "memory": (value, lambda run: to_tokens(run.trace["memory"].levels)),
    "enc_logits": (value, lambda run: _proposals(run)[0]),
    "enc_boxes": (value, lambda run: _proposals(run)[1]),
    "query_pos": (value, partial(_stacked, "query_pos")),
    "logits": (value, partial(_logits_of, "")),
    "boxes": (value, partial(_boxes_of, "")),
}
_STAGE: Table = {
    "query_out": (value, lambda run, t: _full(run)[t].queries.content),
    "aux_out": (
        value,
        lambda run, t: torch.cat([run.trace[name, "out", t] for name in (REGIONAL, DYNAMIC)], 1),
    ),
    "roi_feats": (value, lambda run, t: as_maps(run.trace["roi", t][:, :4])),
}


_FIRST_STAGE = {
    "self_attn": ("attended", 0),
    "dyconv_self_attn": ("attended", 1),
    "ca_self_attn": ("attended", 2),
    "merger_SA": ("merged_attended", None),
    "norms.0": ("norm0", None),
    "cross_attn": ("before_norm1", None),
    "norms.1": ("norm1", None),
    "ffn": ("refined", 0),
    "dyconv_ffn": ("refined", 1),
    "ca_ffn": ("refined", 2),
    "merger_FFN": ("merged_refined", None),
    "norms.2": ("norm2", None),
    "dyconv_norms.0": ((DYNAMIC, "norm0"), None),
    "dyconv_norms.1": ((DYNAMIC, "norm1"), None),
    "dyconv_norms.2": ((DYNAMIC, "out", 0), None),
    "ca_norms.0": ((REGIONAL, "norm0"), None),
    "ca_norms.1": ((REGIONAL, "norm1"), None),
    "ca_norms.2": ((REGIONAL, "out", 0), None),
    "dy_conv": ((DYNAMIC, "look"), None),
    "regional_ca": ((REGIONAL, "before_norm1"), None),
}
"""Official name of a module of the first layer -> key of what was recorded, and its place."""


def _of_first_stage(key: Any, place: int | None, run: Run) -> Tensor:
    found = run.trace[key]
    found = found if place is None else found[place]
    return found if found.dim() == 3 else found.view_as(run.trace["queries"].content)


def _record_stage(trace: Trace, stage: HybridStage, t: int) -> None:
    trace.output(("roi", t), stage.roi_features)
    for name, refiner in stage.auxiliary.items():
        trace.output((name, "out", t), refiner.ffn.norm)
    if t:
        return
    trace.input("attended", stage.merge_attended)
    trace.output("merged_attended", stage.merge_attended)
    trace.output("norm0", stage.self_attention.norm)
    trace.input("before_norm1", stage.norm)
    trace.output("norm1", stage.norm)
    trace.input("refined", stage.merge_refined)
    trace.output("merged_refined", stage.merge_refined)
    trace.output("norm2", stage.ffn.norm)
    for name, refiner in stage.auxiliary.items():
        trace.output((name, "norm0"), refiner.self_attention.norm)
        trace.output((name, "look"), refiner.look)
        trace.input((name, "before_norm1"), refiner.norm)
        trace.output((name, "norm1"), refiner.norm)


class HybridCase(QueryCase):
    """A detector with hybrid stages on any base, whose parts a subclass has."""

    weights = "weights/"
    information = ("config_json", "in/batch_shape")
    sizes_name = "in/img_shapes"
    padded_size_name = "in/batch_shape"
    map_names: ClassVar[list[str]] = ["in/c3", "in/c4", "in/c5"]
    strides: ClassVar[list[int]] = [8, 16, 32]
    gradient_share = NORM_SHARE
    weight_format: ClassVar[HPRWeights] = HPR_WEIGHTS

    kinds: ClassVar[tuple[str, ...]]
    """Entries ``kind`` of the configs."""

    @classmethod
    def matches(cls, case: Case) -> bool:
        if not {"config_json", "infer/init_reference"} <= case.names:
            return False
        config = case.config("config_json")
        return "dyf" in config and config.get("kind") in cls.kinds

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.num_stages = int(self.config["L"])
        self.has_denoising = bool(self.config["use_dn"])
        self.merge = merge_of(self.config["merge"])

    def parameter_names(self) -> list[str]:
        names = super().parameter_names()
        return names if self.merge != "fixed" else [x for x in names if ".merger_" not in x]

    def our_name(self, official: str) -> str | None:
        renamed = self._names.to_ours(official)
        return renamed[0] if renamed else None

    # What a base has of its own

    def detector(self, **parts: Any) -> QueryDetector:
        """The detector of these parts."""
        return HPR(**parts)

    def initial_queries(self) -> nn.Module:
        """Where the queries come from."""
        sizes = int(self.config["Q"]), int(self.config["D"]), int(self.config["C"])
        return MixedQueries(*sizes)

    def decoder(self, **options: Any) -> nn.Module:
        """The refiner stack."""
        return HybridDecoder(int(self.config["C"]), **options)

    def criterion(self) -> BranchedCriterion:
        """The losses."""
        denoising = {"denoising": self.losses()} if self.has_denoising else {}
        return HybridCriterion(
            self.losses(), encoder=self.losses(), auxiliary=self.auxiliary_weights, **denoising
        )

    @property
    def auxiliary_weights(self) -> dict[str, float]:
        """Of the losses of the auxiliary heads."""
        return dict(zip((REGIONAL, DYNAMIC), map(float, self.config["aux_weights"])))

    def losses(self) -> Criterion:
        """Of the stages or of a branch."""
        return Criterion(
            num_classes=int(self.config["C"]),
            matcher=HungarianMatcher(box_code=cxcywh_norm, class_cost=FocalCost(1e-12)),
            label_assigner=StagewiseMatcher(),
            class_weight=1.0,
            box_code=cxcywh_norm,
            giou_eps=1e-7,
            normalizer=MatchNormalizer(),
        )

    def quantities_of_losses(self) -> Iterator[Quantity]:
        """Every loss, and the objects that queries are matched to."""
        for head, branch in HEADS.items():
            prefix = {"main": "", "aux0": "hpr_0_", "aux1": "hpr_1_"}[head]
            yield from self._losses_of(branch, prefix, "", self.num_stages)
            if self.has_denoising:
                denoising = f"{branch}_denoising" if branch else "denoising"
                yield from self._losses_of(denoising, prefix, "dn_", self.num_stages)
            for t in range(self.num_stages):
                name = f"train/{head}/assigned_gt/layer{t}"
                yield Quantity(name, EXACT, partial(_matches, branch, t))
        yield from self._losses_of("encoder", "enc_", "", 1)
        yield Quantity("train/main/assigned_gt/enc", EXACT, partial(_matches, "encoder", 0))

    def _losses_of(self, branch: str, prefix: str, kind: str, stages: int) -> Iterator[Quantity]:
        for official, term in _TERMS.items():
            for t in range(stages):
                of_stage = "" if t == stages - 1 else f"d{t}."
                name = f"train/losses/{prefix}{of_stage}{kind}loss_{official}"
                yield Quantity(name, LOSS, partial(_loss, branch, term, t))

    # What all have

    def build(self, inputs: Inputs, settings: Settings) -> tuple[QueryDetector, list[Tensor]]:
        """The detector with the case's weights, and the backbone's maps."""
        features = [inputs.tensor(name) for name in self.map_names]
        backbone = CaseFeatures(features, self.strides)
        layers: dict[str, Any] = dict(
            self.config.integers(_SIZES),
            num_levels=len(features) + 1,
            dropout=0.0,
            execution=settings.execution,
        )
        position = self.config["pos_encoding"]
        model = self.detector(
            backbone=ExtraLevelMapper(
                backbone,
                list(backbone.output_shape()),
                layers["channels"],
                norm_groups=int(self.config["gn"]),
                bias=bool(self.config["neck_bias"]),
            ),
            encoder=DeformableEncoder(
                num_layers=int(self.config["Lenc"]),
                position_temperature=position["temperature"],
                position_offset=position["offset"],
                **layers,
            ),
            initial_queries=self.initial_queries(),
            denoising=self.denoising(),
            decoder=self.decoder(
                num_stages=self.num_stages,
                merge=self.merge,
                inner_channels=int(self.config["dyf"]),
                num_samples=int(self.config["S"]),
                finest_scale=float(self.config["finest"]),
                roi_strides=[int(x) for x in self.config["featmap_strides"]],
                **layers,
            ),
            criterion=self.criterion(),
            num_classes=int(self.config["C"]),
            max_detections=int(self.config["max_per_img"]),
            execution=settings.execution,
        )
        if settings.replace_parts is not None:
            model.decoder, model.criterion = map(
                settings.replace_parts, (model.decoder, model.criterion)
            )
        self._names = Names(self.weight_format.origins[0], model.state_dict())
        self.load_weights(model, inputs.weights(self.weights))
        if self.has_denoising:
            model.denoising.draw = partial(self.noise, inputs)
        return model.to(settings.device, settings.dtype).eval(), features

    def denoising(self) -> nn.Module | None:
        """What makes denoising queries."""
        if not self.has_denoising:
            return None
        sizes = int(self.config["C"]), int(self.config["D"])
        return ContrastiveDenoising(*sizes, budget=int(self.config["dn"]))

    def noise(self, inputs: Inputs, shape: tuple[int, ...], like: Tensor) -> Noise:
        """The case's draws, which it has for the objects alone."""
        counts = [len(self.case.array(f"gt/{b}/labels")) for b in self.images]
        real = (torch.arange(shape[-1]) < torch.tensor(counts)[:, None]).expand(shape)

        def placed(x: Tensor) -> Tensor:
            slots = x.new_zeros(*shape, *x.shape[1:])
            slots[real.to(x.device)] = x
            return slots

        decisions = inputs.tensor("dn/random/label_u", exact=True)
        labels = torch.zeros(len(decisions), dtype=torch.long, device=decisions.device)
        labels[decisions < ContrastiveDenoising(1, 4).label_noise] = inputs.tensor(
            "dn/random/label_new"
        )
        sign = 2 * inputs.tensor("dn/random/box_sign01", exact=True).to(like) - 1
        amount = inputs.tensor("dn/random/box_u", exact=True)
        return Noise(*(placed(x) for x in (decisions, labels, amount, sign)))

    def quantities(self) -> Iterator[Quantity]:
        yield from of_part("infer", self._infer())
        if self.is_training:
            yield from of_part("train", self._train())

    def _infer(self) -> Iterator[Quantity]:
        for i in range(len(self.map_names) + 1):
            yield Quantity(f"infer/neck/{i}", value, lambda run, i=i: run.trace["neck"][i])
        yield from expand(_INFER, "infer/")
        for t in range(self.num_stages):
            yield from expand(_STAGE, f"infer/layer{t}/", t)
        for name, (key, place) in _FIRST_STAGE.items():
            ours = partial(_of_first_stage, key, place)
            yield Quantity(f"infer/layer0/{name}", value, ours)
        for b in self.images:
            pixels = float(np.max(PIXELS.absolute))
            limit = Limit(absolute=(*[pixels] * 4, 1e-4, 0.0))
            yield Quantity(f"detections/{b}", limit, lambda run, b=b: run.detections[b])

    def _train(self) -> Iterator[Quantity]:
        table: Table = {
            **_OUTPUTS,
            "aux_hs": (
                value,
                partial(_both_auxiliary, [(x, "hs") for x in (REGIONAL, DYNAMIC)]),
            ),
            "enc_topk_logits": (value, lambda run: _chosen(run).logits),
            "enc_topk_boxes": (value, lambda run: boxes_in_shares(_chosen(run).boxes, run)),
            "total_loss": (LOSS, lambda run: run.total),
        }
        yield from expand(table, "train/")
        for head, branch in HEADS.items():
            of_head: Table = {
                "logits": (value, partial(_logits_of, branch)),
                "boxes": (value, partial(_boxes_of, branch)),
            }
            yield from expand(of_head, f"train/{head}/")
        yield from self.quantities_of_losses()
        if self.has_denoising:
            yield from self.quantities_of_denoising()
        norms = "train/grad_norm/"
        largest = max(float(self.case.array(x)) for x in self.case.below(norms))
        for quantity in self.compare_gradients(
            norms, "train/grad/", norm_of_map="train/grad_norm_input/{}"
        ):
            if quantity.name.startswith("train/grad/"):
                limit = _elements(self.case.array(quantity.name), 1e-4 * largest)
                quantity = replace(quantity, limit=limit)
            yield quantity

    def quantities_of_denoising(self) -> Iterator[Quantity]:
        """The denoising queries, and what they may look at."""
        queries: Callable[[Run], Queries] = lambda run: run.trace["queries"]  # noqa: E731
        count = int(self.case.array("dn/content").shape[1])
        mask = {"mask": (EXACT, lambda run: queries(run).attention_mask)}
        table: Table = {
            "content": (value, lambda run: queries(run).content[:, :count]),
            "box_logits": (value, lambda run: torch.logit(queries(run).geometry[:, :count])),
            **mask,
        }
        yield from expand(table, "dn/")
        yield from expand({"attn_mask": mask["mask"]}, "train/")

    def compute(self, settings: Settings) -> dict[str, Run]:
        model, features = self.build(Inputs(self.case, settings), settings)
        trace = self.trace(model)
        with torch.no_grad():
            with model.decoder.with_auxiliary():
                outputs = model.predict(self.batch(features)).stages
            found = model.inference(outputs[-1], self.image_sizes)
        detections = [self._rows_of(x, b) for b, x in enumerate(found)]
        infer = Run(outputs, model, _frozen(trace), detections)
        if not self.is_training:
            return {"infer": infer}
        trace = self.trace(model)
        run = self.train(model, features, settings, lambda losses: losses.main)
        return {"infer": infer, "train": replace(run, trace=_frozen(trace))}

    def _rows_of(self, instances: Any, image: int) -> np.ndarray:
        """(detections, 6) box in the original image, score and class, in the reference's order."""
        rows = self.case.array(f"detections/{image}")
        scale = torch.tensor(np.tile(self.case.array("in/scale_factor"), 2))
        boxes = instances.pred_boxes.tensor
        boxes = (boxes / scale.to(boxes)).double().cpu().numpy()
        scores = instances.scores.double().cpu().numpy()
        classes = instances.pred_classes.cpu().numpy()
        if len(scores) == len(rows):
            reference = rows[:, 4], rows[:, 5].astype(np.int64), rows[:, :4]
            order = align_detections((scores, classes, boxes), reference)
            boxes, scores, classes = boxes[order], scores[order], classes[order]
        return np.concatenate([boxes, scores[:, None], classes[:, None]], axis=1)

    def trace(self, model: QueryDetector) -> Trace:
        """Record what goes through the parts of the model from now on."""
        trace, decoder = Trace(), model.decoder
        trace.output("neck", model.backbone, lambda maps: list(maps.values()))
        model.encoder.get_submodule("layers.0").register_forward_pre_hook(
            lambda _, inputs: trace.keep("enc_pos", inputs[1])
        )
        trace.output("memory", model.encoder)
        decoder.register_forward_pre_hook(lambda _, inputs: trace.keep("queries", inputs[1]))
        trace.output("stages", decoder)
        trace.output("query_pos", decoder.position)
        trace.output("hs", decoder.norm)
        for name, norm in decoder.auxiliary_norms.items():
            trace.output((name, "hs"), norm)
        for t, stage in enumerate(decoder.stages):
            _record_stage(trace, stage, t)
        trace.input("predictions", model.criterion)
        return trace


def _frozen(trace: Trace) -> Trace:
    """What was recorded so far: hooks of the first pass see the second one, too."""
    frozen = Trace()
    frozen._values = {key: list(values) for key, values in trace._values.items()}
    return frozen


def of_branch(branch: str, run: Run) -> Any:
    """The losses of a branch; of the stages, where it is empty."""
    return run.losses.branches[branch] if branch else run.losses.main


def _loss(branch: str, term: str, stage: int, run: Run) -> Tensor:
    return getattr(of_branch(branch, run), term)[stage]


def _matches(branch: str, stage: int, run: Run) -> Tensor:
    return of_branch(branch, run).assignment.object_index[stage]


@CASE_KINDS.register()
class PlainBaseCase(HybridCase):
    """HPR on DINO and on the improved Deformable DETR."""

    title = "HPR on DINO or Deformable DETR"
    kinds = ("deformable_detr", "dino")


from . import parity_of_bases  # noqa: E402, F401  (registers cases that are made of these)
