"""Runs of train_net.py that are killed: the overrides, the processes and the comparison."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import patience
import torch
from patience import PATIENCE
from small_runs import SMALL_MODEL, data_overrides

from detection_toolkit.commands import train
from detection_toolkit.engine import launch
from detection_toolkit.engine.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_net.py"


__all__ = ["data_overrides"]


def run_overrides(output: Path, data: Sequence[str], *further: str) -> list[str]:
    """A run of some twenty small steps with everything that a checkpoint carries."""
    return [
        *SMALL_MODEL,
        *data,
        f"train.output_dir='{output}'",
        "train.device=cpu",
        "train.deterministic=true",
        "train.seed=5",
        "train.max_iter=20",
        "train.eval_period=0",
        "train.checkpointer.period=3",
        "train.checkpointer.max_to_keep=2",
        "train.ema.enabled=true",
        "train.ema.decay=0.9",
        "train.log_period=5",
        "dataloader.train.total_batch_size=2",
        *further,
    ]


def command(*arguments: str) -> list[str]:
    """The command line of train_net.py."""
    return [
        *(sys.executable, str(SCRIPT)),
        *("--config-file", "stageinteractor/shapes_tiny.py"),
        *arguments,
    ]


def environment() -> dict[str, str]:
    """One thread, and no GPU that other tests would share."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str, log: Path | None = None) -> subprocess.Popen:
    """A real process of train_net.py, first of a process group of its own.

    Its output is captured, or appended to a log.
    """
    with contextlib.ExitStack() as stack:
        options = {} if log is None else {"stdout": stack.enter_context(log.open("a"))}
        return patience.start(command(*arguments), env=environment(), **options)


def load_tool(name: str, folder: Path = ROOT / "tools"):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fork(
    arguments: Sequence[str],
    *,
    sabotage: Callable[[], None] | None = None,
    log: Path,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Run train_net.py in a child of this process, which has imported everything.

    Args:
        arguments: of the command line.
        sabotage: called in the child first; makes it die at a chosen place.
        log: what the child prints is appended to it.
        environ: variables of torchrun, for one of several processes of a job.

    Returns:
        process id.
    """
    child = os.fork()
    if child != 0:
        return child
    code = 70
    try:
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.set_num_threads(1)
        _forget_log_handlers()
        os.environ.update(environ or {})
        if sabotage is not None:
            sabotage()
        given = ["--config-file", "stageinteractor/shapes_tiny.py", *arguments]
        parsed = parse_arguments(train.get_parser(), given)
        if environ is None:
            train.run(parsed)
        else:
            launch(train.run, parsed, device="cpu")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _forget_log_handlers() -> None:
    """Those of earlier tests in the parent write to streams that pytest has closed since."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in known:
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()


def wait(
    child: int, *, kill_after: float | None = None, number: int = 9, timeout: float = PATIENCE
) -> int:
    """
    Args:
        child: process id.
        kill_after: seconds after which the child is sent a signal from outside.
        number: of the signal.
        timeout: after which the child hangs, which is a failure.

    Returns:
        exit code, or minus the number of the signal that ended the child.

    Raises:
        TimeoutError: it hangs.
    """
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - begin
        if kill_after is not None and elapsed >= kill_after:
            os.kill(child, number)
            kill_after = None
        if elapsed > timeout:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError(f"process {child} does not end")
        time.sleep(0.002)


def run_forked(
    arguments: Sequence[str], *, sabotage: Callable[[], None] | None = None, log: Path
) -> int:
    """:func:`fork` and :func:`wait`.

    Raises:
        TimeoutError: it hangs; with what it has printed.
    """
    try:
        return wait(fork(arguments, sabotage=sabotage, log=log))
    except TimeoutError as error:
        raise TimeoutError(f"{error}:\n{log.read_text()}") from error


def fork_two(arguments: Sequence[str], *, log: Path) -> list[int]:
    """Two processes of one job, which talk through Gloo; returns their ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        fork(arguments, log=log, environ={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def difference(first: Path, second: Path, name: str = "model_final") -> str | None:
    """What differs between a checkpoint of two runs, to the last bit; None if nothing does."""
    contents = [torch.load(f / f"{name}.pth", weights_only=True) for f in (first, second)]
    return _difference("", *contents)


def _difference(place: str, a, b) -> str | None:
    if type(a) is not type(b):
        return f"{place}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else f"{place}: the tensors differ"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{place}: the keys differ: {set(a) ^ set(b)}"
        pairs = [(f"{place}/{key}", a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{place}: {len(a)} and {len(b)} values"
        pairs = [(f"{place}/{i}", x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return None if a == b else f"{place}: {a!r} and {b!r}"
    return next((d for pair in pairs if (d := _difference(*pair)) is not None), None)


# Where a run may die: each is a function that makes the child kill itself there.


def die() -> None:
    os.kill(os.getpid(), 9)


def dying_in_step(number: int) -> Callable[[], None]:
    """In the backward pass of the n-th step that this process takes."""

    def sabotage() -> None:
        from detection_toolkit.engine.train_loop import DetectionTrainLoop

        update, count = DetectionTrainLoop._update, iter(range(1, 10**6))

        def update_or_die(self, *arguments):
            if next(count) == number:
                die()
            update(self, *arguments)

        DetectionTrainLoop._update = update_or_die

    return sabotage


def dying_in_write(number: int, share: float) -> Callable[[], None]:
    """While the n-th checkpoint is written, when a share of it is on the disk."""

    def sabotage() -> None:
        import io

        save, count = torch.save, iter(range(1, 10**6))

        def save_or_die(content, file):
            if next(count) < number:
                return save(content, file)
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getvalue()[: int(share * buffer.tell())])
            file.flush()
            die()

        torch.save = save_or_die

    return sabotage


def dying_at_rename(number: int, *, after: bool) -> Callable[[], None]:
    """Before or after the n-th renaming: odd ones are checkpoints, even ones last_checkpoint."""

    def sabotage() -> None:
        replace, count = os.replace, iter(range(1, 10**6))

        def replace_or_die(source, target):
            last = next(count) == number
            if last and not after:
                die()
            replace(source, target)
            if last:
                die()

        os.replace = replace_or_die

    return sabotage
