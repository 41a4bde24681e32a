"""Deformable DETR here against that of ``transformers``, with the same weights.

    python -m benchmarks.transformers_peer [--variants two_stage]

Its plain, refining and two-stage detectors get random weights, are saved as the Hugging Face hub
has them, read here as ``train.init_checkpoint`` reads them, and given the same images, alone and
padded. The largest differences of logits and boxes are printed, then the seconds that inference of
one image takes and its parts, in turns. Needs the package transformers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList
from torch import Tensor, nn
from torchvision.ops import box_convert

from benchmarks.rows import Row, add_rows_argument, write_rows
from deformable_detr.checkpoint import CATEGORY_ROWS
from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.memory import keep_freed_memory

CONFIGS = {
    "plain": "deformable_detr/deformable_detr_r50_50e.py",
    "refine": "deformable_detr/deformable_detr_refine_r50_50e.py",
    "two_stage": "deformable_detr/deformable_detr_two_stage_r50_50e.py",
}
LIMIT = 1e-4


class Sizes(NamedTuple):
    """Of both detectors; the defaults are released. The backbone is always a ResNet-50."""

    channels: int = 256
    heads: int = 8
    ffn_channels: int = 1024
    layers: int = 6
    queries: int = 300

    def for_peer(self) -> dict[str, Any]:
        """Arguments of transformers' config."""
        both: dict[str, Any] = {}
        for part in ("encoder", "decoder"):
            both |= {
                f"{part}_attention_heads": self.heads,
                f"{part}_ffn_dim": self.ffn_channels,
                f"{part}_layers": self.layers,
            }
        return {
            **both,
            "d_model": self.channels,
            "num_queries": self.queries,
            "two_stage_num_proposals": self.queries,
        }

    def for_ours(self) -> list[str]:
        """Overrides of our config."""
        return [
            "model.backbone.bias=true",
            f"model.backbone.out_channels={self.channels}",
            f"model.initial_queries.num_queries={self.queries}",
            f"model.encoder.num_layers={self.layers}",
            f"model.decoder.num_stages={self.layers}",
            *(
                f"model.{part}.{key}={value}"
                for part in ("encoder", "decoder")
                for key, value in (("num_heads", self.heads), ("ffn_channels", self.ffn_channels))
            ),
        ]


RELEASED = Sizes()


def make_peer(variant: str, sizes: Sizes = RELEASED, *, seed: int = 0) -> nn.Module:
    """The detector of transformers with random weights, past its initialisation."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(seed)
    config = DeformableDetrConfig(
        with_box_refine=variant != "plain",
        two_stage=variant == "two_stage",
        num_labels=91,
        # Otherwise transformers 5 lets the stages share heads, refining or not.
        tie_word_embeddings=variant == "plain",
        **sizes.for_peer(),
    )
    peer = DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in peer.named_buffers():
            # Frozen batch norms, the last of a block being zero before.
            mean, spread = {
                "weight": (0.4, 0.1),
                "running_var": (1.0, 0.1),
            }.get(name.rpartition(".")[2], (0.0, 0.1))
            buffer.copy_(mean + spread * torch.rand_like(buffer))
        if variant == "two_stage":
            # Cells that are no proposals have all one score; they shall not be the best.
            nothing = peer.model.enc_output_norm(peer.model.enc_output.bias)
            row = peer.class_embed[-1].weight[0]
            row.mul_(-torch.sign(row @ nothing))
        for part in ("class_embed", "bbox_embed"):  # the same module in released models
            alias = getattr(peer.model.decoder, part, None)
            if alias is not None:
                alias.load_state_dict(getattr(peer, part).state_dict())
    return peer


def make_ours(peer: nn.Module, variant: str, sizes: Sizes = RELEASED, *overrides: str) -> nn.Module:
    """Our detector with the weights of a peer, by way of the files that it saves."""
    config = apply_overrides(get_config(CONFIGS[variant]), [*sizes.for_ours(), *overrides])
    ours = instantiate(config.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)  # type: ignore[operator]
        Checkpointer(ours, strict=True).load(folder)
    return ours


def make_images(image_sizes: Sequence[tuple[int, int]], *, seed: int = 0) -> ImageList:
    """Noise of these sizes, as it is after normalisation."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in image_sizes]
    return ImageList.from_tensors(images)


@torch.no_grad()
def run_peer(peer: nn.Module, images: ImageList) -> Any:
    """What transformers predicts."""
    mask = torch.zeros(len(images), *images.tensor.shape[-2:], dtype=torch.long)
    for area, (height, width) in zip(mask, images.image_sizes):
        area[:height, :width] = 1
    return peer(images.tensor, pixel_mask=mask)


