"""The config of ``train`` and ``eval`` where none is named: the run's own, or that for own data."""

from __future__ import annotations

import itertools
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..engine.arguments import is_of_run, quoted
from ..engine.shipped import config_for_own_data, shipped_checkpoint, shipped_config
from ..errors import UserError
from ..texts import shown

__all__ = ["choose_config"]

_DATA = ("path", "json_file", "names")  # of dataloader.train.dataset
# Of files that say nothing of their data: their folder does.
_NAMELESS = re.compile(r"data(set)?|_?annotations|instances.*|train([_\d-].*)?|all", re.IGNORECASE)


def choose_config(args: Namespace) -> str:
    """Choose what the command line has left out, in place.

    That is ``config_file``, and among ``opts`` the weights to begin from and the output folder.

    Args:
        args: of ``train`` or ``eval``, without a ``config_file``.

    Returns:
        a line that says what was chosen, and how to choose otherwise.

    Raises:
        UserError: neither a run nor data are named, or several processes would choose.
        CheckpointFileError, FileNotFoundError: weights of the hub, or of a run, are not there.
    """
    folder = _value(args.opts, "train.output_dir")
    weights = _value(args.opts, "train.init_checkpoint")
    data = [v for key in _DATA if (v := _value(args.opts, f"dataloader.train.dataset.{key}"))]
    if folder and (args.resume or args.eval_only):
        own = Path(folder, "config.yaml")
        if own.is_file():
            args.config_file = str(own)
            return f"config: {shown(own)}, that of the run"
        if not data:
            raise UserError(f"there is no run in {shown(folder)}: it has no config.yaml")
    if args.eval_only:
        raise UserError(
            "name what to evaluate: a run by --weights RUN or train.output_dir=RUN, its folder, or "
            f"a config and weights, as --config-file {shipped_config()} --weights FILE; "
            "--list-configs names all configs"
        )
    if args.resume and not folder:
        raise UserError("--resume needs the run: its folder as train.output_dir=RUN")
    if not data:
        raise UserError(
            "nothing to train on: name your data, as --data my/data.yaml, or a config, as "
            f"--config-file {shipped_config()} for the built-in shapes. --list-configs names them "
            f"all, for your data {', '.join(_configs_for_own_data())}"
        )
    if folder is None:
        folder = _free_folder(args, _name(data[0]))
        args.opts.insert(0, f"train.output_dir={quoted(folder)}")
    if weights and is_of_run(weights):
        args.config_file = _config_of(weights)
        begins = f"that of {shown(weights)}"
    else:
        args.config_file = config_for_own_data()
        begins = "for data of your own"
    said = shown(weights) if weights else "none"
    if weights is None:
        weights = shipped_checkpoint()
        args.opts.insert(0, f"train.init_checkpoint={quoted(weights)}")
        said = f"{Path(weights).name}, the shipped ones"
    return (
        f"config: {shown(args.config_file)}, {begins} (another: --config-file NAME of "
        f"--list-configs); weights: {said} (--weights FILE); output: {shown(folder)} "
        "(train.output_dir=FOLDER)"
    )


def _value(overrides: Sequence[str], key: str) -> str | None:
    """What overrides set a key to, as the config would have it; "" for ``null``.

    None where they do not set it.
    """
    from omegaconf import OmegaConf

    from ..config import apply_overrides

    named = [text for text in overrides if text.partition("=")[0].lstrip("+") == key]
    if not named:
        return None
    text = named[-1].partition("=")[2]
    if "${" in text:  # refers to the config, which is not there yet
        return text
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, key, "", force_add=True)
    value = OmegaConf.select(apply_overrides(cfg, named), key)
    return "" if value is None else str(value)


def _config_of(weights: str) -> str:
    """Of a run, or of a published one."""
    from ..checkpoint.hub import HUB
    from ..engine.runs import find_run

    found = find_run(weights)
    # An address is more than the file that is downloaded: it says where that is from.
    return found[0] if found and not weights.startswith(HUB) else weights


def _configs_for_own_data() -> list[str]:
    from ..config import config_names

    chosen = config_for_own_data()
    others = [n for n in config_names() if n.endswith("_tiny_custom.py") and n != chosen]
    return [chosen, *others[:3], "..."]


def _name(data: str) -> str:
    """Of the folder of a run, after its data."""
    path = Path(os.path.abspath(os.path.expanduser(data)))
    name = path.name
    if not path.is_dir():
        name = path.name.split(".")[0]
        if _NAMELESS.fullmatch(name):
            parents = [p.name for p in path.parents if not _NAMELESS.fullmatch(p.name)]
            name = next(iter(parents), "")
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "own_data"


def _free_folder(args: Namespace, name: str) -> str:
    """A new one in ``output``; the first, if an earlier run is to be moved."""
    from ..engine.processes import read_process_environment

    place = read_process_environment(os.environ)
    if args.num_machines > 1 or (place is not None and place.world_size > 1):
        raise UserError("several processes need one folder: name it as train.output_dir=FOLDER")
    for number in itertools.count(1):
        folder = Path("output", name if number == 1 else f"{name}_{number}")
        if args.move_aside or not os.path.lexists(folder):
            return str(folder)
    raise AssertionError
