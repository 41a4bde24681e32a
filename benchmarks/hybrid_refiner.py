#!/usr/bin/env python3
"""Time a hybrid stage of HPR against a plain transcription of it, in one process.

    python -m benchmarks.hybrid_refiner [--threads 1] [--rounds 5] [--device cuda]

A stage of the released size, with 900 queries on an image of 800x1333, and 200 denoising ones more
in training. On a CPU it is the processor's time, which other work disturbs least. The transcription
cuts regions out map by map, for the boxes that belong to each, and writes all keys and values
out. Both have the same weights, and their results are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from benchmarks.rows import Row, add_rows_argument, write_rows
from deformable_detr.decoder import on_levels
from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.modeling import Execution, FeatureMaps
from detection_toolkit.structures import Queries
from detection_toolkit.studies.steps import cost_of_a_step
from hpr import HybridDecoder, HybridStage
from hpr.roi import flat_maps

SIZE, STRIDES = (800, 1333), (8, 16, 32, 64)
QUERIES, DENOISING = 900, 200


def regions_of(boxes: Tensor, maps: FeatureMaps) -> Tensor:
    """(n, C, 7, 7) of one image's boxes (n, 4), map by map."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.log2(area.sqrt() / 56 + 1e-6).floor().clamp(0, len(STRIDES) - 1)
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
    channels = maps.levels[0].shape[1]
    regions = boxes.new_zeros(len(boxes), channels, 7, 7)
    for index, (values, stride) in enumerate(zip(maps.levels, STRIDES)):
        chosen = (level == index).nonzero()[:, 0]
        regions[chosen] = roi_align(values, rois[chosen], 7, 1 / stride, 2, aligned=True)
    return regions


def plain_dynamic_convolution(part: nn.Module, content: Tensor, regions: Tensor) -> Tensor:
    """As the equations are written."""
    channels, inner = content.shape[1], part.inner_channels
    filters = part.filters(content)
    first = filters[:, : channels * inner].view(-1, channels, inner)
    second = filters[:, channels * inner :].view(-1, inner, channels)
    x = regions.flatten(2).transpose(1, 2)
    x = torch.relu(part.norm1(torch.bmm(x, first)))
    x = torch.relu(part.norm2(torch.bmm(x, second)))
    return torch.relu(part.out_norm(part.out(x.flatten(1))))


def plain_regional_attention(part: nn.Module, content: Tensor, regions: Tensor) -> Tensor:
    """As the equations are written."""
    samples = part.samples(content).view(len(content), part.num_samples, -1)
    values = regions.flatten(2).transpose(1, 2)
    keys = values + part.key_position
    attended = part.attention(samples, keys, values)[0]
    return torch.relu(part.out_norm(part.out(attended.flatten(1))))


def plain(stage: HybridStage, queries: Queries, maps: FeatureMaps) -> tuple[Tensor, ...]:
    """The stage step by step, on one image."""
    q, r, s, mask = queries.content, queries.geometry, queries.position, queries.attention_mask
    regions = regions_of(boxes_in_pixels(r, maps.image_sizes)[0], maps)
    dynamic, regional = stage.auxiliary["dynamic"], stage.auxiliary["regional"]

    def attend(part: nn.Module) -> Tensor:
        return q + part.self_attention.attention(q + s, q + s, q, attn_mask=mask)[0]

    def transform(part: nn.Module, x: Tensor) -> Tensor:
        return x + part.ffn.linear2(torch.relu(part.ffn.linear1(x)))

    a, d, c = (attend(part) for part in (stage, dynamic, regional))
    weights = stage.merge_attended.weights
    x = weights[:, 0] * a + weights[:, 1] * d + weights[:, 2] * c
    x = stage.self_attention.norm(x)
    x = transform(stage, stage.norm(x + stage.attention(x + s, on_levels(r, maps), maps)))
    for part, look in ((dynamic, plain_dynamic_convolution), (regional, plain_regional_attention)):
        y = d if part is dynamic else c
        y = part.self_attention.norm(y)
        y = part.norm(y + look(part.look, y[0], regions)[None])
        y = transform(part, y)
        d, c = (y, c) if part is dynamic else (d, y)
    weights = stage.merge_refined.weights
    content = stage.ffn.norm(weights[:, 0] * x + weights[:, 1] * d + weights[:, 2] * c)
    return content, d, c


