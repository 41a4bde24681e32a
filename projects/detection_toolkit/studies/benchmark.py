"""Time a cascade of stages against another form of the same detector, in one process.

The two forms take turns; seconds are medians. Beside them stand a forward pass of torchvision's
ResNet-50 on the same image, the peak memory of a training step, the growth of cost with queries and
stages, and for each part how near it comes to what the machine's own rates of matrix products and
copies allow.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from ..memory import keep_freed_memory
from ..modeling import FeatureMaps
from ..modeling.products import Products
from ..structures import GroundTruth, HeadOutput, Predictions, Queries
from .benchmark_tables import print_cells, print_curves, print_parts
from .environment import processor, today, versions
from .parts import Part, count_operations, parts_of, time_parts
from .timing import alternate, copy_rate, product_rate, resident_memory

__all__ = ["FORMS", "Bench", "Conditions", "memory_of", "memory_of_forms", "run"]

STRIDES = (4, 8, 16, 32)
OBJECTS = 8  # in each training image
MATCHING_BATCH = 16
QUERY_CURVE = (100, 300, 900)
STAGE_CURVE = (3, 6, 9)
FORMS = ("plain", "ours", "checkpointed")


@dataclass(frozen=True)
class Conditions:
    """Under which everything is timed."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    batch: int
    """Images at inference."""
    train_batch: int
    """Images per training step."""
    device: torch.device
    dtype: torch.dtype
    rounds: int
    """That count; each function is called once or twice before."""
    compile: str = ""
    """Mode in which the decoder is compiled and timed as well; empty: it is not."""


