#!/usr/bin/env python
"""Time the detector against a plain transcription of the method, in one process.

    python tools/benchmark.py [--config-file …] [--device cuda] [--dtype bfloat16] [key=value …]

Prints ratios to the plain form (benchmarks/plain.py) and to a forward pass of torchvision's
ResNet-50 on the same image, the peak memory of a training step, how cost grows with queries and
stages, and for each part how near it comes to what the machine's own rates of matrix products and
copies allow. The two forms take turns; seconds are medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (  # noqa: E402
    alternate,
    copy_rate,
    keep_freed_memory,
    product_rate,
    resident_memory,
)
from benchmarks.parts import Part, count_operations, parts_of, time_parts  # noqa: E402
from benchmarks.plain import to_plain  # noqa: E402

from detection_toolkit.config import apply_overrides, get_config  # noqa: E402
from detection_toolkit.engine import user_errors  # noqa: E402
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import (
    GroundTruth,  # noqa: E402
    HeadOutput,
    Predictions,
    Queries,
)

STRIDES = (4, 8, 16, 32)
OBJECTS = 8  # in each training image, as where the official decoder was measured
MATCHING_BATCH = 16
QUERY_CURVE = (100, 300, 900)
STAGE_CURVE = (3, 6, 9)
PUBLISHED = {100: 0.46, 300: 1.35}  # official decoder, inference, times ResNet-50 (two CPU threads)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="stageinteractor/stageinteractor_r50_100q_1x.py")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--batch", type=int, default=1, help="images at inference (default: 1)")
    parser.add_argument("--train-batch", type=int, default=2, help="images a step (default: 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument(
        "--compile",
        metavar="MODE",
        default="",
        help="also time the compiled decoder: default, reduce-overhead, … (minutes on a CPU)",
    )
    parser.add_argument("--no-curves", action="store_true", help="leave out queries and stages")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--memory-of", choices=["plain", "ours", "checkpointed"], help="internal")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    args = parser.parse_args(argv)
    for name in ("batch", "train_batch", "threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.image_size) < 32:
        parser.error("--image-size: both sides need at least 32 pixels")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


class Bench:
    """A detector of a config, its plain twin, and inputs for both."""

    def __init__(self, cfg: DictConfig, args: argparse.Namespace):
        self.cfg = cfg
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        self.height, self.width = args.image_size
        self.generator = torch.Generator().manual_seed(0)

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
            decoder = to_plain(other)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.003
        return decoder.to(self.device)

    def criterion(self, *, plain: bool = False) -> nn.Module:
        criterion = instantiate(self.cfg.model.criterion)
        return to_plain(criterion) if plain else criterion

    def features(
        self, batch: int, *, plain: bool = False, requires_grad: bool = False
    ) -> FeatureMaps:
        """Maps in the memory format in which the form's own neck yields them."""
        is_channels_last = self.cfg.model.execution.channels_last and not plain
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        channels = self.cfg.model.backbone.out_channels
        height, width = (-(-x // 32) * 32 for x in (self.height, self.width))
        levels = [
            torch.randn(batch, channels, height // s, width // s, generator=self.generator)
            .to(self.device, memory_format=layout)
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
        self, decoder: nn.Module, maps: FeatureMaps, count: int | None = None
    ) -> Callable[[], object]:
        queries = self.queries(maps, count)

        def run() -> object:
            with torch.inference_mode(), self.autocast():
                return decoder(maps, queries)

        return run

    def training_step(
        self, decoder: nn.Module, criterion: nn.Module, maps: FeatureMaps
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
            with self.autocast():
                predictions = Predictions(decoder(maps, queries))
            times.append(now())
            losses = criterion(predictions, truth).as_dict()
            times.append(now())
            sum(losses.values()).backward()
            times.append(now())
            for leaf in leaves:
                leaf.grad = None
            names = ("forward", "matching, targets and losses", "backward")
            return {name: b - a for name, a, b in zip(names, times, times[1:])}

        return run


def memory_of(bench: Bench, form: str) -> dict[str, float]:
    """Peak of a training step of decoder and criterion, in this process."""
    args = bench.args
    on_gpu = bench.device.type == "cuda"
    before = 0 if on_gpu else resident_memory(peak=False)
    if form == "checkpointed":
        bench.cfg.model.execution.update(checkpoint=True, compile="")
    decoder = bench.decoder(plain=form == "plain")
    plain = form == "plain"
    features = bench.features(args.train_batch, plain=plain, requires_grad=True)
    step = bench.training_step(decoder, bench.criterion(plain=plain), features)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_memory(peak=True)
    return {"peak": peak, "above_interpreter": peak - before}


def all_memory(argv: Sequence[str]) -> dict[str, dict[str, float]]:
    """:func:`memory_of` each form, each in a process of its own."""
    found = {}
    for form in ("plain", "ours", "checkpointed"):
        command = [sys.executable, __file__, *argv, "--memory-of", form]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found[form] = json.loads(done.stdout.splitlines()[-1])
    return found


def resnet50(bench: Bench) -> Callable[[], object]:
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(bench.device)
    image = torch.randn(
        bench.args.batch, 3, bench.height, bench.width, generator=bench.generator
    ).to(bench.device)

    def run() -> object:
        with torch.inference_mode(), bench.autocast():
            return model(image)

    return run


def compare_decoders(bench: Bench) -> dict[str, dict[str, float]]:
    """Seconds of inference, of a training step and of matching, of both forms."""
    args, device = bench.args, bench.device
    cells: dict[str, dict[str, float]] = {}
    forms = {"plain": bench.decoder(plain=True).eval(), "ours": bench.decoder().eval()}

    runs = {
        name: bench.inference(decoder, bench.features(args.batch, plain=name == "plain"))
        for name, decoder in forms.items()
    }
    if args.compile:
        bench.cfg.model.execution.compile = args.compile
        runs["compiled"] = bench.inference(bench.decoder().eval(), bench.features(args.batch))
        bench.cfg.model.execution.compile = ""
    runs["ResNet-50"] = resnet50(bench)
    cells["decoder, inference"] = alternate(runs, device=device, rounds=args.rounds, warm_up=2)

    steps = {}
    for name, decoder in forms.items():
        plain = name == "plain"
        features = bench.features(args.train_batch, plain=plain, requires_grad=True)
        steps[name] = bench.training_step(decoder.train(), bench.criterion(plain=plain), features)
    cells["decoder + criterion, training step"] = alternate(
        steps, device=device, rounds=max(3, args.rounds // 2), warm_up=1
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
    cells[name] = alternate(assign, device=device, rounds=args.rounds, warm_up=2)
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
    args, device = bench.args, bench.device
    torch.manual_seed(0)
    detector = instantiate(bench.cfg.model).to(device)
    images = [
        {
            "image": torch.randint(256, (3, *args.image_size), generator=bench.generator),
            "height": args.image_size[0],
            "width": args.image_size[1],
        }
        for _ in range(args.batch)
    ]

    def infer() -> object:
        with torch.inference_mode(), bench.autocast():
            return detector(images)

    detector.eval()
    rounds = max(3, args.rounds // 2)
    parts = time_parts(infer, parts_of(detector), device=device, rounds=rounds)
    whole = alternate({"": infer}, device=device, rounds=rounds)[""]

    step = bench.training_step(
        bench.decoder().train(),
        bench.criterion(),
        bench.features(args.train_batch, requires_grad=True),
    )
    step()
    times = [step() for _ in range(rounds)]
    median = {k: sorted(t[k] for t in times)[rounds // 2] for k in times[0]}
    name = "matching, targets and losses"
    parts.append(Part(f"{name} (training, batch {args.train_batch})", median[name], 0, 0))
    forward_operations = count_operations(
        bench.inference(bench.decoder(), bench.features(args.train_batch))
    )
    parts.append(
        Part(
            f"backward of decoder and criterion (batch {args.train_batch})",
            median["backward"],
            2 * forward_operations,
            0,
        )
    )
    parts.append(optimizer_part(bench, detector))
    parts.append(loader_part(bench))
    return parts, {"seconds": whole, "images_per_second": args.batch / whole}


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
    device = bench.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    processor = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "keeps_freed_memory": keeps,
    }


def print_cells(results: dict[str, Any]) -> None:
    inference = results["cells"]["decoder, inference"]
    resnet = inference["ResNet-50"]
    print("\n| | plain (s) | ours (s) | ratio |\n|---|---|---|---|")
    for name, cell in results["cells"].items():
        for form in ("ours", "compiled"):
            if form in cell:
                ratio = cell["plain"] / cell[form]
                label = name if form == "ours" else f"{name}, {form}"
                print(f"| {label} | {cell['plain']:.4f} | {cell[form]:.4f} | {ratio:.2f}x |")
    memory = results["memory"]
    for kind, label in (("above_interpreter", "decoder + criterion"), ("peak", "whole process")):
        plain = memory["plain"][kind]
        for form in ("ours", "checkpointed"):
            value = memory[form][kind]
            print(
                f"| peak memory of a training step, {label}{', checkpointed' * (form != 'ours')} "
                f"| {plain / 1e9:.2f} GB | {value / 1e9:.2f} GB | {value / plain:.2f} of it |"
            )
    print(
        f"\nResNet-50 forward: {resnet:.3f} s. Decoder inference, plain, in these units: "
        f"{inference['plain'] / resnet:.2f}",
        end="",
    )
    published = PUBLISHED.get(results["queries"])
    if published:
        print(f" (the official one was measured at {published:.2f})", end="")
    print(f"; ours: {inference['ours'] / resnet:.2f}.")


def print_parts(results: dict[str, Any]) -> None:
    print("\n| part | ms | GFLOP | MB | bound (ms) | reached |\n|---|---|---|---|---|---|")
    for part in results["parts"]:
        bound = part["bound"]
        reached = f"{bound / part['seconds']:.0%}" if bound else "-"
        bound_text = f"{1e3 * bound:.1f}" if bound else "-"
        print(
            f"| {part['name']} | {1e3 * part['seconds']:.1f} | {part['operations'] / 1e9:.1f} | "
            f"{part['bytes'] / 1e6:.0f} | {bound_text} | {reached} |"
        )
    whole = results["detector"]
    print(f"\nWhole detector, inference: {whole['images_per_second']:.2f} images/s.")


def print_curves(results: dict[str, Any]) -> None:
    for name, rows in results["curves"].items():
        print(f"\n| {name} | s | time, relative | operations, relative |\n|---|---|---|---|")
        for row in rows:
            print(
                f"| {row[name]} | {row['seconds']:.3f} | "
                f"{row['seconds'] / rows[0]['seconds']:.2f} | "
                f"{row['operations'] / rows[0]['operations']:.2f} |"
            )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv)
    with user_errors():
        cfg = apply_overrides(get_config(args.config_file), args.overrides)
        torch.set_num_threads(args.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        bench = Bench(cfg, args)
        if args.memory_of:
            print(json.dumps(memory_of(bench, args.memory_of)))
            return 0
        memory = all_memory(argv)
        keeps = keep_freed_memory() if bench.device.type == "cpu" else False
        rates = {
            "products": product_rate(bench.device, bench.dtype),
            "copies": copy_rate(bench.device),
        }
        results: dict[str, Any] = {
            "command": " ".join(["python tools/benchmark.py", *argv]),
            "environment": environment(bench, keeps),
            "queries": int(cfg.model.initial_queries.num_queries),
            "rates": rates,
            "memory": memory,
            "cells": compare_decoders(bench),
        }
        print(results["command"])
        print(", ".join(f"{k}: {v}" for k, v in results["environment"].items()))
        print(
            f"matrix products {rates['products'] / 1e9:.0f} GFLOP/s, "
            f"copies {rates['copies'] / 1e9:.1f} GB/s"
        )
        print_cells(results)
        parts, results["detector"] = detector_parts(bench)
        results["parts"] = [
            {**asdict(part), "bound": part.bound(rates["products"], rates["copies"])}
            for part in parts
        ]
        print_parts(results)
        results["curves"] = {}
        if not args.no_curves:
            results["curves"]["queries"] = curve(bench, "queries", QUERY_CURVE)
            results["curves"]["stages"] = curve(bench, "stages", STAGE_CURVE)
            print_curves(results)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
