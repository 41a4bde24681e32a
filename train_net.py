#!/usr/bin/env python3
"""Train or evaluate a detector that a LazyConfig describes.

    python train_net.py --config-file configs/stageinteractor/stageinteractor_r50_100q_1x.py \\
        --num-gpus 8 train.output_dir=output/r50

docs/training.md explains the options.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace

from detectron2.engine import default_argument_parser, default_setup

from stageinteractor.checkpoint.checkpointer import Checkpointer
from stageinteractor.config import apply_overrides, find_config_file, get_config
from stageinteractor.engine import Trainer, launch, prepare_config

# What a user can mend: a missing file, a wrong key, a value that does not fit.
USER_ERRORS = (OSError, ValueError, KeyError)


def evaluate(cfg, args: Namespace) -> None:
    """Evaluate the weights of ``train.init_checkpoint``, or with --resume the run's last ones."""
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.train.output_dir, prefer_ema=cfg.train.ema.enabled)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    Trainer.test(cfg, model)


def main(args: Namespace) -> None:
    """One process of the job."""
    try:
        args.config_file = find_config_file(args.config_file)
        cfg = apply_overrides(get_config(args.config_file), args.opts)
        default_setup(cfg, args)
        prepare_config(cfg, args.opts, training=not args.eval_only)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    except USER_ERRORS as error:
        logging.getLogger("stageinteractor").debug("", exc_info=True)
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(f"error: {message}")
    trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    if not arguments.config_file:
        sys.exit("error: --config-file is missing, for example stageinteractor/shapes_tiny.py")
    launch(main, arguments)
