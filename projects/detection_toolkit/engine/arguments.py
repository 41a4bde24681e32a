"""Arguments that command lines of the project share."""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..texts import shown
from .parsers import Parser, of_other_projects
from .shipped import shipped_config

__all__ = [
    "add_config_arguments",
    "add_data_arguments",
    "add_overrides_argument",
    "add_trust_argument",
    "add_weights_arguments",
    "find_pictures",
    "is_of_run",
    "named_files",
    "parse_arguments",
    "quoted",
]

# A dotted key, as all of a config are: what else has "=" may be a file.
_OVERRIDE = re.compile(r"\+?[A-Za-z_]\w*(\.\w+|\[\d+\])+=.*", re.DOTALL)


def add_config_arguments(parser: argparse.ArgumentParser, *, has_default: bool = True) -> None:
    """Add ``--config-file``, ``--weights``, ``--allow-partial`` and the overrides.

    The command line is then read by :func:`parse_arguments`.

    Args:
        has_default: the config of the shipped checkpoint takes the place of a missing
            ``--config-file``; otherwise None does, to see whether it was given.
    """
    default = shipped_config()
    parser.add_argument(
        "--config-file",
        default=default if has_default else None,
        metavar="FILE",
        help=f"config, by path or by its name among the packaged ones (default: {default})",
    )
    add_weights_arguments(parser)
    add_overrides_argument(parser, "changes to the config, e.g. train.device=cpu")


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights`` and ``--allow-partial``, which :func:`parse_arguments` makes overrides."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint, folder, or hf://OWNER/NAME[@REVISION][/FILE] of the Hugging Face hub; "
        "the same as train.init_checkpoint=FILE",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="evaluate, draw or export also where the checkpoint does not give the model all of "
        "its weights",
    )
    add_trust_argument(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and what goes with it, which :func:`parse_arguments` makes overrides."""
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="data set in any known format: a folder, data.yaml or file; its training and "
        "validation images (docs/own_data.md)",
    )
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="of the images, where --data has them elsewhere"
    )
    parser.add_argument("--format", help="of --data, where what is there does not say it")


def add_trust_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust-config``, for ``get_config``."""
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="the config.yaml of a run may name any code, not only parts of detectors: it is yours",
    )


def add_overrides_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Tell of the overrides that :func:`parse_arguments` finds; ``purpose`` is their help."""
    parser.add_argument(
        "--opts",
        default=[],
        nargs=argparse.REMAINDER,
        metavar="KEY=VALUE",
        help=f"{purpose}; --opts may be left out",
    )


def parse_arguments(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line, among whose arguments all commands of the project take overrides.

    These are what is ``key=value`` with a dotted key and no file, and after ``--opts`` with any
    key.

    Args:
        parser: reads the others.
        argv: ``sys.argv[1:]`` by default.

    Returns:
        what the parser returns; ``opts`` holds the overrides, among them those that ``--data``,
        ``--weights`` and ``--allow-partial`` stand for. Weights of a run are also its config, where
        none is named and nothing is trained.
    """
    others: list[str] = []
    overrides: list[str] = []
    announced = False
    for text in sys.argv[1:] if argv is None else argv:
        if text == "--opts":
            announced = True
        elif "=" in text and (
            not text.startswith("-")
            if announced
            else _OVERRIDE.fullmatch(text) and not os.path.exists(text)
        ):
            overrides.append(text)
        else:
            others.append(text)
    if not announced:
        set_here = [t for t in others if "=" in t and not t.startswith("-")]
        if strange := [t for t in set_here if _is_of_others(t) and not os.path.exists(t)]:
            parser.refuse(strange)
    args, unknown = parser.parse_known_args(others)
    strange = [text for text in (*unknown, *(args.opts or ())) if _is_of_others(text)]
    if unknown or strange:
        parser.refuse(strange or unknown)
    args.opts = [*(args.opts or ()), *overrides]
    if hasattr(args, "image_root") and hasattr(args, "data"):
        if (args.image_root or args.format) and not args.data:
            parser.error("--image-root and --format go with --data")
        if args.data:  # first: what is named in full wins
            args.opts = [*_data_overrides(args), *args.opts]
    if hasattr(args, "allow_partial"):
        is_named = args.config_file is not parser.get_default("config_file")
        if not is_named and getattr(args, "eval_only", True) and is_of_run(args.weights):
            if not _has_checkpoint(args.weights):
                parser.error(
                    f"--weights {shown(args.weights)}: the run has no checkpoint there yet"
                )
            args.config_file, args.weights = args.weights, None
        if args.weights:
            args.opts.append(f"train.init_checkpoint={quoted(args.weights)}")
        if args.allow_partial:  # the configs of older runs lack it
            args.opts.append("+train.allow_partial=true")
    return args


