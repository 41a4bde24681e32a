#!/usr/bin/env python3
"""Train the checkpoint that the repository carries: the tiny detector on the built-in shapes.

    python tools/make_shapes_checkpoint.py

runs ``train_net.py --config-file stageinteractor/shapes_tiny.py`` from scratch, keeps the weights
and what they tell of their run (class names, format and resizing of images, recipe), evaluates
exactly the file that it wrote, and notes beside it how it was made.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detection_toolkit.durable import write_durably, write_text
from detection_toolkit.engine.arguments import add_overrides_argument, parse_arguments
from detection_toolkit.engine.parsers import Parser
from detection_toolkit.engine.shipped import shipped_config
from detection_toolkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 8 * 1024 * 1024


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "checkpoints" / "shapes_tiny.pth",
        help="checkpoint to write; a .json of the same name and a README.md stand beside it",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=ROOT / "output" / "shapes_checkpoint",
        help="where the training keeps its logs and checkpoints",
    )
    parser.add_argument("--max-iter", type=int, help="steps, in place of the config's")
    add_overrides_argument(parser, "further changes to the config")
    return parser


def export_weights(source: Path, output: Path) -> dict[str, Tensor]:
    """Write the model of a training checkpoint, floating point as float32, and its "run" alone.

    Raises:
        UserError: the result is larger than what the repository is to carry, or not finite, or
            the checkpoint tells nothing of its run.
    """
    import torch

    from detection_toolkit.checkpoint.checkpointer import inference_weights
    from detection_toolkit.checkpoint.damage import damage
    from detection_toolkit.checkpoint.official_files import read_checkpoint

    checkpoint = read_checkpoint(source)
    if "run" not in checkpoint:
        raise UserError(
            f'{source} has no key "run", which tells of class names and input: train it anew'
        )
    state = inference_weights(checkpoint)
    weights = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).clone().contiguous()
        for name, tensor in state.items()
    }
    broken = [n for n, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise UserError(f"{source}: values that are not finite in {', '.join(broken)}")
    content = io.BytesIO()
    torch.save({"model": weights, "run": checkpoint["run"]}, content)
    size = len(content.getvalue())
    if size > MAX_BYTES:
        raise UserError(f"{source} makes {size} bytes of weights, more than {MAX_BYTES}")
    write_durably(output, lambda file: file.write(content.getvalue()), check=damage)
    return weights


def describe(facts: Mapping[str, object], name: str) -> str:
    """README of the folder: the facts, readable."""
    ap, setup, versions_ = facts["shapes_val"], facts["machine"], facts["versions"]
    lines = [
        "# Checkpoints",
        "",
        f"`{name}` holds the weights of `{shipped_config()}`, trained from scratch on",
        "the built-in data set `shapes_train`, and, under `run`, the names of its classes and how",
        "its run prepared images. `make demo`, `demo/demo.py` and the tools use it",
        "when no other weights are named. `make shapes-checkpoint` made it, by",
        "",
        f"    {facts['command']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {metric} on `shapes_val` | {value:.1f} |" for metric, value in ap.items()),
        f"| training | {facts['iterations']} steps, {facts['minutes']:.0f} minutes |",
        f"| machine | {setup['gpu'] or setup['cpu']}, {setup['torch_threads']} threads |",
        f"| versions | {', '.join(f'{k} {v}' for k, v in versions_.items())} |",
        f"| date | {facts['date']} |",
        f"| commit | {facts['commit']} |",
        f"| size | {facts['bytes']:,} bytes, {facts['parameters']:,} numbers |",
        "",
        "`shipped.json` tells programs which config the file belongs to, and which one `train` "
        "takes for data of your own where none",
        "is named.",
        "",
        f"The same facts for programs: `{Path(name).stem}.json`. The AP is that of this very file",
        "on the machine above; other kinds of processors round differently, and training again on",
        "one ends with other weights:",
        "",
        f"    python train_net.py --config-file {shipped_config()} --eval-only \\",
        f"        train.init_checkpoint=checkpoints/{name}",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, export, evaluate, note. Returns the exit code."""
    args = parse_arguments(get_parser(), argv)
    from detectron2.utils.logger import setup_logger

    from detection_toolkit.config import apply_overrides, get_config
    from detection_toolkit.engine import Predictor, Trainer
    from detection_toolkit.memory import keep_memory_on_cpu
    from detection_toolkit.studies.environment import commit, from_root, machine, today, versions

    work_dir, output = args.work_dir.resolve(), args.output.resolve()
    overrides = [f"train.output_dir={from_root(work_dir)}", *args.opts]
    if args.max_iter is not None:
        overrides.append(f"train.max_iter={args.max_iter}")
    cfg = apply_overrides(get_config(shipped_config()), overrides)
    arguments = ["train_net.py", "--config-file", shipped_config(), "--move-aside", *overrides]
    print(f"$ python {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment)
    if done.returncode:
        print(f"error: training ended with code {done.returncode}", file=sys.stderr)
        return 1
    minutes = (time.perf_counter() - start) / 60

    weights = export_weights(work_dir / "model_final.pth", output)
    setup_logger(name="detectron2")
    cfg.train.init_checkpoint = str(output)
    model = Predictor(cfg).model
    keep_memory_on_cpu(model)
    results = Trainer.test(cfg, model)["bbox"]
    facts = {
        "command": f"python {' '.join(arguments)}",
        "shapes_val": {k: round(float(results[k]), 2) for k in ("AP", "AP50", "AP75")},
        "iterations": int(cfg.train.max_iter),
        "images_per_step": int(cfg.dataloader.train.total_batch_size),
        "minutes": round(minutes, 1),
        "machine": machine(),
        "versions": versions(),
        "date": today(),
        "commit": commit(),
        "bytes": output.stat().st_size,
        "parameters": sum(t.numel() for t in weights.values()),
    }
    text = json.dumps(facts, indent=2) + "\n"
    write_text(output.with_suffix(".json"), text)
    readme = output.with_name("README.md")
    write_text(readme, describe(facts, output.name))
    print(text)
    print(f"{output}: shapes_val AP {facts['shapes_val']['AP']:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
