"""The parser of commands: a description, examples at the end of --help, and short errors."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..program import program
from ..texts import printable, shown
from .shipped import shipped_config

__all__ = ["Parser", "examples", "make_parser", "of_other_projects"]

# What other projects call settings: keys of the config here, or options.
_ELSEWHERE = {
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "train.max_epochs=N"),
    **dict.fromkeys(("iters", "max_iters", "max_iter"), "train.max_iter=N"),
    **dict.fromkeys(("batch", "batch_size", "bs"), "dataloader.train.total_batch_size=N"),
    **dict.fromkeys(("lr", "lr0", "learning_rate"), "optimizer.lr=X"),
    **dict.fromkeys(
        ("imgsz", "img", "img_size", "resolution"),
        "dataloader.test.mapper.augmentations.0.short_edge_length=N",
    ),
    **dict.fromkeys(("workers", "num_workers"), "dataloader.train.num_workers=N"),
    **dict.fromkeys(("amp", "half", "fp16"), "train.amp.enabled=true"),
    **dict.fromkeys(
        ("project", "name", "work_dir", "output_dir", "save_dir", "output"),
        "train.output_dir=FOLDER",
    ),
    **dict.fromkeys(("device", "gpu"), "train.device=DEVICE"),
    "seed": "train.seed=N",
    "patience": "train.early_stopping.patience=N",
    "freeze": "train.freeze=[backbone]",
    **dict.fromkeys(("data", "dataset", "dataset_dir"), "--data PATH"),
    **dict.fromkeys(
        ("model", "pretrained", "pretrain_weights", "load_from", "checkpoint", "ckpt"),
        "--weights FILE",
    ),
    "resume": "--resume",
    **dict.fromkeys(("cfg", "config"), "--config-file FILE"),
    **dict.fromkeys(("source", "image", "images"), "--input PATH"),
    **dict.fromkeys(("conf", "threshold", "score_thr"), "--confidence-threshold X"),
    "save_json": "--save-json FILE",
}
_PLACEHOLDER = re.compile(r"\b[A-Z]+$")
_DATA_SUFFIXES = (".yaml", ".yml", ".json", ".csv", ".xml")


class Parser(argparse.ArgumentParser):
    """Python's, which says in two lines what is wrong: with the nearest option, without the usage.

    An option that there is not is named before all else that is wrong.
    """

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return found

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = list(sys.argv[1:] if args is None else args)
        unknown = [] if self._subparsers else self._unknown_options(words)
        if unknown:
            self.refuse(unknown)
        return super().parse_known_args(words, namespace)

    def _unknown_options(self, words: Sequence[str]) -> list[str]:
        unknown = []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and not any(o.startswith(name) for o in self.options()):
                unknown.append(word)
        return unknown

    def options(self) -> list[str]:
        """``--help``, and so on."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End the process: it has no such options, and knows no such words."""
        has_config = any(action.dest == "opts" for action in self._actions)
        answers = {word: self._answer(word, has_config) for word in words[:3]}
        said = [self._wrong(word) + answer for word, answer in answers.items()]
        if has_config and not all(answers.values()):
            said.append(
                "settings of the config are KEY=VALUE, with dots and no dashes: train.max_epochs=10"
            )
        self.error("; ".join(said))

    @staticmethod
    def _wrong(word: str) -> str:
        if word.startswith("-"):
            return f"no option {shown(word.partition('=')[0])}"
        return f"{shown(word)} is no option"

    def _answer(self, word: str, has_config: bool) -> str:
        """What may have been meant, behind what is wrong."""
        name, _, value = word.partition("=")
        option = f"--{name.lstrip('-').replace('_', '-')}"
        if option in self.options():
            return f", here it is {option} {shown(value)}".rstrip()
        ours = of_other_projects(name)
        if ours and (ours.split()[0] in self.options() if ours.startswith("-") else has_config):
            if value:
                ours = _PLACEHOLDER.sub(lambda _: shown(value), ours)
            return f", here it is {ours}"
        near = difflib.get_close_matches(name, self.options(), n=1, cutoff=0.6)
        if near and word.startswith("-"):
            return f", did you mean {near[0]}?"
        if "--data" in self.options() and (word.endswith(_DATA_SUFFIXES) or os.path.isdir(word)):
            return f", data are named as --data {shown(word)}"
        return ""

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"{self.prog}: error: {printable(message)}\n{self.prog} --help lists the options\n"
        )


def of_other_projects(name: str) -> str | None:
    """What an option or setting of another project is here, as ``epochs`` or ``--batch-size``."""
    return _ELSEWHERE.get(name.lstrip("-").replace("-", "_").lower())


def make_parser(description: str, lines: str, prog: str | None = None) -> Parser:
    """A parser without arguments.

    Args:
        description: docstring of the command.
        lines: see :func:`examples`.
        prog: how the command was called; by default see :func:`~detection_toolkit.program.program`.
    """
    prog = prog or program()
    return Parser(
        prog=prog,
        description=description,
        epilog=examples(lines, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def examples(lines: str, prog: str) -> str:
    """The end of a command's ``--help``.

    Args:
        lines: command lines, in which ``PROG`` stands for the command, and ``CONFIG`` for the
            config of the shipped checkpoint.
        prog: how the command was called.
    """
    text = lines.strip("\n").replace("PROG", prog).replace("CONFIG", shipped_config())
    return "examples:\n" + "\n".join(f"  {line}".rstrip() for line in text.splitlines())
