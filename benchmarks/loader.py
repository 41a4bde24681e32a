#!/usr/bin/env python3
"""Time the reading of JPEG files by three libraries, and the loader with them.

    python -m benchmarks.loader --json-file annotations.json --image-root images/

First each file is decoded by Pillow, as Detectron2's ``read_image`` and the project do, by OpenCV
and by torchvision: milliseconds of the processor, and in how many files their pixels are Pillow's.
Then the training loader of a config gives images/s with so many processes; beside it the memory
that one of them has for itself, where the data set has --entries images.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from torchvision.io import ImageReadMode, decode_image, read_file

from detection_toolkit.config import get_config
from detection_toolkit.data import build_train_loader, get_detection_dataset, read_image


def by_opencv(file: str) -> np.ndarray:
    """(H, W, 3) uint8 in RGB, turned as EXIF data says; as all of them give it."""
    return cv2.imread(file, cv2.IMREAD_COLOR)[:, :, ::-1]


def by_torchvision(file: str) -> np.ndarray:
    picture = decode_image(read_file(file), ImageReadMode.RGB, apply_exif_orientation=True)
    return picture.permute(1, 2, 0).numpy()


DECODERS: dict[str, Callable[[str], np.ndarray]] = {
    "Pillow": read_image,
    "OpenCV": by_opencv,
    "torchvision": by_torchvision,
}


def compare_decoders(files: Sequence[str], rounds: int) -> list[str]:
    """One line each: time, and pixels beside Pillow's."""
    seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
    for _ in range(rounds):
        for name, decode in DECODERS.items():
            start = time.process_time()
            for file in files:
                decode(file)
            seconds[name].append((time.process_time() - start) / len(files))
    lines = []
    for name, decode in DECODERS.items():
        equal, largest = 0, 0
        for file in files:
            first, second = (np.asarray(d(file), dtype=int) for d in (DECODERS["Pillow"], decode))
            if first.shape != second.shape:
                largest = 255
                continue
            difference = int(np.abs(first - second).max())
            equal, largest = equal + (difference == 0), max(largest, difference)
        ratios = [a / b for a, b in zip(seconds["Pillow"], seconds[name])]
        lines.append(
            f"{name:12}{1000 * statistics.median(seconds[name]):8.2f} ms"
            f"{statistics.median(ratios):8.2f} times as fast   equal in {equal} of {len(files)}, "
            f"largest difference {largest}"
        )
    return lines


def time_mapper(records: Sequence[dict], config: str) -> str:
    """Processor time of all that is done with an image, its reading among it."""
    mapper = instantiate(get_config(config).dataloader.train.mapper)
    start = time.process_time()
    for record in records:
        mapper(record)
    return f"all, resized {1000 * (time.process_time() - start) / len(records):7.2f} ms"


def private_memory(process: int) -> float:
    """MiB that no other process shares (Linux)."""
    with open(f"/proc/{process}/smaps_rollup") as file:
        lines = [line.split() for line in file if line.startswith("Private_")]
    return sum(int(words[1]) for words in lines) / 1024


def time_loader(
    dataset: list[dict], config: str, workers: int, batches: int, batch_size: int
) -> str:
    """Images/s once the loader is at work, and what a process of it holds."""
    loader = build_train_loader(
        dataset=dataset,
        mapper=instantiate(get_config(config).dataloader.train.mapper),
        total_batch_size=batch_size,
        num_workers=workers,
    )
    others = set(children())
    stream = iter(loader)
    for _ in itertools.islice(stream, 3 * max(workers, 1)):
        pass  # what is loaded ahead would count for nothing
    start = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    rate = batches * batch_size / (time.perf_counter() - start)
    own = [private_memory(int(p)) for p in children() if p not in others]
    memory = f"{max(own):8.0f} MiB each" if own else ""
    return f"{workers} processes {rate:8.1f} images/s{memory}"


def children() -> list[str]:
    """Ids of the processes that this one has started."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json-file", required=True, metavar="FILE", help="in COCO's format")
    parser.add_argument("--image-root", required=True, metavar="FOLDER")
    parser.add_argument("--config", default="stageinteractor/stageinteractor_r50_100q_1x.py")
    parser.add_argument("--files", type=int, default=50, help="to decode (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20, help="to time (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--entries", type=int, default=118000, help="of the data set, whose images are repeated"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    records = get_detection_dataset(json_file=args.json_file, image_root=args.image_root)
    files = [record["file_name"] for record in records[: args.files]]
    print(*compare_decoders(files, args.rounds), sep="\n")
    print(time_mapper(records[: args.files], args.config))
    dataset = list(itertools.islice(itertools.cycle(records), args.entries))
    for workers in args.workers:
        print(time_loader(dataset, args.config, workers, args.batches, args.batch_size), flush=True)


if __name__ == "__main__":
    main()