class Bench:
    """A detector of a config, its plain twin, and inputs for both.

    Args:
        cfg: with the nodes model, optimizer and dataloader.
        conditions: of all timings.
        to_plain: turns a decoder or criterion into the form that ours is timed against, with the
            same parameters under the same names.
    """

    def __init__(
        self,
        cfg: DictConfig,
        conditions: Conditions,
        to_plain: Callable[[nn.Module], nn.Module],
    ):
        self.cfg = cfg
        self.conditions = conditions
        self.to_plain = to_plain
        self.device, self.dtype = conditions.device, conditions.dtype
        self.height, self.width = conditions.image_size
        self.generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in instantiate(cfg.model).parameters())
        execution = cfg.model.execution
        ours = Products(execution.products, parameters=parameters, compile=conditions.compile)
        # By whether the form is the plain one.
        self.products = {True: Products("torch", parameters=0), False: ours}

    def autocast(self) -> Any:
        """Mixed precision as in training, or nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def decoder(self, *, plain: bool = False, **changes: Any) -> nn.Module:
        """The config's decoder, past its initialisation, where many layers are zero."""
        node = copy.deepcopy(self.cfg.model)
        for key, value in changes.items():
            node.decoder[key] = value
        torch.manual_seed(0)
        decoder = instantiate(node.decoder)
        if plain:
            node.execution.update(sampling="grid", mixing="direct", compile="")
            other = instantiate(node.decoder)
            other.load_state_dict(decoder.state_dict())
            decoder = self.to_plain(other)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.003
        return decoder.to(self.device)

    def criterion(self, *, plain: bool = False) -> nn.Module:
        criterion = instantiate(self.cfg.model.criterion)
        return self.to_plain(criterion) if plain else criterion

    def features(
        self, batch: int, *, plain: bool = False, requires_grad: bool = False
    ) -> FeatureMaps:
        """Maps in the memory format in which the form's own neck yields them."""
        is_channels_last = self.cfg.model.execution.channels_last and not plain
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        channels = self.cfg.model.backbone.out_channels
        height, width = (-(-x // 32) * 32 for x in (self.height, self.width))
        # Drawn where they are needed: on a CPU it takes longer than what is timed on a GPU.
        generator = torch.Generator(self.device).manual_seed(0)
        levels = [
            torch.randn(
                batch, channels, height // s, width // s, generator=generator, device=self.device
            )
            .contiguous(memory_format=layout)
            .requires_grad_(requires_grad)
            for s in STRIDES
        ]
        sizes = torch.tensor([(self.height, self.width)] * batch, device=self.device)
        return FeatureMaps(tuple(levels), STRIDES, sizes, (height, width))

    def queries(self, maps: FeatureMaps, count: int | None = None) -> Queries:
        node = copy.deepcopy(self.cfg.model)
        if count is not None:
            node.initial_queries.num_queries = count
        torch.manual_seed(0)
        queries = instantiate(node.initial_queries).to(self.device)
        with torch.no_grad():
            return queries(maps)

    def truth(self, batch: int) -> GroundTruth:
        corner = torch.rand(batch, OBJECTS, 2, generator=self.generator)
        corner = corner * torch.tensor([self.width, self.height]) * 0.7
        size = torch.rand(batch, OBJECTS, 2, generator=self.generator) * 0.3
        size = size * torch.tensor([self.width, self.height]) + 16
        labels = torch.randint(
            self.cfg.model.num_classes, (batch, OBJECTS), generator=self.generator
        )
        boxes = torch.cat([corner, corner + size], dim=-1)
        sizes = [(self.height, self.width)] * batch
        return GroundTruth.collate(list(boxes), list(labels), sizes, device=self.device)

    def inference(
        self,
        decoder: nn.Module,
        maps: FeatureMaps,
        count: int | None = None,
        *,
        plain: bool = False,
    ) -> Callable[[], object]:
        queries = self.queries(maps, count)

        def run() -> object:
            products = self.products[plain].forward(self.device.type)
            with torch.inference_mode(), self.autocast(), products:
                return decoder(maps, queries)

        return run

    def training_step(
        self,
        decoder: nn.Module,
        criterion: nn.Module,
        maps: FeatureMaps,
        *,
        plain: bool = False,
    ) -> Callable[[], dict[str, float]]:
        """Forward, losses and backward; returns the seconds of each."""
        queries = self.queries(maps)
        truth = self.truth(len(maps.image_sizes))
        leaves = [*decoder.parameters(), *maps.levels]

        def now() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def run() -> dict[str, float]:
            times = [now()]
            products = self.products[plain]
            with self.autocast(), products.forward(self.device.type):
                predictions = Predictions(decoder(maps, queries))
            times.append(now())
            losses = criterion(predictions, truth).as_dict()
            times.append(now())
            with products.backward(self.device.type):
                sum(losses.values()).backward()
            times.append(now())
            for leaf in leaves:
                leaf.grad = None
            names = ("forward", "matching, targets and losses", "backward")
            return {name: b - a for name, a, b in zip(names, times, times[1:])}

        return run


def memory_of(bench: Bench, form: str) -> dict[str, float]:
    """Peak of a training step of decoder and criterion, in this process."""
    on_gpu = bench.device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()  # as training does
    before = 0 if on_gpu else resident_memory(peak=False)
    if form == "checkpointed":
        bench.cfg.model.execution.update(checkpoint=True, compile="")
    decoder = bench.decoder(plain=form == "plain")
    plain = form == "plain"
    features = bench.features(bench.conditions.train_batch, plain=plain, requires_grad=True)
    step = bench.training_step(decoder, bench.criterion(plain=plain), features, plain=plain)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_memory(peak=True)
    return {"peak": peak, "above_interpreter": peak - before}


def memory_of_forms(command: Sequence[str]) -> dict[str, dict[str, float]]:
    """:func:`memory_of` each form, each in a process of its own.

    Args:
        command: prints the memory of the form whose name is put behind it, as JSON in the last
            line.

    Raises:
        RuntimeError: it has failed; with what it said.
    """
    found = {}
    for form in FORMS:
        done = subprocess.run([*command, form], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join([*command, form])} failed:\n{done.stderr}")
        found[form] = json.loads(done.stdout.splitlines()[-1])
    return found


def resnet50(bench: Bench) -> Callable[[], object]:
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(bench.device)
    image = torch.randn(
        bench.conditions.batch, 3, bench.height, bench.width, generator=bench.generator
    ).to(bench.device)

    def run() -> object:
        with torch.inference_mode(), bench.autocast():
            return model(image)

    return run


def compare_decoders(bench: Bench) -> dict[str, dict[str, float]]:
    """Seconds of inference, of a training step and of matching, of both forms."""
    conditions, device = bench.conditions, bench.device
    cells: dict[str, dict[str, float]] = {}
    forms = {"plain": bench.decoder(plain=True).eval(), "ours": bench.decoder().eval()}

    runs = {}
    for name, decoder in forms.items():
        plain = name == "plain"
        features = bench.features(conditions.batch, plain=plain)
        runs[name] = bench.inference(decoder, features, plain=plain)
    if conditions.compile:
        bench.cfg.model.execution.compile = conditions.compile
        runs["compiled"] = bench.inference(bench.decoder().eval(), bench.features(conditions.batch))
        bench.cfg.model.execution.compile = ""
    runs["ResNet-50"] = resnet50(bench)
    cells["decoder, inference"] = alternate(
        runs, device=device, rounds=conditions.rounds, warm_up=2
    )

    steps = {}
    for name, decoder in forms.items():
        plain = name == "plain"
        features = bench.features(conditions.train_batch, plain=plain, requires_grad=True)
        steps[name] = bench.training_step(
            decoder.train(), bench.criterion(plain=plain), features, plain=plain
        )
    cells["decoder + criterion, training step"] = alternate(
        steps, device=device, rounds=(conditions.rounds + 1) // 2, warm_up=1
    )
    del forms, steps, features

    size = (
        bench.cfg.model.decoder.num_stages,
        MATCHING_BATCH,
        bench.cfg.model.initial_queries.num_queries,
    )
    logits = torch.randn(*size, bench.cfg.model.num_classes, generator=bench.generator)
    corner = torch.rand(*size, 2, generator=bench.generator) * bench.height * 0.7
    boxes = torch.cat([corner, corner + 200], dim=-1)
    truth = bench.truth(MATCHING_BATCH)
    outputs = [HeadOutput(*x) for x in zip(logits.to(device), boxes.to(device))]
    assign = {
        name: (lambda c: lambda: c.supervise(outputs, truth))(bench.criterion(plain=plain))
        for name, plain in (("plain", True), ("ours", False))
    }
    name = f"matching + cross-stage targets, batch {MATCHING_BATCH}"
    cells[name] = alternate(assign, device=device, rounds=conditions.rounds, warm_up=2)
    return cells


def curve(bench: Bench, name: str, values: Sequence[int]) -> list[dict[str, float]]:
    """Inference with other numbers of queries or stages, beside the growth of its operations."""
    rows: list[dict[str, float]] = []
    features = bench.features(1)
    for value in values:
        changes = {"num_stages": value} if name == "stages" else {}
        decoder = bench.decoder(**changes).eval()
        run = bench.inference(decoder, features, value if name == "queries" else None)
        seconds = alternate({"": run}, device=bench.device, rounds=3)[""]
        rows.append({name: value, "seconds": seconds, "operations": count_operations(run)})
        del decoder
    return rows


def detector_parts(bench: Bench) -> tuple[list[Part], dict[str, float]]:
    """Parts of a whole detector's training step, and images a second of the whole."""
    conditions, device = bench.conditions, bench.device
    torch.manual_seed(0)
    detector = instantiate(bench.cfg.model).to(device)
    images = [
        {
            "image": torch.randint(256, (3, *conditions.image_size), generator=bench.generator),
            "height": conditions.image_size[0],
            "width": conditions.image_size[1],
        }
        for _ in range(conditions.batch)
    ]

    def infer() -> object:
        with torch.inference_mode(), bench.autocast():
            return detector(images)

    detector.eval()
    rounds = max(3, conditions.rounds // 2)
    parts = time_parts(infer, parts_of(detector), device=device, rounds=rounds)
    whole = alternate({"": infer}, device=device, rounds=rounds)[""]

    step = bench.training_step(
        bench.decoder().train(),
        bench.criterion(),
        bench.features(conditions.train_batch, requires_grad=True),
    )
    step()
    times = [step() for _ in range(rounds)]
    median = {k: sorted(t[k] for t in times)[rounds // 2] for k in times[0]}
    name = "matching, targets and losses"
    parts.append(Part(f"{name} (training, batch {conditions.train_batch})", median[name], 0, 0))
    forward_operations = count_operations(
        bench.inference(bench.decoder(), bench.features(conditions.train_batch))
    )
    parts.append(
        Part(
            f"backward of decoder and criterion (batch {conditions.train_batch})",
            median["backward"],
            2 * forward_operations,
            0,
        )
    )
    parts.append(optimizer_part(bench, detector))
    parts.append(loader_part(bench))
    return parts, {"seconds": whole, "images_per_second": conditions.batch / whole}


def optimizer_part(bench: Bench, detector: nn.Module) -> Part:
    """One step of the config's optimiser over all trainable weights."""
    cfg = copy.deepcopy(bench.cfg.optimizer)
    cfg.params.model = detector
    optimizer = instantiate(cfg)
    parameters = [p for p in detector.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    seconds = alternate({"": optimizer.step}, device=bench.device, rounds=3, warm_up=2)[""]
    # AdamW reads weight, gradient and two moments, and writes all but the gradient.
    moved = 7 * sum(p.numel() * p.element_size() for p in parameters)
    return Part("optimiser", seconds, 0, moved)


def loader_part(bench: Bench) -> Part:
    """Reading and augmenting one 640 x 480 JPEG as the config's training mapper does."""
    mapper = instantiate(bench.cfg.dataloader.train.mapper)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "image.jpg")
        cv2.imwrite(path, picture)
        annotation = {"bbox": [10.0, 20.0, 300.0, 200.0], "bbox_mode": 1, "category_id": 0}
        record = {
            "file_name": path,
            "height": 480,
            "width": 640,
            "image_id": 0,
            "annotations": [{**annotation, "iscrowd": 0}],
        }
        run = {"": lambda: mapper(copy.deepcopy(record))}
        seconds = alternate(run, device=torch.device("cpu"), rounds=7)[""]
    return Part("data loading (one image, one process)", seconds, 0, 0)


def environment(bench: Bench, keeps: bool) -> dict[str, Any]:
    """Where the figures come from."""
    device = bench.device
    known = versions()
    return {
        "date": today(),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **{name: known[name] for name in ("python", "torch", "torchvision")},
        "keeps_freed_memory": keeps,
    }


def run(
    bench: Bench,
    *,
    command: str,
    memory_command: Sequence[str] | None,
    published: float | None = None,
    with_curves: bool = True,
    with_parts: bool = True,
) -> dict[str, Any]:
    """Measure everything, printing each table when it is there.

    Args:
        command: that the user has typed.
        memory_command: see :func:`memory_of_forms`; None: memory is not measured.
        published: decoder inference of the authors' code, times ResNet-50's; printed beside.
        with_curves: also measure how cost grows with queries and stages.
        with_parts: also measure each part of the whole detector beside its bound.

    Returns:
        all figures, for JSON.
    """
    memory = memory_of_forms(memory_command) if memory_command else {}
    keeps = keep_freed_memory() if bench.device.type == "cpu" else False
    with bench.products[False].forward(bench.device.type):
        rates = {"products": product_rate(bench.device, bench.dtype)}
    rates["copies"] = copy_rate(bench.device)
    results: dict[str, Any] = {
        "command": command,
        "environment": environment(bench, keeps),
        "queries": int(bench.cfg.model.initial_queries.num_queries),
        "rates": rates,
        "memory": memory,
        "cells": compare_decoders(bench),
    }
    print(command)
    print(", ".join(f"{k}: {v}" for k, v in results["environment"].items()))
    print(
        f"matrix products {rates['products'] / 1e9:.0f} GFLOP/s, "
        f"copies {rates['copies'] / 1e9:.1f} GB/s"
    )
    print_cells(results, published)
    if with_parts:
        parts, results["detector"] = detector_parts(bench)
        results["parts"] = [
            {**asdict(part), "bound": part.bound(rates["products"], rates["copies"])}
            for part in parts
        ]
        print_parts(results)
    results["curves"] = {}
    if with_curves:
        results["curves"]["queries"] = curve(bench, "queries", QUERY_CURVE)
        results["curves"]["stages"] = curve(bench, "stages", STAGE_CURVE)
        print_curves(results)
    return results
