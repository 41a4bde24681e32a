"""Loading and saving, on Detectron2's checkpointer."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..durable import remove_partial_files, write_durably
from ..errors import UserError
from ..texts import shown
from ..trust import PICKLE_SUFFIXES, names_pickle
from .class_rows import ClassNames, keep_known_classes
from .damage import RUNS_CODE, damage
from .hub import is_downloaded, local_file
from .official import CheckpointMismatchError, adapt_checkpoint, check_weights
from .official_files import CheckpointFileError, no_weights, read_checkpoint
from .official_format import BATCH_COUNT
from .weights import Misfit, find_weights

__all__ = [
    "BEST_CHECKPOINT",
    "Checkpointer",
    "ResumeError",
    "find_checkpoint",
    "inference_weights",
    "last_checkpoint",
]

logger = logging.getLogger(__name__)

BEST_CHECKPOINT = "model_best"
_STORAGE = "detectron2://"  # of Detectron2, whose pickles are opened
_LAST = "last_checkpoint"
_FINAL = "model_final.pth"
_FROM_CONFIG = ("pixel_mean", "pixel_std")  # a file need not have them, says Detectron2
_ALLOW_PARTIAL = "--allow-partial goes on with random values instead"
# What loads a state raises where it is that of something else.
_MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_LONGEST_NAME = 1000  # bytes of what last_checkpoint may hold
_PERIODIC = re.compile(r"model_(\d+)\.pth")


class ResumeError(UserError):
    """A checkpoint does not belong to the model that was to be resumed."""


def find_checkpoint(path: str | os.PathLike[str] | None, *, needed: bool = False) -> str:
    """The file of weights that are named; those of the Hugging Face hub are downloaded.

    Args:
        path: see :func:`.hub.local_file`; None or "" for none. Any other address is returned as it
            is.
        needed: there must be one.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointFileError: the hub or folder has no weights.
        CheckpointMismatchError: none is named, and one is needed.
    """
    path = local_file(path or "")
    if not path and needed:
        raise CheckpointMismatchError(
            "no weights: name a checkpoint with --weights FILE (train.init_checkpoint=FILE). "
            f"{_ALLOW_PARTIAL}"
        )
    if _is_missing(path):
        near = _named_alike(Path(path))
        hint = f"did you mean {shown(near)}? Name" if near else "name"
        others = "" if needed else ', or "" for random weights'
        raise FileNotFoundError(
            f"checkpoint {shown(path)} does not exist: {hint} a file, detectron2://... or "
            f"hf://OWNER/NAME by --weights or train.init_checkpoint{others}"
        )
    return path


def _named_alike(path: Path) -> Path | None:
    """What is there in the place of a path that is not: the nearest of each of its parts."""
    place = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if not (place / part).exists():
            try:
                names = os.listdir(place)
            except OSError:
                return None
            near = difflib.get_close_matches(part, names, n=1)
            if not near:
                return None
            part = near[0]
        place = place / part
    return place


def _is_missing(path: str) -> bool:
    return bool(path) and "://" not in path and not Path(path.split("?")[0]).is_file()


class Checkpointer(DetectionCheckpointer):
    """Detectron2's ``DetectionCheckpointer``, which says what it could not load.

    As an initialisation, a checkpoint whose classes or queries differ from the config's is loaded
    as far as it fits, and one line tells what was left out. As the state to resume from, it is
    refused, and so it is where a model is only read (``strict``).

    Files are read with ``weights_only=True``. A pickle (``.pkl``, as in Detectron2's model zoo, or
    ``.pyth``) may run any code when it is opened: it is read, as Detectron2 reads it, only from
    Detectron2's own storage (``detectron2://``), or where ``allow_pickle`` is set. Checkpoints of
    the authors' code, and ImageNet weights of torchvision and timm, are recognised and converted.
    So are those of the Hugging Face hub, named as ``hf://OWNER/NAME`` or as a folder (:mod:`.hub`).
    A checkpoint with averaged (EMA) weights initialises a model with the plain ones, unless
    ``prefer_ema`` is set.

    A checkpoint is written beside its place, flushed to the disk, read back and compared with its
    checksums, and renamed; ``last_checkpoint`` follows. One that is damaged all the same is set
    aside when a run is resumed, and the one before it is used.

    Attributes:
        loaded_ema: whether the weights in the model are the averaged ones of a checkpoint.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool | None = None,
        prefer_ema: bool = False,
        allow_pickle: bool = False,
        init_prefix: str = "",
        strict: bool = False,
        classes: ClassNames | None = None,
        run: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ):
        """
        Args:
            model, save_dir, save_to_disk, checkpointables: see ``DetectionCheckpointer``.
            prefer_ema: load averaged weights into the model where the file has them.
            allow_pickle: open pickles of any origin, and run what they ask for.
            init_prefix: initialise only the tensors whose names begin so, as
                ``backbone.bottom_up.``; a run is resumed whole.
            strict: refuse what does not give the model all of its weights. For whoever reads a
                model and does not train it.
            classes: the model's classes: where a file to initialise it names its own, what it has
                for a class is kept by name. Where loading is strict, that is done if it has all.
                None: rows of classes are taken by their order.
            run: what all files tell of it under "run", in plain values, such as class names.
        """
        super().__init__(model, os.fspath(save_dir), save_to_disk=save_to_disk, **checkpointables)
        self.prefer_ema = prefer_ema
        self.allow_pickle = allow_pickle
        self.init_prefix = init_prefix
        self.strict = strict
        self.classes = classes
        self.run = run
        self.loaded_ema = False
        self._path = ""
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's, in a way that a run can be killed at any moment, and a disk be full.

        Raises:
            OSError: the file cannot be written. The checkpoints before it are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # not a file system
            super().save(name, **self._facts_of_run(), **kwargs)
            return
        data = {"model": self.model.state_dict()}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(self._facts_of_run())
        data.update(kwargs)
        self._write(name, data)

    def save_weights(self, name: str, model: torch.nn.Module, **facts: Any) -> None:
        """Write a model's weights alone, for use and not for resuming a run.

        Args:
            name: of the file, without its ending.
            model: this checkpointer's, or one with averaged weights.
            facts: what else the file tells: "weights" says which these are.

        Raises:
            OSError: as :meth:`save`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": model.state_dict(), **self._facts_of_run(), **facts}
        if "://" in self.save_dir:
            place = os.path.join(self.save_dir, f"{name}.pth")
            with self.path_manager.open(place, mode="wb") as file:
                torch.save(data, file)
            return
        self._write(name, data)

    def _facts_of_run(self) -> dict[str, Any]:
        return {} if self.run is None else {"run": dict(self.run)}

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("saving checkpoint %s", path)
        try:
            write_durably(path, lambda file: torch.save(data, file), check=damage)
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError, pickle.PicklingError) as error:
            # PyTorch's archive writer wraps what the system says; the system's error is its cause.
            reason: BaseException = error
            while not isinstance(reason, OSError) and reason.__context__ is not None:
                reason = reason.__context__
            if not isinstance(reason, OSError):
                raise
            good = self.get_checkpoint_file() if self.has_checkpoint() else ""
            raise OSError(
                reason.errno or 0,
                f"checkpoint {path} cannot be written ({reason.strerror or reason}). "
                + (f"{good} is intact: fix this, and go on with --resume" if good else ""),
            ) from error

    def prune(self, keep: int, iteration: int) -> None:
        """Remove all but the newest ``keep`` of the periodic checkpoints up to an iteration.

        Those of later iterations are of another run, and left alone; so is what
        ``last_checkpoint`` names.
        """
        if not self.save_to_disk or "://" in self.save_dir:
            return
        found = []
        for path in Path(self.save_dir).iterdir():
            match = _PERIODIC.fullmatch(path.name)
            if match and int(match.group(1)) <= iteration:
                found.append((int(match.group(1)), path))
        last = Path(self.get_checkpoint_file()).name if self.has_checkpoint() else ""
        for _, path in sorted(found)[:-keep]:
            if path.name != last:
                path.unlink()

    def load(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Raises:
            FileNotFoundError: there is no such file.
            CheckpointFileError: it is damaged, or opening it would run code, or the hub or folder
                has no weights.
            CheckpointMismatchError: it is an official checkpoint, or ImageNet weights, of another
                network, or has a backbone of another size that a project checks; no tensor of it
                is the model's; or, where loading is strict, some are missing, or no file is named.
            ResumeError: see :meth:`resume_or_load`.
        """
        if self._resuming and _is_missing(os.fspath(path)):
            raise FileNotFoundError(
                f"checkpoint {path} does not exist, although {Path(self.save_dir, _LAST)} names "
                "it, and there is no other: put it back, or remove that file to begin anew"
            )
        path = find_checkpoint(path, needed=self.strict)
        if "://" in path and not path.startswith(_STORAGE):
            # Before it is downloaded: it would lie where files of the storage do.
            self._refuse_pickle(path)
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except _MISFITS as error:
            ours = isinstance(error, (UserError, torch.cuda.OutOfMemoryError))
            if ours or not self._resuming:
                raise
            reason = " ".join(str(error).split())[:200]
            raise CheckpointFileError(
                f"{path} cannot be resumed, as what it holds is not what a run has written "
                f"({type(error).__name__}: {reason})"
            ) from error
        finally:
            self._parsed_url_during_load = None

    def resume_or_load(
        self, path: str | os.PathLike[str], *, resume: bool = True
    ) -> dict[str, Any]:
        """As Detectron2's; a checkpoint to resume from must fit the model exactly.

        A damaged one is renamed to ``<name>.damaged``, with a warning, and the one before it is
        taken. So it is where ``last_checkpoint`` is missing beside checkpoints, or names none.

        Raises:
            ResumeError: it does not fit; the message lists the tensors.
            FileNotFoundError: there is no such file, and no other to resume from.
            CheckpointFileError: all checkpoints of the run are damaged.
        """
        if resume:
            self._choose_checkpoint()
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def _choose_checkpoint(self) -> None:
        """Let ``last_checkpoint`` name a file that is not damaged; the main process does it."""
        failure: str | None = None
        if comm.is_main_process() and self.save_dir and "://" not in self.save_dir:
            if self.save_to_disk:
                remove_partial_files(self.save_dir)
            failure = self._set_damaged_aside()
        if comm.get_world_size() > 1:
            failure = comm.all_gather(failure)[0]
        if failure is not None:
            raise CheckpointFileError(failure)

    def _set_damaged_aside(self) -> str | None:
        """Returns what to say when no checkpoint is left; None otherwise."""
        folder = Path(self.save_dir)
        last = folder / _LAST
        path, problem = last_checkpoint(folder)
        named = "" if path is None else path.name
        others = [
            p
            for p in folder.glob("model_*.pth")
            if p != path and (_PERIODIC.fullmatch(p.name) or p.name == _FINAL) and _is_regular(p)
        ]
        candidates = sorted(others, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
        if path is not None:
            candidates.insert(0, path)
        if not candidates:
            return None  # nothing to resume, or loading it says what to do
        damaged: list[tuple[Path, str]] = []
        for candidate in candidates:
            reason = damage(candidate)
            if reason is None:
                if problem:
                    logger.warning(
                        "%s: going on from %s, the newest that is sound", problem, candidate
                    )
                if candidate.name != named:
                    # First, as this may end at any moment, too.
                    self.tag_last_checkpoint(candidate.name)
                self._rename_damaged(damaged)
                return None
            whole = reason.startswith(RUNS_CODE)
            said = "is refused" if whole else "is damaged"
            logger.warning("checkpoint %s %s: %s", candidate, said, reason)
            damaged.append((candidate, ".refused" if whole else ".damaged"))
        with contextlib.suppress(FileNotFoundError):
            last.unlink()
        self._rename_damaged(damaged)
        return (
            f"none of the {len(damaged)} checkpoints in {self.save_dir} can be read; they are kept "
            f"as *{' and *'.join(sorted({ending for _, ending in damaged}))}. With --resume once "
            "more the run begins anew"
        )

    def has_checkpoint(self) -> bool:
        """Whether there is a ``last_checkpoint``; a link is none."""
        if "://" in self.save_dir:
            return super().has_checkpoint()
        path = Path(self.save_dir, _LAST)
        return path.is_file() and not path.is_symlink()

    def get_checkpoint_file(self) -> str:
        """As Detectron2's.

        Raises:
            CheckpointFileError: ``last_checkpoint`` names something else than a file beside it.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file()
        folder = Path(self.save_dir)
        path, problem = last_checkpoint(folder)
        if path is not None:
            return str(path)
        named = _name_in(folder / _LAST)
        if _is_plain(named) and not os.path.lexists(folder / named):
            return str(folder / named)  # loading it says what to do
        if named:
            raise CheckpointFileError(f"{problem}: correct that file, or remove it to begin anew")
        return ""

    def _rename_damaged(self, damaged: list[tuple[Path, str]]) -> None:
        for path, ending in damaged:
            aside = path.with_name(path.name + ending)
            os.replace(path, aside)
            logger.warning("%s is set aside as %s", path, aside)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        # The best checkpoint lacks nothing, but resuming must go on from the newest one.
        if last_filename_basename.startswith(BEST_CHECKPOINT):
            return
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_durably(
            Path(self.save_dir, _LAST), lambda file: file.write(last_filename_basename.encode())
        )

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not (self._path.startswith(_STORAGE) and is_downloaded(filename)):
            self._refuse_pickle(filename)
        loaded = super()._load_file(filename)
        if not isinstance(loaded.get("run"), Mapping):  # another program's
            loaded.pop("run", None)
        return loaded

    def _refuse_pickle(self, name: str) -> None:
        is_pickle = names_pickle(name) if "://" in name else name.endswith(PICKLE_SUFFIXES)
        if is_pickle and not self.allow_pickle:
            raise CheckpointFileError(
                f"{shown(name)} is a pickle, and opening it may run any code. If you trust its "
                "source, set train.allow_pickle=true"
            )

    def _torch_load(self, f: str) -> Any:
        return adapt_checkpoint(read_checkpoint(f, allow_pickle=self.allow_pickle), self.model, f)

    def _load_model(self, checkpoint: Any):
        chosen = checkpoint.get("weights")
        if chosen not in ("plain", "averaged"):  # by an evaluation; such a file has no others
            chosen = None
        if self._resuming and chosen:
            raise ResumeError(
                "the checkpoint to resume from holds the weights of the best evaluation alone: "
                f"let {Path(self.save_dir, _LAST)} name another one, or name it as "
                "train.init_checkpoint without --resume"
            )
        has_plain = checkpoint.get("ema") is not checkpoint["model"]
        self.loaded_ema = chosen == "averaged" or (
            "ema" in checkpoint and (self.prefer_ema or not has_plain)
        )
        if chosen:
            logger.info("using the %s weights, which the checkpoint holds as the best", chosen)
        elif self.loaded_ema:
            logger.info("using the averaged (EMA) weights of the checkpoint")
            checkpoint["model"] = inference_weights(checkpoint, wanted=self.model.state_dict())
        elif "ema" in checkpoint and not self._resuming:
            logger.info(
                "using the plain weights of the checkpoint, not the averaged (EMA) ones that it "
                "holds too; train.ema.enabled=true with --eval-only evaluates those"
            )
        if self.init_prefix and not self._resuming:
            checkpoint["model"] = self._begins_with_prefix(checkpoint["model"])
        if not self._resuming:  # otherwise all of it must fit, see _log_incompatible_keys
            if self.classes is not None:
                checkpoint["model"] = keep_known_classes(
                    checkpoint["model"],
                    (checkpoint.get("run") or {}).get("classes"),
                    self.model,
                    self.classes,
                    all_known=self.strict,
                )
            check_weights(checkpoint["model"], self.model)
        return super()._load_model(checkpoint)

    def _begins_with_prefix(self, weights: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            CheckpointMismatchError: no tensor of the model begins so, or none of the file.
        """
        for where, names in (("model", self.model.state_dict()), ("checkpoint", weights)):
            if not any(name.startswith(self.init_prefix) for name in names):
                raise CheckpointMismatchError(
                    f"no tensor of the {where} has a name that begins with {self.init_prefix!r}: "
                    "correct train.init_prefix"
                )
        kept = {k: v for k, v in weights.items() if k.startswith(self.init_prefix)}
        logger.info(
            "initialising from the checkpoint only the %d of its %d tensors that begin with %r",
            len(kept),
            len(weights),
            self.init_prefix,
        )
        return kept

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        resized = {name for name, *_ in incompatible.incorrect_shapes}
        misfit = Misfit(
            [name for name in incompatible.missing_keys if name not in resized],
            incompatible.incorrect_shapes,
            incompatible.unexpected_keys,
        )
        told = misfit.describe()
        if self._resuming:
            if told:
                raise ResumeError(
                    "the last checkpoint in the output directory belongs to another model and "
                    "cannot be resumed: use the config that it was made with, or another "
                    "train.output_dir, or name it as train.init_checkpoint without --resume. "
                    f"Tensors {told}"
                )
            return
        if self.strict and misfit.too_little:
            raise CheckpointMismatchError(
                f"checkpoint {self._path} is not of this config. Tensors {told}. Use the config "
                f"and the number of classes that it was trained with. {_ALLOW_PARTIAL}"
            )
        # Detectron2's frozen norms make up statistics that a file lacks.
        made_up = [
            name.removesuffix("weight") + statistic
            for name in misfit.missing
            if name.endswith(".weight")
            for statistic in ("running_mean", "running_var")
        ]
        lacking = {*misfit.missing, *resized, *_FROM_CONFIG, *made_up}
        names = [k for k in self.model.state_dict() if not k.endswith(BATCH_COUNT)]
        given = sum(name not in lacking for name in names)
        if names and not given:
            raise CheckpointMismatchError(
                f"no tensor of checkpoint {self._path} is one of the model's: it is of another "
                f"detector. Tensors {told}"
            )
        if told:
            logger.warning(
                "the checkpoint gives %d of the model's %d tensors; the rest is as initialised. "
                "Tensors %s",
                given,
                len(names),
                told,
            )


def last_checkpoint(folder: Path) -> tuple[Path | None, str]:
    """The file that ``last_checkpoint`` names, where it is one that a run would have named.

    Whoever wrote it may have meant another file: a name that leads elsewhere, or a link, is not
    followed.

    Returns:
        a regular file in the folder, or None; and in that case why.
    """
    last = folder / _LAST
    if last.is_symlink():
        return None, f"{last} is a link"
    if not last.is_file():
        return None, f"{last} is missing"
    named = _name_in(last)
    if not named:
        return None, f"{last} is empty"
    if not _is_plain(named):
        return None, f"{last} names {ascii(named)}, which is no name of a file beside it"
    path = folder / named
    if not os.path.lexists(path):
        return None, f"{last} names {shown(named)}, which does not exist"
    if not _is_regular(path):
        return None, f"{last} names {shown(named)}, which is a link, or no file"
    return path, ""


def _name_in(last: Path) -> str:
    if last.is_symlink() or not last.is_file():
        return ""
    with last.open("rb") as file:
        return file.read(_LONGEST_NAME).decode("utf-8", "replace").strip("\0 \n")


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def inference_weights(
    checkpoint: dict[str, Any], *, prefer_ema: bool = True, wanted: Collection[str] = ()
) -> dict[str, Any]:
    """The model weights of a checkpoint: averaged ones if it has them and they are preferred.

    Args:
        checkpoint: what a file holds.
        prefer_ema: see above.
        wanted: names of the model's tensors, where they are known.

    Raises:
        CheckpointFileError: there are none.
    """
    found = find_weights(checkpoint, wanted)
    weights = found.averaged if prefer_ema and found.averaged is not None else found.any
    if weights is None:
        raise no_weights(checkpoint, "the checkpoint")
    return weights
