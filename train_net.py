#!/usr/bin/env python3
"""Train or evaluate a detector that a LazyConfig describes.

    python train_net.py --config-file configs/stageinteractor/stageinteractor_r50_100q_1x.py \\
        --num-gpus 8 train.output_dir=output/r50

docs/training.md explains the options.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import (
    EvaluationFacts,
    RunSettings,
    Trainer,
    ended_by_signals,
    launch,
    prepare_config,
    user_errors,
)
from detection_toolkit.engine.launch import read_process_environment
from detection_toolkit.engine.logs import set_up_logs, set_up_run
from detection_toolkit.engine.runs import claim_folder, find_run
from detection_toolkit.errors import UserError


def load_config(args: Namespace) -> DictConfig:
    """The config of the command line."""
    if not args.config_file:
        raise UserError("--config-file is missing, for example stageinteractor/shapes_tiny.py")
    run = find_run(args.config_file) if args.eval_only else None
    cfg = get_config(run[0] if run else args.config_file)
    apply_overrides(cfg, args.opts)
    if run and run[1] and not any(x.startswith("train.init_checkpoint=") for x in args.opts):
        cfg.train.init_checkpoint = run[1]  # what the run has trained, not what it began with
    return cfg


def evaluate(cfg: DictConfig, args: Namespace) -> None:
    """Evaluate the weights of ``train.init_checkpoint``, or with --resume the run's last ones."""
    settings = RunSettings.from_config(cfg.train)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(
        model,
        settings.output_dir,
        prefer_ema=settings.ema.enabled,
        allow_pickle=settings.allow_pickle,
    )
    checkpointer.resume_or_load(settings.init_checkpoint, resume=args.resume)
    facts = EvaluationFacts(averaged=checkpointer.loaded_ema, by_stage=settings.stage_evaluation)
    Trainer.test(cfg, model, facts=facts)


def main(args: Namespace) -> None:
    """One process of the job."""
    with user_errors(), ended_by_signals():
        cfg = load_config(args)
        set_up_logs(RunSettings.from_config(cfg.train).output_dir)
        prepare_config(cfg, args.opts, training=not args.eval_only)
        set_up_run(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def get_parser() -> ArgumentParser:
    """The command line: Detectron2's, with one option more."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--move-aside",
        action="store_true",
        help="begin anew where train.output_dir holds a run already: its folder is renamed",
    )
    return parser


def start(arguments: Sequence[str] | None = None) -> None:
    """Check the command line, and start the processes of the job."""
    args = get_parser().parse_args(arguments)
    with user_errors():
        # Loaded here as well: a mistake is reported once, and before any process is started.
        settings = RunSettings.from_config(load_config(args).train)
        place = read_process_environment(os.environ)
        is_first = args.machine_rank == 0 and (place is None or place.rank == 0)
        if is_first and not (args.eval_only or args.resume):
            claim_folder(settings.output_dir, move_aside=args.move_aside)
        launch(main, args, device=settings.device)


if __name__ == "__main__":
    start()
