#!/usr/bin/env python3
"""The whole story in a few minutes: evaluate, fine-tune, evaluate again, draw.

    python tools/run_demo.py

starts, as users do, from weights: the shipped checkpoint of the built-in shapes. It evaluates it,
fine-tunes it on ``shapes_shifted`` (other backgrounds and colours, one class more), evaluates the
result, and writes pictures and curves to ``output/demo/``.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection_toolkit.engine.arguments import add_overrides_argument, parse_arguments
from detection_toolkit.engine.parsers import Parser
from detection_toolkit.engine.shipped import shipped_checkpoint, shipped_config

if TYPE_CHECKING:
    from detection_toolkit.engine import Predictor

ROOT = Path(__file__).resolve().parents[1]
FINETUNE_CONFIG = "stageinteractor/shapes_tiny_finetune.py"
SETS = ("shapes_train", "shapes_val", "shapes_shifted_train", "shapes_shifted_val")
PICTURES = 12
SHEET_ROWS = 6


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "output" / "demo",
        help="folder for results; what an earlier run left there is replaced",
    )
    parser.add_argument("--weights", help="checkpoint to start from, in place of the shipped one")
    parser.add_argument("--max-iter", type=int, help="fine-tuning steps, in place of the config's")
    add_overrides_argument(parser, "further changes to the configs")
    return parser


class Steps:
    """Headlines with the time that has passed, so that no step is silent."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def next(self, what: str, command: Sequence[str] = ()) -> None:
        """Announce a step, and the command that does the same."""
        self.done += 1
        print(f"\n=== [{self.done}/{self.total}] {self.passed()}  {what}", flush=True)
        if command:
            print(f"$ python {' '.join(command)}", flush=True)

    def passed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(int(time.perf_counter() - self.start), 60)
        return f"{minutes}:{seconds:02d}"


def build_data() -> None:
    """Generate the data sets that are not there yet."""
    from detection_toolkit.data import get_detection_dataset

    for name in SETS:
        start = time.perf_counter()
        records = get_detection_dataset(name, filter_empty=False)
        objects = sum(len(r["annotations"]) for r in records)
        seconds = time.perf_counter() - start
        print(f"{name}: {len(records)} images, {objects} objects ({seconds:.1f} s)", flush=True)


def evaluate(predictor: Predictor, name: str, folder: Path) -> dict[str, float]:
    """COCO metrics of a detector on a data set; numbers and detections are left in the folder."""
    from detection_toolkit.engine import Trainer

    cfg = copy.deepcopy(predictor.cfg)
    cfg.train.output_dir = str(folder)
    cfg.dataloader.test.dataset.names = name
    return dict(Trainer.test(cfg, predictor.model)["bbox"])


