"""How fast: forms as ratios to the plain one, against the floor of the device, and whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from torch import nn

from ....errors import UserError
from ....structures import HeadOutput
from ...benchmark import Bench, Conditions
from ...parts import count_operations, parts_of, time_parts
from ...steps import cost_of_a_step
from ...timing import alternate, copy_rate, product_rate
from ..context import Context, Row, rows_of
from ..forms import NEEDS_GPU, put_into_form, tf32
from ..plan import NamedConfig
from .correct import random_images

__all__ = ["fast"]

COMPILED = ("compiled", "CUDA graphs")
# Seconds that the first call of a compiled form may take; with less left it is not begun.
COMPILING = 60.0
DTYPES = {"float32": torch.float32, "TF32": torch.float32, "bfloat16": torch.bfloat16}


def fast(context: Context) -> Iterator[Row]:
    """Rates of the device; then of each model decoder, training step, matching, whole detector."""
    rates: dict[str, float] = {}
    yield from rows_of("rates", partial(_rates, context, rates))
    models = context.plan.models
    # What no other row depends on, and what takes longest, comes last.
    for model in models:
        for precision in _precisions(context):
            with tf32(enabled=precision == "TF32"):
                for what in (_inference, _training):
                    name = f"{model.name}, {precision}"
                    yield from rows_of(name, partial(what, context, model, precision, rates))
        yield from rows_of(f"{model.name}, matching", partial(_matching, context, model))
        yield from rows_of(f"{model.name}, whole", partial(_whole, context, model, rates))
    for model in models:
        for precision in _precisions(context):
            for form in context.plan.forms:
                if form in COMPILED and _is_possible(context, form):
                    name = f"{model.name}, {precision}, {form}"
                    with tf32(enabled=precision == "TF32"):
                        yield from rows_of(
                            name, partial(_compiled, context, model, precision, form)
                        )


def _precisions(context: Context) -> list[str]:
    return [name for name in DTYPES if context.on_gpu or name != "TF32"]


def _is_possible(context: Context, form: str) -> bool:
    return context.on_gpu or form not in NEEDS_GPU


def _rates(context: Context, rates: dict[str, float]) -> Iterator[Row]:
    size, megabytes = (8192, 1024) if context.on_gpu else (512, 16)
    for precision in _precisions(context):
        with tf32(enabled=precision == "TF32"):
            rates[precision] = product_rate(context.device, DTYPES[precision], size)
    rates["copies"] = copy_rate(context.device, megabytes)
    values = {f"{name} (TFLOP/s)": rates[name] / 1e12 for name in _precisions(context)}
    yield Row("rates", {**values, "copies (GB/s)": rates["copies"] / 1e9})


class _FormBench:
    """The benchmark's inputs, and the detector's parts in one form."""

    def __init__(self, context: Context, model: NamedConfig, precision: str, form: str, batch: int):
        self.cfg = copy.deepcopy(model.load())
        put_into_form(self.cfg, form)
        plan = context.plan
        conditions = Conditions(
            plan.image_size, batch, batch, context.device, DTYPES[precision], plan.rounds
        )
        self.bench = Bench(self.cfg, conditions, context.to_plain)
        self.is_plain = form == "plain"

    def _part(self, make: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
        if not self.is_plain:
            return make(**kwargs)
        try:
            return make(plain=True, **kwargs)
        except UserError:  # without a transcription the equations step by step are the plain form
            return make(**kwargs)

    def inference(self, batch: int) -> Callable[[], object]:
        decoder = self._part(self.bench.decoder).eval()
        return self.bench.inference(decoder, self.bench.features(batch, plain=self.is_plain))

    def training(self, batch: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """A step without an update, and what frees its gradients."""
        decoder = self._part(self.bench.decoder).train()
        maps = self.bench.features(batch, plain=self.is_plain, requires_grad=True)
        step = self.bench.training_step(decoder, self._part(self.bench.criterion), maps)
        return step, lambda: None  # the step itself frees them

    def criterion(self) -> nn.Module:
        return self._part(self.bench.criterion)


def _inference(
    context: Context, model: NamedConfig, precision: str, rates: dict[str, float]
) -> Iterator[Row]:
    for batch in context.plan.inference_batches:
        runs, operations = {}, 0.0
        for form in context.plan.forms:
            if form not in COMPILED and _is_possible(context, form):
                runs[form] = _FormBench(context, model, precision, form, batch).inference(batch)
        operations = count_operations(next(iter(runs.values())))
        seconds = alternate(runs, device=context.device, rounds=context.plan.rounds, warm_up=2)
        floor = operations / rates[precision] if precision in rates else None
        yield from _ratios(f"{model.name}, inference, batch {batch}, {precision}", seconds, floor)


def _ratios(name: str, seconds: dict[str, float], floor: float | None = None) -> Iterator[Row]:
    """Seconds beside those of the first form."""
    first = next(iter(seconds))
    for form, value in seconds.items():
        values: dict[str, Any] = {"ms": 1e3 * value, f"times {first}": seconds[first] / value}
        if floor is not None:
            values["products alone (ms)"] = 1e3 * floor
        yield Row(f"{name}, {form}", values)


def _training(
    context: Context, model: NamedConfig, precision: str, rates: dict[str, float]
) -> Iterator[Row]:
    for batch in context.plan.training_batches:
        first = None
        for form in context.plan.forms:
            if form in COMPILED or not _is_possible(context, form):
                continue
            name = f"{model.name}, training step, batch {batch}, {precision}, {form}"
            step, free = _FormBench(context, model, precision, form, batch).training(batch)
            cost = cost_of_a_step(step, free, device=str(context.device), steps=context.plan.rounds)
            first = first or cost
            yield Row(
                name,
                {
                    "ms": 1e3 * cost.seconds,
                    "times plain": first.seconds / cost.seconds,
                    "memory (MiB)": cost.memory,
                    "of plain's memory": cost.memory / first.memory if first.memory else None,
                },
            )
            del step, free


def _matching(context: Context, model: NamedConfig) -> Iterator[Row]:
    """Matching and class targets of random predictions."""
    batch = context.plan.matching_batch
    runs = {}
    for form in ("plain", "gather"):
        made = _FormBench(context, model, "float32", form, batch)
        bench, cfg = made.bench, made.cfg.model
        size = (cfg.decoder.num_stages, batch, cfg.initial_queries.num_queries)
        logits = torch.randn(*size, cfg.num_classes, generator=bench.generator)
        corner = torch.rand(*size, 2, generator=bench.generator) * bench.height * 0.7
        boxes = torch.cat([corner, corner + 0.2 * bench.height], dim=-1)
        outputs = [HeadOutput(*x) for x in zip(logits.to(context.device), boxes.to(context.device))]
        criterion, truth = made.criterion(), bench.truth(batch)
        runs[form] = partial(criterion.supervise, outputs, truth)
    seconds = alternate(runs, device=context.device, rounds=context.plan.rounds, warm_up=2)
    yield from _ratios(f"{model.name}, matching and targets, batch {batch}", seconds)


def _whole(context: Context, model: NamedConfig, rates: dict[str, float]) -> Iterator[Row]:
    """Images a second of the whole detector, and how near its parts come to the floor."""
    plan = context.plan
    precision = "bfloat16" if context.on_gpu else "float32"
    cfg = copy.deepcopy(model.load())
    torch.manual_seed(0)
    detector = instantiate(cfg.model).to(context.device)
    for batch in plan.inference_batches:
        images = random_images(plan.image_size, detector.num_classes, batch)

        def infer(images: list[dict] = images) -> object:
            enabled = precision != "float32"
            with (
                torch.inference_mode(),
                torch.autocast(context.device.type, torch.bfloat16, enabled=enabled),
            ):
                return detector(images)

        detector.eval()
        seconds = alternate({"": infer}, device=context.device, rounds=plan.rounds, warm_up=2)[""]
        name = f"{model.name}, whole detector, inference, batch {batch}, {precision}"
        yield Row(name, {"ms": 1e3 * seconds, "images/s": batch / seconds})
        if batch == 1:
            for part in time_parts(
                infer, parts_of(detector), device=context.device, rounds=plan.rounds
            ):
                bound = part.bound(rates[precision], rates["copies"])
                values = {
                    "ms": 1e3 * part.seconds,
                    "floor (ms)": 1e3 * bound,
                    "reached": bound / part.seconds,
                }
                yield Row(f"{model.name}, {part.name}, {precision}", values)
    node = copy.deepcopy(cfg.optimizer)
    node.params.model = detector.train()
    optimizer = instantiate(node)
    for batch in plan.training_batches:
        images = random_images(plan.image_size, detector.num_classes, batch)

        def step(images: list[dict] = images) -> None:
            with torch.autocast(
                context.device.type, torch.bfloat16, enabled=precision != "float32"
            ):
                losses = detector(images)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        cost = cost_of_a_step(
            step, optimizer.zero_grad, device=str(context.device), steps=plan.rounds
        )
        name = f"{model.name}, whole detector, training step, batch {batch}, {precision}"
        values = {
            "ms": 1e3 * cost.seconds,
            "images/s": batch / cost.seconds,
            "memory (MiB)": cost.memory,
        }
        yield Row(name, values)


def _compiled(context: Context, model: NamedConfig, precision: str, form: str) -> Iterator[Row]:
    batch = context.plan.inference_batches[0]
    name = f"{model.name}, inference, batch {batch}, {precision}, {form}"
    if context.seconds_left() < COMPILING:
        yield Row(name, note="not begun: compiling takes up to a minute, and less time was left")
        return
    forms = (context.plan.forms[0], form)
    runs = {f: _FormBench(context, model, precision, f, batch).inference(batch) for f in forms}
    seconds = alternate(runs, device=context.device, rounds=context.plan.rounds, warm_up=4)
    *_, last = _ratios(name.removesuffix(f", {form}"), seconds)
    yield last
