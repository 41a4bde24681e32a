#!/usr/bin/env python3
"""Train or evaluate a detector that a LazyConfig describes.

    python train_net.py --config-file configs/stageinteractor/stageinteractor_r50_100q_1x.py \\
        --num-gpus 8 train.output_dir=output/r50

docs/training.md explains the options.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from omegaconf import DictConfig

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.config import (
    apply_overrides,
    config_names,
    config_text,
    get_config,
)
from detection_toolkit.engine import (
    EvaluationFacts,
    RunSettings,
    Trainer,
    check_gpus_are_there,
    ended_by_signals,
    launch,
    prepare_config,
    user_errors,
)
from detection_toolkit.engine.arguments import add_weights_arguments, parse_arguments
from detection_toolkit.engine.folder_lock import locked_run
from detection_toolkit.engine.launch import read_process_environment
from detection_toolkit.engine.logs import set_up_logs, set_up_run
from detection_toolkit.engine.runs import claim_folder, find_run
from detection_toolkit.errors import UserError


def get_parser() -> ArgumentParser:
    """Detectron2's command line, and what all commands of the project have."""
    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")  # a free port: Detectron2's is one for each user
    add_weights_arguments(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="print the config with its overrides, and end"
    )
    parser.add_argument(
        "--list-configs", action="store_true", help="print the packaged configs' names, and end"
    )
    parser.add_argument(
        "--move-aside",
        action="store_true",
        help="begin anew where train.output_dir holds a run already: its folder is renamed",
    )
    return parser


def load_config(args: Namespace) -> DictConfig:
    """The config of the command line."""
    if not args.config_file:
        raise UserError(
            "--config-file is missing, for example stageinteractor/shapes_tiny.py; --list-configs "
            "names them all"
        )
    run = find_run(args.config_file) if args.eval_only else None
    cfg = copy.deepcopy(
        _load_once(run[0] if run else args.config_file, tuple(args.opts), args.trust_config)
    )
    if run:
        named = {text.split("=")[0].lstrip("+") for text in args.opts}
        if run[1] and "train.init_checkpoint" not in named:
            cfg.train.init_checkpoint = run[1]  # what the run has trained, not what it began with
        if "train.output_dir" not in named:
            cfg.train.output_dir = str(Path(run[0]).parent)  # the folder may have been renamed
    return cfg


@functools.cache
def _load_once(config_file: str, overrides: tuple[str, ...], trust_config: bool) -> DictConfig:
    # A config is code: one that registers data sets would do so twice.
    return apply_overrides(get_config(config_file, trust_config=trust_config), overrides)


def evaluate(cfg: DictConfig, args: Namespace) -> None:
    """Evaluate the weights of ``train.init_checkpoint``, or with --resume the run's last ones."""
    settings = RunSettings.from_config(cfg.train)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(
        model,
        settings.output_dir,
        prefer_ema=settings.ema.enabled,
        allow_pickle=settings.allow_pickle,
        strict=not settings.allow_partial,
    )
    checkpointer.resume_or_load(settings.init_checkpoint, resume=args.resume)
    is_resumed = args.resume and checkpointer.has_checkpoint()
    facts = EvaluationFacts(
        averaged=checkpointer.loaded_ema,
        by_stage=settings.stage_evaluation,
        source=checkpointer.get_checkpoint_file() if is_resumed else settings.init_checkpoint,
    )
    Trainer.test(cfg, model, facts=facts)


def main(args: Namespace) -> None:
    """One process of the job."""
    with user_errors(), ended_by_signals(), contextlib.ExitStack() as stack:
        cfg = load_config(args)
        output_dir = RunSettings.from_config(cfg.train).output_dir
        if not args.eval_only:
            stack.enter_context(locked_run(output_dir))
            if comm.is_main_process() and getattr(args, "is_claimed", False):
                claim_folder(output_dir)  # again: another run may have begun and ended since
        set_up_logs(output_dir)
        prepare_config(cfg, args.opts, training=not args.eval_only)
        set_up_run(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def start(arguments: Sequence[str] | None = None) -> None:
    """Check the command line, and start the processes of the job."""
    args = parse_arguments(get_parser(), arguments)
    with user_errors():
        if args.list_configs:
            print(*config_names(), sep="\n")
            sys.exit()
        # Loaded here as well: a mistake is reported once, and before any process is started.
        config = load_config(args)
        if args.print_config:
            print(config_text(config), end="")
            sys.exit()
        settings = RunSettings.from_config(config.train)
        check_gpus_are_there(args.num_gpus, args.opts)
        place = read_process_environment(os.environ)
        is_first = args.machine_rank == 0 and (place is None or place.rank == 0)
        args.is_claimed = is_first and not (args.eval_only or args.resume)
        if args.is_claimed:
            claim_folder(settings.output_dir, move_aside=args.move_aside)
        launch(main, args, device=settings.device)


if __name__ == "__main__":
    start()