def finetune(arguments: Sequence[str]) -> None:
    """Run the training command in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"fine-tuning ended with code {done.returncode}")


def draw(before: Predictor, after: Predictor, folder: Path) -> list[Path]:
    """Before, after and ground truth of some test pictures, one by one and as a sheet."""
    from detectron2.data.detection_utils import read_image

    from detection_toolkit.data import get_detection_dataset
    from detection_toolkit.visualization import (
        DEFAULT_SCORE_THRESHOLD,
        contact_sheet,
        draw_detections,
        draw_ground_truth,
        save_picture,
        side_by_side,
    )

    titles = ["before fine-tuning", "after fine-tuning", "ground truth"]
    records = get_detection_dataset("shapes_shifted_val", filter_empty=False)
    # Pictures with several objects tell more, and the new class (the last) is to be seen.
    new_class = max(a["category_id"] for r in records for a in r["annotations"])

    def interest(record: dict) -> tuple[bool, bool]:
        classes = [a["category_id"] for a in record["annotations"]]
        return new_class in classes, len(classes) > 2

    chosen = sorted(records, key=interest, reverse=True)[:PICTURES]
    rows, written = [], []
    for record in chosen:
        image = read_image(record["file_name"], format="BGR")
        rgb = image[:, :, ::-1]
        row = [
            draw_detections(
                rgb, p(image)["instances"], after.metadata, threshold=DEFAULT_SCORE_THRESHOLD
            )
            for p in (before, after)
        ]
        row.append(draw_ground_truth(record, after.metadata, image=rgb))
        rows.append(row)
        target = folder / f"{Path(record['file_name']).stem}.png"
        written.append(Path(save_picture(side_by_side(row, titles), target)))
    sheet = contact_sheet(rows[:SHEET_ROWS], titles)
    return [Path(save_picture(sheet, folder.parent / "shapes_shifted.png")), *written]


def draw_sheet(predictor: Predictor, name: str, output: Path) -> Path:
    """Detections beside the ground truth for some pictures of a data set."""
    from detectron2.data.detection_utils import read_image

    from detection_toolkit.data import get_detection_dataset
    from detection_toolkit.visualization import (
        DEFAULT_SCORE_THRESHOLD,
        contact_sheet,
        draw_detections,
        draw_ground_truth,
        save_picture,
    )

    records = get_detection_dataset(name, filter_empty=True)
    cells = []
    for record in records[: 2 * SHEET_ROWS]:
        image = read_image(record["file_name"], format="BGR")
        rgb = image[:, :, ::-1]
        found = predictor(image)["instances"]
        cells += [
            draw_detections(
                rgb, found, predictor.metadata, threshold=DEFAULT_SCORE_THRESHOLD, scale=2
            ),
            draw_ground_truth(record, predictor.metadata, image=rgb, scale=2),
        ]
    rows = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    sheet = contact_sheet(rows, ["detections", "ground truth"] * 2)
    return Path(save_picture(sheet, output))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(), argv)
    import torch
    from detectron2.utils.logger import setup_logger

    from detection_toolkit.engine import Predictor
    from detection_toolkit.memory import keep_memory_on_cpu
    from detection_toolkit.visualization import plot_ap_curves, plot_loss_curves

    output = args.output.resolve()
    shown = str(output.relative_to(ROOT)) if output.is_relative_to(ROOT) else str(output)
    try:
        weights = str(Path(args.weights).resolve()) if args.weights else shipped_checkpoint()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    setup_logger(name="detectron2", color=sys.stdout.isatty())
    setup_logger(name="detection_toolkit", color=sys.stdout.isatty())
    steps = Steps(6)

    steps.next("data: built-in shapes, made on first use")
    build_data()
    # What an earlier run, whole or cut short, left behind would mix with this one's results.
    for leftover in ("before", "finetune", "after", "pictures"):
        shutil.rmtree(output / leftover, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    weights_shown = os.path.relpath(weights, ROOT) if weights.startswith(str(ROOT)) else weights
    start_from = f"train.init_checkpoint={weights_shown}"
    command = ["train_net.py", "--config-file", shipped_config(), "--eval-only", start_from]
    steps.next("the shipped checkpoint on shapes_val", command)
    before = Predictor.from_config(shipped_config(), weights, args.opts)
    keep_memory_on_cpu(before.model)
    ap_val = evaluate(before, "shapes_val", output / "before")
    sheet = draw_sheet(before, "shapes_val", output / "shapes_val.png")

    steps.next("the same detector, as it is, on shapes_shifted_val")
    print(
        "It has never seen these looks, and it knows one class less: the new class counts with "
        "AP 0 in the mean over the classes.",
        flush=True,
    )
    ap_before = evaluate(before, "shapes_shifted_val", output / "before")

    training = [
        *("train_net.py", "--config-file", FINETUNE_CONFIG),
        *(start_from, f"train.output_dir={shown}/finetune", *args.opts),
    ]
    if args.max_iter is not None:
        training.append(f"train.max_iter={args.max_iter}")
    steps.next("fine-tuning on shapes_shifted_train: some minutes", training)
    finetune(training)

    final = output / "finetune" / "model_final.pth"
    command = ["train_net.py", "--config-file", FINETUNE_CONFIG, "--eval-only"]
    command.append(f"train.init_checkpoint={shown}/finetune/model_final.pth")
    steps.next("the fine-tuned detector on shapes_shifted_val", command)
    after = Predictor.from_config(FINETUNE_CONFIG, str(final), args.opts)
    ap_after = evaluate(after, "shapes_shifted_val", output / "after")

    steps.next("pictures and curves")
    pictures = draw(before, after, output / "pictures")
    metrics = output / "finetune" / "metrics.json"
    loss_curves = plot_loss_curves(metrics, output / "loss_curves.png")
    ap_curves = plot_ap_curves(
        metrics, output / "ap_curves.png", ap_before, title="AP on shapes_shifted_val"
    )

    print(f"\nDone in {steps.passed()} on {torch.get_num_threads()} threads. Look at")
    for what, where in [
        ("detections on shapes_val", sheet),
        ("before, after, ground truth", pictures[0]),
        (f"the same, {len(pictures) - 1} pictures", output / "pictures"),
        ("loss curves", loss_curves),
        ("AP curves", ap_curves),
        ("fine-tuned weights", final),
        ("metrics, logs, TensorBoard", output / "finetune"),
    ]:
        where = Path(where)
        print(f"  {what:28} {where.relative_to(ROOT) if where.is_relative_to(ROOT) else where}")
    print("  your own pictures            python demo/demo.py --input FILES --output FOLDER")
    print(
        f"shapes_val AP {ap_val['AP']:.1f} | "
        f"shapes_shifted AP {ap_before['AP']:.1f} -> {ap_after['AP']:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