def ours(stage: HybridStage, queries: Queries, maps: FeatureMaps) -> tuple[Tensor, ...]:
    """The stage as it is."""
    content, found = stage.refine(queries, maps)
    return content, found["dynamic"], found["regional"]


def make(sampling: str, device: str) -> HybridStage:
    """With the same weights for every form."""
    torch.manual_seed(0)
    mixing = "direct" if sampling == "grid" else "factored"
    execution = Execution(sampling=sampling, mixing=mixing)
    return HybridDecoder(80, num_stages=1, execution=execution).stages[0].to(device)


def inputs(count: int, device: str) -> tuple[Queries, tuple[Tensor, ...]]:
    """Queries and maps; boxes of all sizes."""
    torch.manual_seed(0)
    levels = tuple(
        torch.randn(1, 256, -(-SIZE[0] // s), -(-SIZE[1] // s)).to(device).requires_grad_()
        for s in STRIDES
    )
    boxes = torch.rand(1, count, 4)
    boxes = torch.cat([boxes[..., :2], 0.5 * boxes[..., 2:] ** 2 + 0.01], dim=-1).to(device)
    content, position = torch.randn(2, 1, count, 256).to(device)
    return Queries(content.requires_grad_(), boxes, position), levels


def measure(rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of a forward pass at inference, and of one with its backward pass in training."""
    results: dict[str, dict[str, float]] = {}
    outputs = []
    forms = (("plain", plain, make("grid", device)), ("ours", ours, make("auto", device)))
    for name, form, stage in forms:
        # Deformable attention is the same in both; it is not what is compared.
        stage.attention.execution = Execution()
        results[name] = {}
        for what, count in (("inference", QUERIES), ("step", QUERIES + DENOISING)):
            queries, levels = inputs(count, device)
            leaves = (queries.content, *levels, *stage.parameters())
            run = step_of(form, stage, queries, levels, training=what == "step")

            def free(leaves: Sequence[Tensor] = leaves) -> None:
                for leaf in leaves:
                    leaf.grad = None

            cost = cost_of_a_step(run, free, device=device, steps=rounds)
            results[name][what] = cost.seconds
            if what == "inference":
                outputs.append(run())
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    return results


def step_of(
    form: Callable[..., tuple[Tensor, ...]],
    stage: HybridStage,
    queries: Queries,
    levels: tuple[Tensor, ...],
    *,
    training: bool,
) -> Callable[[], tuple[Tensor, ...] | None]:
    """What is timed."""

    def maps() -> FeatureMaps:
        sizes = torch.tensor([SIZE], device=levels[0].device)
        plain_maps = FeatureMaps(levels, STRIDES, sizes, SIZE)
        return flat_maps(plain_maps, torch.float32) if form is ours else plain_maps

    @torch.no_grad()
    def forward() -> tuple[Tensor, ...]:
        return form(stage, queries, maps())

    def step() -> None:
        found = form(stage, queries, maps())
        sum(x.square().sum() for x in found).backward()

    return step if training else forward


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_rows_argument(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = measure(args.rounds, args.device)
    print(f"{'ms':>10} {'plain':>8} {'ours':>8} {'ratio':>6}")
    rows = []
    for what in ("inference", "step"):
        first, second = (1e3 * results[name][what] for name in ("plain", "ours"))
        print(f"{what:>10} {first:8.1f} {second:8.1f} {first / second:6.2f}")
        rows.append(Row(f"a hybrid stage of HPR, {what}", "plain transcription", first / second))
    write_rows(args.rows, rows)


if __name__ == "__main__":
    main()
