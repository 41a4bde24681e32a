"""Train or evaluate a detector that a LazyConfig describes; docs/training.md explains the options.

KEY=VALUE arguments change entries of the config.
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

from ..checkpoint.checkpointer import Checkpointer
from ..config import (
    apply_overrides,
    config_names,
    config_text,
    get_config,
)
from ..engine import (
    EvaluationFacts,
    RunSettings,
    Trainer,
    check_gpus_are_there,
    ended_by_signals,
    launch,
    prepare_config,
    user_errors,
)
from ..engine.arguments import add_weights_arguments, parse_arguments
from ..engine.folder_lock import locked_run
from ..engine.logs import set_up_logs, set_up_run
from ..engine.parsers import examples
from ..engine.processes import read_process_environment
from ..engine.runs import claim_folder, find_run
from ..engine.shipped import shipped_config
from ..errors import UserError
from ..program import program

EXAMPLES = """
PROG --config-file CONFIG --num-gpus 1 train.output_dir=output/mine
PROG --config-file CONFIG --num-gpus 1 train.output_dir=output/mine --resume
PROG --config-file CONFIG --print-config train.max_epochs=10
"""
EVALUATION_EXAMPLES = """
PROG --config-file CONFIG --weights model.pth
PROG --config-file output/mine/config.yaml train.stage_evaluation=true
"""


def get_parser(prog: str | None = None, *, evaluation: bool = False) -> ArgumentParser:
    """Detectron2's command line, and what all commands of the project have.

    Args:
        prog: how the command was called.
        evaluation: the command evaluates, without ``--eval-only``.
    """
    prog = prog or program()
    parser = default_argument_parser(
        epilog=examples(EVALUATION_EXAMPLES if evaluation else EXAMPLES, prog)
    )
    parser.prog, parser.description = prog, __doc__
    parser.set_defaults(eval_only=evaluation)
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
            f"--config-file is missing, for example {shipped_config()}; --list-configs names them "
            "all"
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


def run(args: Namespace) -> None:
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


def main(
    argv: Sequence[str] | None = None, *, prog: str | None = None, evaluation: bool = False
) -> None:
    """Check the command line, and start the processes of the job.

    Args:
        argv: ``sys.argv[1:]`` by default.
        prog: how the command was called.
        evaluation: evaluate, without ``--eval-only``.
    """
    args = parse_arguments(get_parser(prog, evaluation=evaluation), argv)
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
        launch(run, args, device=settings.device)
