"""What a run tells: all in ``log.txt``, what a person wants to read on the console."""

from __future__ import annotations

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from ..config import config_text
from ..durable import refuse_links, write_text
from ..errors import UserError
from ..program import command_line
from ..projects import project_names
from ..texts import FILE_ONLY, Printable
from .hooks import BestCheckpoint, iterations_done
from .runs import CONFIG_NAME, EVALUATION_CONFIG_NAME, holds_run
from .settings import RunSettings

__all__ = [
    "log_end",
    "log_start",
    "log_training_set",
    "refuse_linked_logs",
    "set_up_console",
    "set_up_logs",
    "set_up_run",
]

logger = logging.getLogger(__name__)

# By Detectron2's loggers and writers.
_APPENDED_TO = ("log.txt*", "metrics.json", "events.out.tfevents.*")
# Of these, warnings and errors alone: what they report, a run says in its own lines.
_QUIET = (
    "detectron2.data",
    "detectron2.checkpoint",
    "detectron2.evaluation.coco_evaluation",
    "detectron2.evaluation.evaluator",
    "detectron2.evaluation.testing",
    "fvcore.common.checkpoint",
)
# And what nobody else says: the tables, and how far an evaluation is.
_TELLING = ("Evaluation results for ", "Per-category ", "Inference done ")


# A warning that asks for nothing: ids may be any, and the data are judged before.
_NO_MATTER = "Category ids in annotations are not in [1, #categories]"


class _ForConsole(logging.Filter):
    """Leaves out what is for the file; a warning never is."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _NO_MATTER in str(record.msg):
            return False
        if record.levelno >= logging.WARNING:
            return True
        if getattr(record, "file_only", False):
            return False
        return not record.name.startswith(_QUIET) or str(record.msg).startswith(_TELLING)


def set_up_console(name: str) -> logging.Logger:
    """Detectron2's ``setup_logger`` for the console alone; what it writes is printable."""
    return _made_printable(setup_logger(name=name))


def _made_printable(named: logging.Logger) -> logging.Logger:
    for handler in named.handlers:
        if not any(isinstance(f, Printable) for f in handler.filters):
            handler.addFilter(Printable())
    return named


def refuse_linked_logs(output_dir: str) -> None:
    """
    Raises:
        UserError: a file that Detectron2 appends to is a link.
    """
    if "://" not in output_dir:
        refuse_links(*(path for name in _APPENDED_TO for path in Path(output_dir).glob(name)))


def set_up_logs(output_dir: str) -> None:
    """Log to the console, in the main process, and to ``log.txt``; before anything is said.

    Raises:
        UserError: a file that is appended to is a link.
    """
    refuse_linked_logs(output_dir)
    for name in ("detectron2", "fvcore", "detection_toolkit", *project_names()):
        color = sys.stdout.isatty()
        _made_printable(
            setup_logger(output_dir, distributed_rank=comm.get_rank(), color=color, name=name)
        )
        for handler in logging.getLogger(name).handlers:
            is_console = getattr(handler, "stream", None) is sys.stdout
            if is_console and not any(isinstance(f, _ForConsole) for f in handler.filters):
                handler.addFilter(_ForConsole())