@torch.no_grad()
def differences(peer: nn.Module, ours: nn.Module, images: ImageList) -> tuple[float, float]:
    """Largest differences of the last stage's logits, and of boxes as shares of the image.

    Queries are compared with those that begin at the same reference: two proposals of nearly the
    same score may change places.
    """
    theirs = run_peer(peer, images)
    maps = ours.extract_features(images)  # type: ignore[operator]
    queries = ours.initial_queries(maps)  # type: ignore[operator]
    stage = ours.decoder(maps, queries)[-1]  # type: ignore[operator]
    apart = queries.geometry[:, :, None] - theirs.init_reference_points[:, None]
    order = apart.abs().amax(-1).argmin(-1)
    if any(len(x.unique()) != len(x) for x in order):
        raise AssertionError("the queries begin at other references")

    def ordered(x: Tensor) -> Tensor:
        return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))

    shares = stage.boxes / maps.image_sizes.flip(-1).repeat(1, 2)[:, None]
    boxes = box_convert(ordered(theirs.pred_boxes), "cxcywh", "xyxy")
    logits = ordered(theirs.logits)[..., list(CATEGORY_ROWS)]
    return (stage.logits - logits).abs().max().item(), (shares - boxes).abs().max().item()


def _parts(peer: nn.Module, ours: nn.Module) -> dict[str, dict[str, list[nn.Module]]]:
    """What is timed within the two; ours has the neck in its backbone."""
    model: Any = peer.model
    encoder: Any = ours.encoder
    return {
        "here": {
            "backbone": [ours.backbone],
            "encoder": [encoder],
            "its attention": [layer.attention for layer in encoder.layers],
            "decoder": [ours.decoder],
        },
        "transformers": {
            "backbone": [model.backbone, model.input_proj],
            "encoder": [model.encoder],
            "its attention": [layer.self_attn for layer in model.encoder.layers],
            "decoder": [model.decoder],
        },
    }


def _count(
    modules: dict[str, list[nn.Module]], seconds: dict[str, float], clock: Callable[[], float]
) -> None:
    """Add the seconds of every pass to those of its part."""
    for part, of_part in modules.items():
        for module in of_part:
            for leaf in module if isinstance(module, nn.ModuleList) else [module]:
                leaf.register_forward_pre_hook(
                    lambda *_, part=part: seconds.update({part: seconds[part] - clock()})
                )
                leaf.register_forward_hook(
                    lambda *_, part=part: seconds.update({part: seconds[part] + clock()})
                )


def time_both(
    peer: nn.Module, ours: nn.Module, images: ImageList, *, rounds: int, cpu_time: bool = False
) -> dict[str, dict[str, float]]:
    """Median seconds of inference and of its parts; the two take turns.

    Args:
        peer, ours: the detectors; they keep the hooks that count.
        images: a batch.
        rounds: that count, after one that does not.
        cpu_time: count what the processors spend on it, all threads together.
    """
    clock = time.process_time if cpu_time else time.perf_counter

    def run_ours() -> object:
        with torch.no_grad(), ours.products():  # type: ignore[operator]
            return ours.predict(images)  # type: ignore[operator]

    runs = {"here": run_ours, "transformers": lambda: run_peer(peer, images)}
    parts = _parts(peer, ours)
    counts: dict[str, dict[str, float]] = {
        name: dict.fromkeys(of_name, 0.0) for name, of_name in parts.items()
    }
    for name in runs:
        _count(parts[name], counts[name], clock)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for i in range(1 + rounds):
        for name, run in runs.items():
            counts[name].update(dict.fromkeys(counts[name], 0.0))
            gc.collect()
            start = clock()
            run()
            if i:
                found[name].append({"all": clock() - start, **counts[name]})
    return {
        name: {part: statistics.median(x[part] for x in of_name) for part in of_name[0]}
        for name, of_name in found.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if predictions differ by more than the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="of what is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="that count; 0: time nothing")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processors instead of the clock's, where others use the machine too",
    )
    add_rows_argument(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    failed = False
    rows = []
    for variant in args.variants:
        peer = make_peer(variant)
        ours = make_ours(peer, variant)
        for title, sizes in (
            ("no padding", [(480, 640), (480, 640)]),
            ("padded", [(480, 640), (384, 511)]),
        ):
            logits, boxes = differences(peer, ours, make_images(sizes))
            good = max(logits, boxes) <= LIMIT
            failed |= not good
            print(
                f"{variant:10} {title:11} logits {logits:.1e}  boxes {boxes:.1e}  "
                f"{'ok' if good else 'DIFFERENT'}",
                flush=True,
            )
        if not args.rounds:
            continue
        images = make_images([tuple(args.size)])
        seconds = time_both(peer, ours, images, rounds=args.rounds, cpu_time=args.cpu_time)
        print(f"\n{variant}, {args.size[0]}x{args.size[1]}     here  transformers  ratio")
        for part, own in seconds["here"].items():
            theirs = seconds["transformers"][part]
            print(f"  {part:20}{own:8.2f} s{theirs:10.2f} s{theirs / own:9.2f}", flush=True)
        ratio = seconds["transformers"]["all"] / seconds["here"]["all"]
        rows.append(Row(f"Deformable DETR, {variant}, inference", "transformers' class", ratio))
    write_rows(args.rows, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
