"""Train or evaluate a detector that a LazyConfig describes; docs/training.md explains the options.

KEY=VALUE arguments change entries of the config.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from argparse import REMAINDER, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import user_errors
from ..engine.arguments import add_data_arguments, add_weights_arguments, parse_arguments
from ..engine.parsers import Parser, examples
from ..program import program
from .default_config import choose_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES = """
PROG --data my/data.yaml
PROG --resume train.output_dir=output/mine
PROG --config-file CONFIG --num-gpus 1 train.output_dir=output/mine
PROG --config-file CONFIG --data my/data.yaml train.output_dir=output/mine
PROG --config-file CONFIG --weights hf://OWNER/NAME train.output_dir=output/mine
PROG --config-file CONFIG --print-config train.max_epochs=10
"""
EVALUATION_EXAMPLES = """
PROG --weights output/mine
PROG --config-file CONFIG --weights model.pth
PROG --config-file output/mine/config.yaml train.stage_evaluation=true
PROG --config-file hf://OWNER/NAME
PROG --config-file output/mine/config.yaml --data other/data.yaml
"""


def get_parser(prog: str | None = None, *, evaluation: bool = False) -> Parser:
    """The arguments of Detectron2's ``default_argument_parser``, and those of the project.

    They are written out here, as importing Detectron2's takes seconds.

    Args:
        prog: how the command was called.
        evaluation: the command evaluates, without ``--eval-only``.
    """
    prog = prog or program()
    parser = Parser(
        prog=prog,
        description=__doc__,
        epilog=examples(EVALUATION_EXAMPLES if evaluation else EXAMPLES, prog),
        formatter_class=RawDescriptionHelpFormatter,
    )
    default = "" if evaluation else "; for --data alone: that for data of your own"
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help=f"path, or packaged name (default: that of the run{default})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of train.output_dir"
    )
    parser.add_argument(
        "--eval-only", action="store_true", default=evaluation, help="perform evaluation only"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs *per machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="total number of machines")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="of this machine, unique for each"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where processes meet, tcp://HOST:PORT (default: a free port of this machine)",
    )
    parser.add_argument(
        "opts",
        default=None,
        nargs=REMAINDER,
        metavar="KEY=VALUE",
        help="changes to the config, at the end of the command",
    )
    add_data_arguments(parser)
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
    from ..checkpoint.hub import HUB
    from ..engine.runs import CONFIG_NAME, find_run, is_published, usable_device

    of_hub = args.config_file.startswith(HUB)
    run = find_run(args.config_file) if args.eval_only or of_hub else None
    cfg = copy.deepcopy(
        _load_once(run[0] if run else args.config_file, tuple(args.opts), args.trust_config)
    )
    if run:
        named = {text.split("=")[0].lstrip("+") for text in args.opts}
        published = of_hub or is_published(run[1])
        if published and "train.device" not in named:
            usable_device(cfg)
        if args.eval_only and run[1] and "train.init_checkpoint" not in named:
            cfg.train.init_checkpoint = run[1]  # what the run has trained, not what it began with
        if "train.output_dir" not in named:
            folder = Path(run[0]).parent  # it may have been renamed
            if published:  # a stranger's config does not say where files are written to
                name = args.config_file[len(HUB) :].split("/")[1] if of_hub else folder.name
                folder = Path("output", name.partition("@")[0] or "published")
            cfg.train.output_dir = str(folder)
        if args.eval_only and args.data:
            own = _load_once(run[0], (), args.trust_config)
            if _takes_all_images(cfg, own, args):
                cfg.dataloader.test.dataset.split = None
    weights = cfg.train.get("init_checkpoint")
    if weights and Path(weights, CONFIG_NAME).is_file():  # the folder of a run
        cfg.train.init_checkpoint = find_run(weights)[1] or weights
    return cfg


def _takes_all_images(cfg: DictConfig, own: DictConfig, args: Namespace) -> bool:
    """Whether ``--data`` are undivided, and others than those that the run was trained on.

    None of their images was trained on, and so none is to be held out.
    """
    from omegaconf import OmegaConf

    from ..data.files import is_within
    from ..data.formats import open_source

    key = "dataloader.test.dataset.split"
    if sum(text.split("=")[0].lstrip("+") == key for text in args.opts) > 1:
        return False  # it is named, and not by --data alone
    node = cfg.dataloader.test.dataset
    trained_on = OmegaConf.select(own, "dataloader.train.dataset.path")
    if trained_on:
        # A folder and its data.yaml are one data set.
        ours, theirs = os.path.realpath(trained_on), os.path.realpath(node.path)
        if is_within(ours, theirs) or is_within(theirs, ours):
            return False
    source = open_source(
        node.path,
        format=node.get("format"),
        image_root=node.image_root,
        allow_outside=bool(node.get("allow_outside")),
    )
    return not {"val", "test"} & set(source.splits)


@functools.cache
def _load_once(config_file: str, overrides: tuple[str, ...], trust_config: bool) -> DictConfig:
    from ..config import apply_overrides, get_config

    # A config is code: one that registers data sets would do so twice.
    return apply_overrides(get_config(config_file, trust_config=trust_config), overrides)


def evaluate(cfg: DictConfig, args: Namespace) -> None:
    """Evaluate the weights of ``train.init_checkpoint``, or with --resume the run's last ones."""
    from ..checkpoint.checkpointer import Checkpointer
    from ..engine import EvaluationFacts, RunSettings, Trainer
    from ..engine.runs import describe_run
    from ..engine.setup import classes_to_keep
    from ..memory import keep_memory_on_cpu

    settings = RunSettings.from_config(cfg.train)
    model = Trainer.build_model(cfg)
    keep_memory_on_cpu(model)
    checkpointer = Checkpointer(
        model,
        settings.output_dir,
        prefer_ema=settings.ema.enabled,
        allow_pickle=settings.allow_pickle,
        strict=not settings.allow_partial,
        classes=classes_to_keep(cfg, describe_run(cfg)["classes"]),
    )
    checkpointer.resume_or_load(settings.init_checkpoint or "", resume=args.resume)
    is_resumed = args.resume and checkpointer.has_checkpoint()
    facts = EvaluationFacts(
        averaged=checkpointer.loaded_ema,
        by_stage=settings.stage_evaluation,
        source=checkpointer.get_checkpoint_file() if is_resumed else settings.init_checkpoint,
    )
    Trainer.test(cfg, model, facts=facts)


