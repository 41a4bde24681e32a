#!/usr/bin/env python3
"""Time what mosaic and mixup cost a process that loads images.

    python -m benchmarks.multi_image

Images a second of processor time in one process, which reads and augments them as in a run: each by
itself, and put together. Times are medians of rounds that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import cv2
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data.stream import Draw, SeededDataset

# Shares of mosaic and of mixup.
PARTS = {
    "images by themselves": (0.0, 0.0),
    "mosaic": (1.0, 0.0),
    "mixup": (0.0, 1.0),
    "mosaic, a tenth mixup": (1.0, 0.1),
}


def make_dataset(
    cfg: DictConfig, records: list[dict], mosaic: float, mixup: float
) -> SeededDataset:
    """The stream's images for shares of mosaic and mixup."""
    node = cfg.dataloader.train.mapper.copy()
    node.mosaic.prob, node.mixup.prob = mosaic, mixup
    return SeededDataset(records, instantiate(node), seed=1, with_others=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="stageinteractor/stageinteractor_tiny_mosaic.py")
    parser.add_argument("--images", type=int, default=200, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="changes to the config")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # as in a loader process
    opts = args.opts or ["dataloader.train.dataset.names=shapes_train"]
    cfg = apply_overrides(get_config(args.config), opts)
    records = list(instantiate(cfg.dataloader.train.dataset))
    datasets = {name: make_dataset(cfg, records, *shares) for name, shares in PARTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in datasets}
    for number in range(args.rounds):
        for name, dataset in datasets.items():
            start = time.process_time()
            for position in range(number * args.images, (number + 1) * args.images):
                dataset[Draw(position, position % len(records))]
            seconds[name].append((time.process_time() - start) / args.images)
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:22}{1 / median:8.0f} images/s{median / first:8.2f} times as long")


if __name__ == "__main__":
    main()
