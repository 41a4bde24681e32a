#!/usr/bin/env python3
"""Train or evaluate a detector that a LazyConfig describes.

    python train_net.py --config-file configs/stageinteractor/stageinteractor_r50_100q_1x.py \\
        --num-gpus 8 train.output_dir=output/r50

docs/training.md explains the options.
"""

from __future__ import annotations

from argparse import Namespace

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.config import apply_overrides, find_config_file, get_config
from detection_toolkit.engine import (
    EvaluationFacts,
    RunSettings,
    Trainer,
    ended_by_signals,
    launch,
    prepare_config,
    user_errors,
)
from detection_toolkit.errors import UserError
from detection_toolkit.projects import project_names


def load_config(args: Namespace) -> DictConfig:
    """The config of the command line."""
    if not args.config_file:
        raise UserError("--config-file is missing, for example stageinteractor/shapes_tiny.py")
    args.config_file = find_config_file(args.config_file)
    return apply_overrides(get_config(args.config_file), args.opts)


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
        output_dir = RunSettings.from_config(cfg.train).output_dir
        for name in ("detection_toolkit", *project_names()):
            setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name)
        prepare_config(cfg, args.opts, training=not args.eval_only)
        default_setup(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    with user_errors():
        # Loaded here as well: a mistake is reported once, and before any process is started.
        settings = RunSettings.from_config(load_config(arguments).train)
        launch(main, arguments, device=settings.device)