def run(args: Namespace) -> None:
    """One process of the job."""
    from detectron2.utils import comm

    from ..engine import RunSettings, Trainer, ended_by_signals, prepare_config
    from ..engine.folder_lock import locked_run
    from ..engine.logs import set_up_logs, set_up_run
    from ..engine.runs import claim_folder, find_run, log_config_of_run
    from ..memory import keep_memory_on_cpu

    with user_errors(), ended_by_signals(), contextlib.ExitStack() as stack:
        cfg = load_config(args)
        output_dir = RunSettings.from_config(cfg.train).output_dir
        if not args.eval_only:
            stack.enter_context(locked_run(output_dir))
            if comm.is_main_process() and getattr(args, "is_claimed", False):
                claim_folder(output_dir)  # again: another run may have begun and ended since
        set_up_logs(output_dir)
        if args.eval_only and (found := find_run(args.config_file)):
            log_config_of_run(args.config_file, found[0])
        prepare_config(cfg, args.opts, training=not args.eval_only)
        set_up_run(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args)
        trainer = Trainer(cfg)
        keep_memory_on_cpu(trainer.model)
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
        from ..checkpoint.checkpointer import find_checkpoint
        from ..config import config_names, config_text
        from ..engine import RunSettings, check_gpus_are_there, launch
        from ..engine.processes import read_process_environment
        from ..engine.runs import claim_folder, holds_run

        if args.list_configs:
            print(*config_names(), sep="\n")
            sys.exit()
        chosen = None if args.config_file else choose_config(args)
        # Loaded here as well: a mistake is reported once, and before any process is started.
        config = load_config(args)
        if args.print_config:
            if chosen:
                print(chosen, file=sys.stderr)  # what is printed may be kept as a file
            print(config_text(config), end="")
            sys.exit()
        settings = RunSettings.from_config(config.train)
        if not (args.resume and holds_run(Path(settings.output_dir))):
            needed = args.eval_only and not settings.allow_partial
            find_checkpoint(settings.init_checkpoint, needed=needed)  # before data are read
        check_gpus_are_there(args.num_gpus, args.opts)
        place = read_process_environment(os.environ)
        is_first = args.machine_rank == 0 and (place is None or place.rank == 0)
        if chosen and is_first:
            print(chosen, flush=True)
        args.is_claimed = is_first and not (args.eval_only or args.resume)
        if args.is_claimed:
            claim_folder(settings.output_dir, move_aside=args.move_aside)
        launch(run, args, device=settings.device)
