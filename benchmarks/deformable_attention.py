#!/usr/bin/env python3
"""Time the encoder's deformable attention against its form by ``grid_sample``.

    python -m benchmarks.deformable_attention [--threads 1]

One attention layer of the released size, linear layers included, on an image of 800x1333: seconds
of the processor's time, which other work disturbs least, and memory of a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from deformable_detr.attention import DeformableAttention
from deformable_detr.positions import cell_centers
from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.studies.steps import StepCost, cost_of_a_step

SIZE, STRIDES = (800, 1333), (8, 16, 32, 64)
FORMS = ("grid", "gather")
# Of the initial sampling offsets: learned ones depend on the query.
SPREAD = 0.05


def costs(form: str, rounds: int) -> dict[str, StepCost]:
    """Of a forward pass, and of one with its backward pass."""
    torch.manual_seed(0)
    levels = tuple(
        torch.randn(1, 256, -(-SIZE[0] // s), -(-SIZE[1] // s)).requires_grad_() for s in STRIDES
    )
    maps = FeatureMaps(levels, STRIDES, torch.tensor([SIZE]), SIZE)
    layer = DeformableAttention(
        256, num_heads=8, num_levels=4, num_points=4, execution=Execution(sampling=form)
    )
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=SPREAD)
    references = cell_centers(maps)[:, :, None].expand(1, -1, len(STRIDES), -1)
    queries = torch.randn(1, references.shape[1], 256, requires_grad=True)
    leaves = (queries, *levels, *layer.parameters())

    def free() -> None:
        for leaf in leaves:
            leaf.grad = None

    @torch.no_grad()
    def forward() -> None:
        layer(queries, references, maps)

    def step() -> None:
        layer(queries, references, maps).square().sum().backward()
        free()

    return {
        name: cost_of_a_step(run, free, device="cpu", steps=rounds)
        for name, run in (("forward", forward), ("and backward", step))
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="median of these")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    plain, ours = (costs(form, args.rounds) for form in FORMS)
    print(f"{'':14s}{FORMS[0]:>12s}{FORMS[1]:>12s}  times as fast   memory")
    for name, first in plain.items():
        second = ours[name]
        print(
            f"{name:14s}{first.seconds:10.2f} s{second.seconds:10.2f} s"
            f"{first.seconds / second.seconds:15.2f}"
            f"{second.memory / first.memory:9.2f}"
        )


if __name__ == "__main__":
    main()