def _is_of_others(text: str) -> bool:
    """Whether a word sets nothing of a config, but is a file, or a setting of another project."""
    key, sign, value = text.partition("=")
    if not sign:
        return not text.startswith("-")
    return value[:1] != "{" and of_other_projects(key) is not None


def is_of_run(weights: str | None) -> bool:
    """Whether weights lie in the folder of a run, or on the hub, and a config goes with them."""
    if not weights or weights.startswith("hf://"):
        return bool(weights)
    path = Path(weights).expanduser()
    if path.suffix in (".pth", ".safetensors") and path.is_file():
        path = path.parent
    return (path / "config.yaml").is_file()


def _has_checkpoint(run: str) -> bool:
    if run.startswith("hf://"):  # what is downloaded, later, has weights or is an error
        return True
    from .runs import find_run  # loads PyTorch, which --help does not need

    found = find_run(run)
    return found is not None and found[1] is not None


def _data_overrides(args: argparse.Namespace) -> list[str]:
    """With full paths, so that the run's config.yaml can be used from any folder."""
    overrides = []
    for part, split in (("train", "train"), ("test", "val")):
        node = f"dataloader.{part}.dataset"
        # The config of a run has those of other data.
        others = ("json_file", "image_root", "name", "format")
        overrides += [f"{node}.{key}=null" for key in others]
        overrides += [f"{node}.path={_full_path(args.data)}", f"{node}.split={split}"]
        if args.image_root:
            overrides.append(f"{node}.image_root={_full_path(args.image_root)}")
        if args.format:
            overrides.append(f"{node}.format={quoted(args.format)}")
    return overrides


def _full_path(path: str) -> str:
    return quoted(os.path.abspath(os.path.expanduser(path)))


def quoted(text: str) -> str:
    """A text as the value of an override, whatever its characters."""
    # Backslashes are doubled before a quote alone, as Hydra has it.
    return "'" + re.sub(r"(\\*)(?:'|$)", lambda m: m[1] * 2 + "\\'" * ("'" in m[0]), text) + "'"


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """Picture files that files, folders (not their subfolders) and globs stand for, each once.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder or glob without pictures.
    """
    from ..data.images import PICTURE_SUFFIXES  # loads Detectron2, which --help does not need

    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(os.path.expanduser(given))
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
            if not found:
                known = " ".join(PICTURE_SUFFIXES)
                raise FileNotFoundError(f"no pictures in folder {given} ({known})")
        elif path.exists():  # before globs: a file may be called a[1].jpg
            found = [path]
        else:
            found = _files_matching(path)
            if not found:
                raise FileNotFoundError(f"no such file: {given}")
        files.update(dict.fromkeys(found))
    return list(files)


def named_files(inputs: Sequence[str]) -> list[Path]:
    """Files and folders that paths and globs stand for; what is not there stands for itself."""
    paths = [Path(os.path.expanduser(given)) for given in inputs]
    # Before globs, what exists: a file may be called a[1].jpg.
    return [
        found
        for path in paths
        for found in ([path] if path.exists() else _files_matching(path) or [path])
    ]


def _files_matching(pattern: Path) -> list[Path]:
    found = sorted(Path(path) for path in glob.glob(str(pattern), recursive=True))
    return [path for path in found if path.is_file()]