def set_up_run(cfg: DictConfig, args: Namespace) -> None:
    """Keep the config and seed one process; with :func:`set_up_logs` as ``default_setup``.

    The environment, the command line and the config go to ``log.txt``. An evaluation in the folder
    of a run leaves the run's ``config.yaml`` as it is, and writes ``evaluation.yaml`` beside it.

    Args:
        cfg: the config.
        args: of the command line.
    """
    settings = RunSettings.from_config(cfg.train)
    output_dir, rank = settings.output_dir, comm.get_rank()
    logger.info("process %d of %d", rank, comm.get_world_size(), extra=FILE_ONLY)
    logger.info("environment:\n%s", collect_env_info(), extra=FILE_ONLY)
    logger.info("command line: %s", args, extra=FILE_ONLY)
    if comm.is_main_process():
        evaluates_run = args.eval_only and holds_run(Path(output_dir))
        path = Path(output_dir, EVALUATION_CONFIG_NAME if evaluates_run else CONFIG_NAME)
        named = shlex.join([args.config_file, *args.opts])
        # What it was made of, for people and for the report; escaped, as names may be odd.
        try:
            text = f"# {named.encode('unicode_escape').decode()}\n{config_text(cfg)}"
        except UserError as error:
            logger.warning("%s is not written, and the run cannot be named by it: %s", path, error)
        else:
            write_text(path, text)
            logger.info("the config, %s:\n%s", path, text, extra=FILE_ONLY)
    seed_all_rng(None if settings.seed < 0 else settings.seed + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def log_training_set(names: Sequence[str], dataset: Sequence[Mapping[str, Any]]) -> None:
    """Say what is trained on.

    Args:
        names: of the data sets in Detectron2's catalogue.
        dataset: Detectron2's dicts.
    """
    objects = sum(not a.get("iscrowd", 0) for d in dataset for a in d.get("annotations", ()))
    classes = next((c for n in names if (c := MetadataCatalog.get(n).get("thing_classes"))), [])
    shown = ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")
    logger.info(
        "data: %s, %d images with %d objects of %d classes (%s)",
        ", ".join(names),
        len(dataset),
        objects,
        len(classes),
        shown,
    )


def log_start(model: nn.Module, settings: RunSettings, test_sets: Sequence[str]) -> None:
    """Say what is trained, on what, for how long, and where the rest is said."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    logger.info(
        "model: %s with %s parameters, %s of them trained",
        type(model).__name__,
        f"{sum(n for n, _ in sizes):,}",
        f"{sum(n for n, trained in sizes if trained):,}",
    )
    processes = comm.get_world_size()
    device = settings.device
    if settings.on_gpu:
        device = f"{device} ({torch.cuda.get_device_name()})"
    logger.info(
        "device: %s, %d process%s, %s",
        device if settings.on_gpu else f"{device} (threads: {torch.get_num_threads()})",
        processes,
        "" if processes == 1 else "es",
        settings.amp.precision if settings.amp.enabled else "float32",
    )
    period = settings.eval_period
    logger.info(
        "length: %d iterations; evaluation on %s %s, checkpoint every %d",
        settings.max_iter,
        ", ".join(test_sets),
        f"every {period}" if 0 < period < settings.max_iter else "at the end",
        settings.checkpointer.period,
    )
    logger.info("output: %s, where log.txt has environment, config and model", settings.output_dir)


def log_end(
    settings: RunSettings, iterations: int, best: BestCheckpoint | None, last: str | None
) -> None:
    """Say what came out, and what to do next.

    Args:
        settings: of the run.
        iterations: so many are done.
        best: the best checkpoint, where one is kept.
        last: the last evaluation's result in words.
    """
    folder = Path(settings.output_dir)
    lines = [f"done: {iterations} iterations, everything is in {folder}"]
    weights = folder / "model_final.pth"
    if best is not None and best.iteration is not None:
        weights = folder / "model_best.pth"
        done = iterations_done(best.iteration, iterations)
        lines.append(
            f"best {best.metric}: {best.value:.2f} after {done} iterations, with the "
            f"{best.weights or 'plain'} weights"
        )
    elif last is not None:
        lines.append(f"last evaluation: {last}")
    lines.append(f"weights: {weights}")
    config = folder / CONFIG_NAME
    if config.is_file():
        lines += [
            "evaluate it:   "
            f"{command_line('eval')} --config-file {config} train.stage_evaluation=true",
            f"write a report:   {command_line('report')} {folder}",
            "draw detections:   "
            f"{command_line('predict')} --config-file {config} --input PICTURES --output FOLDER",
        ]
    logger.info("\n  ".join(lines))
