#!/usr/bin/env python3
"""Time the encoder's deformable attention against its form by ``grid_sample``.

    python -m benchmarks.deformable_attention [--threads 1]
    python -m benchmarks.deformable_attention --device cuda [--batch 8] [--bfloat16]

One attention layer of the released size, linear layers included, on images of 800x1333: time and
memory of a step. On a CPU it is the processor's time, which other work disturbs least.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.rows import Row, add_rows_argument, write_rows
from deformable_detr.attention import DeformableAttention
from deformable_detr.positions import cell_centers
from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.studies.steps import StepCost, cost_of_a_step

SIZE, STRIDES = (800, 1333), (8, 16, 32, 64)
FORMS = {"cpu": ("grid", "gather"), "cuda": ("grid", "gather", "triton")}
# Of the initial sampling offsets: learned ones depend on the query.
SPREAD = 0.05


def costs(
    form: str, rounds: int, *, device: str = "cpu", batch: int = 1, bfloat16: bool = False
) -> dict[str, StepCost]:
    """Of a forward pass, and of one with its backward pass."""
    torch.manual_seed(0)
    levels = tuple(
        torch.randn(batch, 256, -(-SIZE[0] // s), -(-SIZE[1] // s)).to(device).requires_grad_()
        for s in STRIDES
    )
    maps = FeatureMaps(levels, STRIDES, torch.tensor([SIZE] * batch, device=device), SIZE)
    layer = DeformableAttention(
        256, num_heads=8, num_levels=4, num_points=4, execution=Execution(sampling=form)
    )
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=SPREAD)
    layer.to(device)
    references = cell_centers(maps)[:, :, None].expand(batch, -1, len(STRIDES), -1)
    queries = torch.randn(batch, references.shape[1], 256).to(device).requires_grad_()
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=bfloat16)
    leaves = (queries, *levels, *layer.parameters())

    def free() -> None:
        for leaf in leaves:
            leaf.grad = None

    @torch.no_grad()
    def forward() -> None:
        with autocast():
            layer(queries, references, maps)

    def step() -> None:
        with autocast():
            attended = layer(queries, references, maps)
        attended.float().square().sum().backward()
        free()

    return {
        name: cost_of_a_step(run, free, device=device, steps=rounds)
        for name, run in (("forward", forward), ("and backward", step))
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="median of these")
    parser.add_argument("--device", choices=sorted(FORMS), default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    add_rows_argument(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = {
        form: costs(form, args.rounds, device=args.device, batch=args.batch, bfloat16=args.bfloat16)
        for form in FORMS[args.device]
    }
    print(f"{'':14s}{'':8s}{'ms':>10s}  times as fast   memory")
    plain = next(iter(found.values()))
    rows = []
    for name, first in plain.items():
        for form, cost in ((form, steps[name]) for form, steps in found.items()):
            print(
                f"{name:14s}{form:8s}{1e3 * cost.seconds:10.1f}"
                f"{first.seconds / cost.seconds:15.2f}{cost.memory / first.memory:9.2f}"
            )
            if form != "grid":
                what = f"an encoder layer's deformable attention, {name}, {form}"
                ratios = first.seconds / cost.seconds, cost.memory / first.memory
                rows.append(Row(what, "grid_sample", *ratios))
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
