"""How fast: forms as ratios to the plain one, against the floor of the device, and whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from detectron2.config import instantiate
from torch import Tensor, nn

from ....errors import UserError
from ....modeling.recording import Recordings
from ....structures import HeadOutput
from ...benchmark import Bench, Conditions
from ...parts import count_operations, parts_of, time_parts
from ...steps import StepCost, cost_of_a_step
from ...timing import alternate, copy_rate, product_rate
from ..context import Context, Row, rows_of
from ..forms import (
    COMPILED,
    INFERENCE_ONLY,
    NEEDS_GPU,
    execution,
    possible_forms,
    put_into_form,
    tf32,
)
from ..plan import NamedConfig
from .correct import random_images

__all__ = ["fast"]

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
        if model.decoder:
            yield from rows_of(model.name, partial(_decoder, context, model, rates))
        for form in _whole_forms(context):
            name = f"{model.name}, whole detector, {form}"
            yield from rows_of(name, partial(_whole, context, model, form, rates))
    for model in models:
        for form in context.plan.forms:
            if model.decoder and form in COMPILED and (context.on_gpu or form not in NEEDS_GPU):
                for precision in ("bfloat16", "float32"):
                    name = f"{model.name}, {precision}, {form}"
                    yield from rows_of(name, partial(_compiled, context, model, precision, form))


def _decoder(context: Context, model: NamedConfig, rates: dict[str, float]) -> Iterator[Row]:
    """The decoder by itself, and the matching of its predictions."""
    forms = possible_forms(context.plan.forms, on_gpu=context.on_gpu)
    benches = {form: _FormBench(context, model, form) for form in forms}
    for precision in _precisions(context):
        with tf32(enabled=precision == "TF32"):
            yield from _inference(context, model, benches, precision, rates)
            yield from _training(context, model, benches, precision)
    yield from _matching(context, model, benches)


def _precisions(context: Context) -> list[str]:
    return [name for name in DTYPES if context.on_gpu or name != "TF32"]


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

    def __init__(self, context: Context, model: NamedConfig, form: str):
        self.cfg = copy.deepcopy(model.load())
        put_into_form(self.cfg, form)
        plan = context.plan
        conditions = Conditions(plan.image_size, 1, 1, context.device, torch.float32, plan.rounds)
        self.bench = Bench(self.cfg, conditions, context.to_plain)
        self.form = form
        self.is_plain = form == "plain"

    def _part(self, make: Callable[..., nn.Module]) -> nn.Module:
        if not self.is_plain:
            return make()
        try:
            return make(plain=True)
        except UserError:  # without a transcription the equations step by step are the plain form
            return make()

    @cached_property
    def decoder(self) -> nn.Module:
        return self._part(self.bench.decoder)

    @cached_property
    def criterion(self) -> nn.Module:
        return self._part(self.bench.criterion)

    def inference(self, batch: int, precision: str) -> Callable[[], object]:
        self.bench.dtype = DTYPES[precision]
        decoder, maps = self.decoder.eval(), self.bench.features(batch, plain=self.is_plain)
        if not execution(self.form).cuda_graphs:
            return self.bench.inference(decoder, maps)
        recordings, queries = Recordings(), self.bench.queries(maps)

        def network(*levels: Tensor) -> tuple[Tensor, Tensor]:
            output = decoder(replace(maps, levels=levels), queries)[-1]
            return output.logits, output.boxes

        def run() -> object:
            with torch.inference_mode(), self.bench.autocast():
                return recordings(network, maps.levels, decoder.parameters())

        return run

    def training(self, batch: int, precision: str) -> Callable[[], object]:
        """A step without an update."""
        self.bench.dtype = DTYPES[precision]
        maps = self.bench.features(batch, plain=self.is_plain, requires_grad=True)
        return self.bench.training_step(self.decoder.train(), self.criterion, maps)


def _inference(
    context: Context,
    model: NamedConfig,
    benches: dict[str, _FormBench],
    precision: str,
    rates: dict[str, float],
) -> Iterator[Row]:
    for batch in context.plan.inference_batches:
        runs = {form: bench.inference(batch, precision) for form, bench in benches.items()}
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
    context: Context, model: NamedConfig, benches: dict[str, _FormBench], precision: str
) -> Iterator[Row]:
    for batch in model.training_batches or context.plan.training_batches:
        first = None
        for form in possible_forms(benches, on_gpu=context.on_gpu, training=True):
            step = benches[form].training(batch, precision)
            cost = _cost(context, step)
            first = first or cost
            name = f"{model.name}, training step, batch {batch}, {precision}, {form}"
            yield Row(name, _beside(cost, first))
            del step


def _cost(context: Context, step: Callable[[], object]) -> StepCost:
    # The step itself frees its gradients.
    return cost_of_a_step(step, lambda: None, device=str(context.device), steps=context.plan.rounds)


def _beside(cost: StepCost, first: StepCost) -> dict[str, Any]:
    return {
        "ms": 1e3 * cost.seconds,
        "times plain": first.seconds / cost.seconds,
        "memory (MiB)": cost.memory,
        "of plain's memory": cost.memory / first.memory if first.memory else None,
    }


def _matching(
    context: Context, model: NamedConfig, benches: dict[str, _FormBench]
) -> Iterator[Row]:
    """Matching and class targets of random predictions."""
    batch = context.plan.matching_batch
    runs = {}
    for form in ("plain", "gather"):
        made = benches[form]
        bench, cfg = made.bench, made.cfg.model
        size = (cfg.decoder.num_stages, batch, cfg.initial_queries.num_queries)
        logits = torch.randn(*size, cfg.num_classes, generator=bench.generator)
        corner = torch.rand(*size, 2, generator=bench.generator) * bench.height * 0.7
        boxes = torch.cat([corner, corner + 0.2 * bench.height], dim=-1)
        outputs = [HeadOutput(*x) for x in zip(logits.to(context.device), boxes.to(context.device))]
        runs[form] = partial(made.criterion.supervise, outputs, bench.truth(batch))
    seconds = alternate(runs, device=context.device, rounds=context.plan.rounds, warm_up=2)
    yield from _ratios(f"{model.name}, matching and targets, batch {batch}", seconds)


def _whole_forms(context: Context) -> list[str]:
    """The plain form, and those that users have a reason to choose on this device."""
    forms = possible_forms(context.plan.forms, on_gpu=context.on_gpu)
    return [form for form in forms if not (context.on_gpu and form == "gather")]


def _whole(
    context: Context, model: NamedConfig, form: str, rates: dict[str, float]
) -> Iterator[Row]:
    """Images a second of the whole detector, and how near its parts come to the floor."""
    plan = context.plan
    precision = "bfloat16" if context.on_gpu else "float32"
    autocast = partial(
        torch.autocast, context.device.type, torch.bfloat16, enabled=precision != "float32"
    )
    cfg = copy.deepcopy(model.load())
    put_into_form(cfg, form)
    torch.manual_seed(0)
    detector = instantiate(cfg.model).to(context.device)
    name = f"{model.name}, whole detector"
    for batch in plan.inference_batches:
        images = random_images(plan.image_size, detector.num_classes, batch)

        def infer(images: list[dict] = images) -> object:
            with torch.inference_mode(), autocast():
                return detector(images)

        detector.eval()
        seconds = alternate({"": infer}, device=context.device, rounds=plan.rounds, warm_up=2)[""]
        yield Row(
            f"{name}, inference, batch {batch}, {precision}, {form}",
            {"ms": 1e3 * seconds, "images/s": batch / seconds},
        )
        # A replay calls no module.
        if batch == 1 and form not in INFERENCE_ONLY:
            for part in time_parts(
                infer, parts_of(detector), device=context.device, rounds=plan.rounds
            ):
                bound = part.bound(rates[precision], rates["copies"])
                values = {
                    "ms": 1e3 * part.seconds,
                    "floor (ms)": 1e3 * bound,
                    "reached": bound / part.seconds,
                }
                yield Row(f"{name}, {part.name}, {precision}, {form}", values)
    if form in INFERENCE_ONLY:
        return
    node = copy.deepcopy(cfg.optimizer)
    node.params.model = detector.train()
    optimizer = instantiate(node)
    for batch in model.training_batches or plan.training_batches:
        images = random_images(plan.image_size, detector.num_classes, batch)

        def step(images: list[dict] = images) -> None:
            with autocast():
                losses = detector(images)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        cost = _cost(context, step)
        yield Row(
            f"{name}, training step, batch {batch}, {precision}, {form}",
            {
                "ms": 1e3 * cost.seconds,
                "images/s": batch / cost.seconds,
                "memory (MiB)": cost.memory,
            },
        )


def _compiled(context: Context, model: NamedConfig, precision: str, form: str) -> Iterator[Row]:
    """Inference and a training step at the smallest batches."""
    if context.seconds_left() < COMPILING:
        yield Row(
            f"{model.name}, {precision}, {form}",
            note="not begun: compiling takes up to a minute, and less time was left",
        )
        return
    plan = context.plan
    benches = {f: _FormBench(context, model, f) for f in (plan.forms[0], form)}
    batch = plan.inference_batches[0]
    runs = {f: bench.inference(batch, precision) for f, bench in benches.items()}
    seconds = alternate(runs, device=context.device, rounds=plan.rounds, warm_up=4)
    *_, last = _ratios(f"{model.name}, inference, batch {batch}, {precision}", seconds)
    yield last
    if context.seconds_left() < COMPILING:
        return
    batch = plan.training_batches[0]
    first, cost = (_cost(context, b.training(batch, precision)) for b in benches.values())
    yield Row(
        f"{model.name}, training step, batch {batch}, {precision}, {form}", _beside(cost, first)
    )
