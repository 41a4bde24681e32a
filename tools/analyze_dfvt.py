#!/usr/bin/env python
"""Parameters and multiply-adds of DFvT, beside the published ones.

    python tools/analyze_dfvt.py [--variants tiny small base] [--skip-detector]

Prints a Markdown table. Multiply-adds are counted by fvcore, in billions: "layers" are
convolutions, linear layers and norms, as MMDetection's tool counts them; attention's products of
queries, keys and values are a row of their own. The classifier is given 224x224 pixels, backbone
and Mask R-CNN 800x1280; Mask R-CNN with 1000 proposals and 100 detections. What a config's model
costs, module by module, says analyze_model.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from analyze_model import count, prepare
from tabulate import tabulate
from torch import nn

from detection_toolkit.config import get_config
from dfvt import VARIANTS, DFvTBackbone, DFvTClassifier

PUBLISHED = {
    "tiny": dict(top1_gmacs=0.2714, detector_gmacs=178, detector_mparams=25),
    "small": dict(top1_gmacs=0.8143, detector_gmacs=198, detector_mparams=32),
    "base": dict(top1_gmacs=2.5038, detector_gmacs=242, detector_mparams=58),
}
LAYERS = ("conv", "linear", "batch_norm", "layer_norm")
HEIGHT, WIDTH = 800, 1280


class Part(NamedTuple):
    """All modules of a name together."""

    parameters: int
    flops: float


def count_macs(model: nn.Module, inputs: object, part: str = "") -> tuple[Counter[str], Part]:
    """Multiply-adds by operator, in billions; and what is in the modules of one name."""
    modules, operators, _ = count(model.eval(), inputs)
    named = [m for m in modules if m.name.split(".")[-1] == part]
    of_part = Part(sum(m.parameters for m in named), sum(m.flops for m in named))
    return Counter({k: v / 1e9 for k, v in operators.items()}), of_part


def layers(macs: Counter[str]) -> float:
    """Convolutions, linear layers and norms."""
    return sum(macs[kind] for kind in LAYERS)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(variant: str, *, with_detector: bool) -> dict[str, str]:
    """One column of the table."""
    published = PUBLISHED[variant]
    column = {}
    classifier = DFvTClassifier(**VARIANTS[variant])
    macs, _ = count_macs(classifier, (torch.zeros(1, 3, 224, 224),))
    column["classifier: parameters"] = f"{num_parameters(classifier):,}"
    column["classifier: convolutions and linear layers, G"] = f"{macs['conv'] + macs['linear']:.4f}"
    column["classifier: the authors print, G"] = f"{published['top1_gmacs']:.4f}"
    backbone = DFvTBackbone(**VARIANTS[variant])
    macs, fusion = count_macs(backbone, (torch.zeros(1, 3, HEIGHT, WIDTH),), part="fuse")
    column["backbone: parameters"] = f"{num_parameters(backbone):,}"
    column["backbone: of these the output convolutions"] = f"{fusion.parameters:,}"
    column["backbone: layers, G"] = f"{layers(macs):.2f}"
    column["backbone: of these the output convolutions, G"] = f"{fusion.flops / 1e9:.2f}"
    column["backbone: attention's products, G"] = f"{macs['matmul']:.2f}"
    if with_detector:
        detector = prepare(get_config(f"dfvt/mask_rcnn_dfvt_{variant}_1x.py"), "cpu")
        image = torch.zeros(3, HEIGHT, WIDTH)
        macs, _ = count_macs(detector, [{"image": image}])
        column["Mask R-CNN: parameters, M"] = f"{num_parameters(detector) / 1e6:.2f}"
        column["Mask R-CNN: published, M"] = f"{published['detector_mparams']}"
        column["Mask R-CNN: layers, G"] = f"{layers(macs):.2f}"
        column["Mask R-CNN: published, G"] = f"{published['detector_gmacs']}"
    return column


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--skip-detector", action="store_true", help="leave out Mask R-CNN, which takes longest"
    )
    args = parser.parse_args(argv)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    columns = {v: measure(v, with_detector=not args.skip_detector) for v in args.variants}
    rows = [[row, *(columns[v][row] for v in columns)] for row in next(iter(columns.values()))]
    headers = ["", *(f"DFvT-{v[0].upper()}" for v in columns)]
    alignment = ("left", *["right"] * len(columns))
    print(tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
