"""Numeric cases of DINO and DN-Deformable-DETR: inference, and training steps with the draws of
their denoising queries, from the backbone's maps on; cross-stage labels on them.

Letters: B images, N queries, C channels, S stages, K classes.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deformable_detr import DeformableEncoder, ExtraLevelMapper
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
from detection_toolkit.parity.compare import EXACT, Table, of_part, value
from detection_toolkit.parity.detector import CaseFeatures, QueryCase, Run, Trace
from detection_toolkit.structures import HeadOutput, StageOutput
from detection_toolkit.structures.boxes import cxcywh_norm
from detection_toolkit.training import (
    Criterion,
    HungarianMatcher,
    LabelNormalizer,
    MatchNormalizer,
    StagewiseMatcher,
)
from stageinteractor import CrossStageMatcher

from .criterion import DenoisingCriterion, FocalCost, PositiveFocalLoss
from .decoder import DINODecoder, DNDeformableDecoder
from .denoising import BoxDenoising, ContrastiveDenoising, Denoising, Noise
from .detector import DINO, DNDeformableDETR
from .official_names import ORIGINS, Names, Origin
from .queries import AnchorQueries, MixedQueries

__all__ = ["DINOCase", "DNDeformableCase"]

LOSS = Limit(relative=1e-4)
_TERMS = {"ce": "loss_cls", "bbox": "loss_bbox", "giou": "loss_giou"}
_ASSIGNERS = {
    "clean": partial(CrossStageMatcher),
    "clean_keep_own": partial(CrossStageMatcher, keep_own=True),
}
# Argument of encoder and decoder -> entry of a case's config.
_SIZES = {"channels": "D", "num_heads": "H", "num_points": "P", "ffn_channels": "F"}

Outputs = Callable[[Run], "list[HeadOutput | StageOutput]"]


def _stages(run: Run) -> Any:
    return run.outputs


def _branch(name: str, run: Run) -> Any:
    """What is predicted beside the stages."""
    branches = run.trace["predictions"].branches
    return next(branch.outputs for branch in branches if branch.name == name)


def _choice(run: Run) -> Any:
    """The proposals that are chosen."""
    return run.model.initial_queries.propose(run.trace["memory"])[1][0].outputs


def _logits(outputs: Outputs, run: Run) -> Tensor:
    return torch.stack([x.logits for x in outputs(run)])


def _boxes(outputs: Outputs, run: Run) -> Tensor:
    """(S, B, N, 4) centre and size as shares of their images."""
    boxes = torch.stack([x.boxes for x in outputs(run)])
    return cxcywh_norm(boxes, run.trace["memory"].image_sizes.flip(-1).to(boxes)[:, None])


def _both(prefix: str, outputs: Outputs) -> Table:
    return {
        prefix + "logits": (value, partial(_logits, outputs)),
        prefix + "boxes": (value, partial(_boxes, outputs)),
    }


def _loss(branch: str, term: str, stage: int, run: Run) -> Tensor:
    losses = run.losses.branches[branch] if branch else run.losses.main
    return getattr(losses, term)[stage]


_TARGETS: Table = {"assigned_gt": (EXACT, lambda run: run.index)}
_TOTAL: Table = {"total_loss": (LOSS, lambda run: run.total)}
_CROSS: Table = {
    "labels": (EXACT, lambda run: run.losses.main.class_targets.multi_hot),
    **_TOTAL,
}


class DenoisingCase(QueryCase):
    """A case from the backbone's maps on."""

    weights = "weights/"
    information = ("config_json", "in/batch_shape")
    sizes_name = "in/img_shapes"
    padded_size_name = "in/batch_shape"
    map_names = ["in/c3", "in/c4", "in/c5"]
    strides = [8, 16, 32]
    gradient_share = 1e-3

    origin: ClassVar[Origin]
    repeated: ClassVar[re.Pattern[str]]
    """Names of weights whose gradient is given under another."""
    prefixes: ClassVar[dict[str, str]]
    """Branch -> name of its losses, with {} for the term and {} for what names the stage."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.config = case.config("config_json")
        self.num_stages = int(self.config["L"])
        self.cross = [name for name in _ASSIGNERS if case.below(f"cross/{name}/")]

    def parameter_names(self) -> list[str]:
        return [x for x in super().parameter_names() if not self.repeated.fullmatch(x)]

    def our_name(self, official: str) -> str | None:
        renamed = self._names.to_ours(official)
        return renamed[0] if renamed else None

    @abstractmethod
    def denoising(self) -> Denoising:
        """What makes denoising queries."""

    @abstractmethod
    def detector(self, layers: dict[str, Any], **parts: Any) -> QueryDetector:
        """The detector of common parts, and of its own ones."""

    @abstractmethod
    def noise(self, inputs: Inputs, shape: tuple[int, ...], like: Tensor) -> Noise:
        """The case's draws."""

    def branches(self) -> dict[str, Criterion]:
        """Criteria of what is supervised beside the stages."""
        return {"denoising": self.criterion()}

    def criterion(self, class_loss: nn.Module | None = None) -> Criterion:
        """Losses of the stages or of a branch."""
        return Criterion(
            num_classes=int(self.config["C"]),
            matcher=HungarianMatcher(box_code=cxcywh_norm, class_cost=FocalCost(1e-8)),
            label_assigner=StagewiseMatcher(),
            class_weight=1.0,
            class_loss=class_loss,
            box_code=cxcywh_norm,
            normalizer=MatchNormalizer(),
        )

    def build(self, inputs: Inputs, settings: Settings) -> tuple[QueryDetector, list[Tensor]]:
        """The detector with the case's weights, and the backbone's maps."""
        features = [inputs.tensor(name) for name in self.map_names]
        backbone = CaseFeatures(features, self.strides)
        sizes = self.config.integers(_SIZES)
        layers: dict[str, Any] = dict(
            sizes, num_levels=len(features) + 1, dropout=0.0, execution=settings.execution
        )
        temperature, offset = self.config["pos"]
        criterion: nn.Module = DenoisingCriterion(self.criterion(), **self.branches())
        model = self.detector(
            layers,
            backbone=ExtraLevelMapper(
                backbone,
                list(backbone.output_shape()),
                sizes["channels"],
                norm_groups=int(self.config["gn"]),
                bias=True,
            ),
            encoder=DeformableEncoder(
                num_layers=int(self.config["Lenc"]),
                position_temperature=temperature,
                position_offset=offset,
                **layers,
            ),
            denoising=self.denoising(),
            criterion=criterion,
            num_classes=int(self.config["C"]),
            execution=settings.execution,
        )
        if settings.replace_parts is not None:
            model.decoder, model.criterion = map(
                settings.replace_parts, (model.decoder, model.criterion)
            )
        self._names = Names(self.origin, model.state_dict())
        self.load_weights(model, inputs.weights(self.weights))
        model.denoising.draw = partial(self.noise, inputs)
        return model.to(settings.device, settings.dtype).eval(), features

    def placed(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Numbers of all objects (G, P, objects of the batch, ...), each in its slot."""
        counts = [len(self.case.array(f"gt/{b}/labels")) for b in self.images]
        real = torch.arange(shape[-1]) < torch.tensor(counts)[:, None]
        slots = x.new_zeros(*shape, *x.shape[1:])
        slots[:, :, real.to(x.device)] = x.unflatten(0, (shape[0], shape[1], sum(counts)))
        return slots

    def labels(self, inputs: Inputs, shape: tuple[int, ...], rate: float) -> tuple[Tensor, Tensor]:
        """Draws of whether to replace the labels, and the labels to replace with: the file has
        those alone that are replaced."""
        replace_draw = inputs.tensor("dn/random/label_u", exact=True)
        labels = torch.zeros(len(replace_draw), dtype=torch.long, device=replace_draw.device)
        labels[replace_draw < rate] = inputs.tensor("dn/random/label_new")
        return self.placed(replace_draw, shape), self.placed(labels, shape)

    def quantities(self) -> Iterator[Quantity]:
        yield from of_part("infer", expand(_both("", _stages), "infer/"))
        yield from of_part("train", self._train())
        for name in self.cross:
            yield from of_part(name, self._cross(f"cross/{name}/"))

    def _train(self) -> Iterator[Quantity]:
        tables = {
            **_both("", _stages),
            **_both("dn_", partial(_branch, "denoising")),
            **_TARGETS,
            **_TOTAL,
        }
        yield from expand(tables, "train/")
        for branch, template in self.prefixes.items():
            num_stages = self.num_stages if branch != "encoder" else 1
            for official, term in _TERMS.items():
                for t in range(num_stages):
                    name = template.format(official, "" if t == num_stages - 1 else f"_{t}")
                    ours = partial(_loss, branch, term, t)
                    yield Quantity(f"train/losses/{name}", LOSS, ours)
        yield from self._gradients("train/")

    def _cross(self, step: str) -> Iterator[Quantity]:
        yield from expand(_CROSS, step)
        for t in range(self.num_stages):
            yield Quantity(
                f"{step}avg_factor/{t}", LOSS, lambda run, t=t: run.losses.main.cls_normalizer[t]
            )
            yield Quantity(f"{step}loss_ce/{t}", LOSS, partial(_loss, "", "loss_cls", t))
        yield from self._gradients(step)

    def _gradients(self, step: str) -> Iterator[Quantity]:
        of_maps = step + "of_map/{}"  # which these files lack
        names = step + "grad_norm/"
        for quantity in self.compare_gradients(names, step + "grad/", norm_of_map=of_maps):
            if quantity.name.startswith(names):
                yield quantity

    def compute(self, settings: Settings) -> dict[str, Run]:
        model, features = self.build(Inputs(self.case, settings), settings)
        trace = Trace()
        trace.output("memory", model.encoder)
        with torch.no_grad():
            runs = {"infer": Run(model.predict(self.batch(features)).stages, model, trace)}
        runs["train"] = self._step(model, features, settings)
        for name in self.cross:
            model.criterion.main.label_assigner = _ASSIGNERS[name]()
            model.criterion.main.normalizer = LabelNormalizer()
            runs[name] = self._step(model, features, settings)
        return runs

    def _step(self, model: QueryDetector, features: list[Tensor], settings: Settings) -> Run:
        trace = Trace()
        trace.output("memory", model.encoder)
        trace.input("predictions", model.criterion)
        run = self.train(model, features, settings, lambda losses: losses.main)
        return replace(run, trace=trace)


@CASE_KINDS.register()
class DINOCase(DenoisingCase):
    """DINO of the authors' code."""

    title = "DINO"
    origin = ORIGINS[0]
    repeated = re.compile(
        r"(class|bbox)_embed\..*|transformer\.decoder\.(class|bbox)_embed\.[1-9]\d*\..*"
    )
    prefixes = {"": "loss_{}{}", "denoising": "loss_{}_dn{}", "encoder": "loss_{}_interm{}"}

    @classmethod
    def matches(cls, case: Case) -> bool:
        return {"config_json", "train/dn_logits", "dn/random/box_sign01"} <= case.names and {
            "dn_number",
            "Lenc",
        } <= set(case.config("config_json"))

    def quantities(self) -> Iterator[Quantity]:
        yield from super().quantities()
        in_a_batch: Table = {
            name: (limit, lambda run, ours=ours: ours(run)[0])
            for name, (limit, ours) in _both("enc_topk_", _choice).items()
        }
        yield from of_part("infer", expand(in_a_batch, "infer/"))

    def branches(self) -> dict[str, Criterion]:
        return {**super().branches(), "encoder": self.criterion()}

    def denoising(self) -> Denoising:
        return ContrastiveDenoising(
            int(self.config["C"]),
            int(self.config["D"]),
            budget=int(self.config["dn_number"]),
            label_noise=self.config["label_noise"] / 2,
            box_noise=self.config["box_noise"],
        )

    def detector(self, layers: dict[str, Any], **parts: Any) -> QueryDetector:
        num_classes, channels = parts["num_classes"], layers["channels"]
        return DINO(
            initial_queries=MixedQueries(int(self.config["Q"]), channels, num_classes),
            decoder=DINODecoder(
                num_classes,
                num_stages=self.num_stages,
                shared_head=True,
                prediction_eps=self.config["pred_eps"],
                **layers,
            ),
            **parts,
        )

    def noise(self, inputs: Inputs, shape: tuple[int, ...], like: Tensor) -> Noise:
        decisions, labels = self.labels(inputs, shape, self.config["label_noise"] / 2)
        amount = inputs.tensor("dn/random/box_u", exact=True)
        sign = 2 * inputs.tensor("dn/random/box_sign01", exact=True) - 1
        return Noise(decisions, labels, self.placed(amount, shape), self.placed(sign, shape))


@CASE_KINDS.register()
class DNDeformableCase(DenoisingCase):
    """DN-Deformable-DETR of the authors' code."""

    title = "DN-Deformable-DETR"
    origin = ORIGINS[2]
    repeated = re.compile(r"bbox_embed\..*")
    prefixes = {"": "loss_{}{}", "denoising": "tgt_loss_{}{}"}

    @classmethod
    def matches(cls, case: Case) -> bool:
        return {"config_json", "train/dn_logits", "dn/random/box_u"} <= case.names and {
            "groups",
            "Lenc",
        } <= set(case.config("config_json"))

    def branches(self) -> dict[str, Criterion]:
        return {"denoising": self.criterion(PositiveFocalLoss())}

    def denoising(self) -> Denoising:
        return BoxDenoising(
            int(self.config["C"]),
            int(self.config["D"]),
            num_groups=int(self.config["groups"]),
            label_noise=self.config["label_noise"],
            box_noise=self.config["box_noise"],
        )

    def detector(self, layers: dict[str, Any], **parts: Any) -> QueryDetector:
        return DNDeformableDETR(
            initial_queries=AnchorQueries(int(self.config["Q"]), layers["channels"]),
            decoder=DNDeformableDecoder(parts["num_classes"], num_stages=self.num_stages, **layers),
            **parts,
        )

    def noise(self, inputs: Inputs, shape: tuple[int, ...], like: Tensor) -> Noise:
        decisions, labels = self.labels(inputs, shape, self.config["label_noise"])
        moved = self.placed(2 * inputs.tensor("dn/random/box_u", exact=True) - 1, shape)
        return Noise(decisions, labels, moved.abs(), moved.sign())
