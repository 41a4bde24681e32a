"""What a run tells: all in ``log.txt``, what a person wants to read on the console."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from pathlib import Path

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..projects import project_names
from .runs import CONFIG_NAME, EVALUATION_CONFIG_NAME, holds_run
from .settings import RunSettings

__all__ = ["FILE_ONLY", "set_up_run"]

logger = logging.getLogger(__name__)

# ``extra`` of a message that is for log.txt alone.
FILE_ONLY = {"file_only": True}
# Of these, warnings and errors alone: what they report, a run says in its own lines.
_QUIET = ("detectron2.data", "detectron2.checkpoint", "fvcore.common.checkpoint")


class _ForConsole(logging.Filter):
    """Leaves out what is for the file; a warning never is."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        return not getattr(record, "file_only", False) and not record.name.startswith(_QUIET)


def set_up_run(cfg: DictConfig, args: Namespace) -> None:
    """Logs, the config's copy, and seeds of one process; as Detectron2's ``default_setup``.

    The environment, the command line and the config go to ``log.txt``. An evaluation in the folder
    of a run leaves the run's ``config.yaml`` as it is, and writes ``evaluation.yaml`` beside it.

    Args:
        cfg: the config.
        args: of the command line.
    """
    settings = RunSettings.from_config(cfg.train)
    output_dir, rank = settings.output_dir, comm.get_rank()
    for name in ("detectron2", "fvcore", "detection_toolkit", *project_names()):
        setup_logger(output_dir, distributed_rank=rank, color=sys.stdout.isatty(), name=name)
        for handler in logging.getLogger(name).handlers:
            is_console = getattr(handler, "stream", None) is sys.stdout
            if is_console and not any(isinstance(f, _ForConsole) for f in handler.filters):
                handler.addFilter(_ForConsole())
    logger.info("process %d of %d", rank, comm.get_world_size(), extra=FILE_ONLY)
    logger.info("environment:\n%s", collect_env_info(), extra=FILE_ONLY)
    logger.info("command line: %s", args, extra=FILE_ONLY)
    if comm.is_main_process():
        evaluates_run = args.eval_only and holds_run(Path(output_dir))
        path = Path(output_dir, EVALUATION_CONFIG_NAME if evaluates_run else CONFIG_NAME)
        LazyConfig.save(cfg, str(path))
        if path.is_file():  # else Detectron2 has said why not
            text = path.read_text(encoding="utf-8")
            logger.info("the config, %s:\n%s", path, text, extra=FILE_ONLY)
    seed_all_rng(None if settings.seed < 0 else settings.seed + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
