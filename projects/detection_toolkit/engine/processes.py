"""Starting processes: Detectron2's ``launch``, torchrun, SLURM."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from .interruption import InterruptedRun, handled_by, signal_at_end_of_parent

__all__ = [
    "ProcessEnvironment",
    "check_gpus_are_there",
    "launch",
    "read_process_environment",
]

# What PyTorch says of a port that another program listens at.
_TAKEN = "EADDRINUSE"
# As torchrun tells its processes that the store where they meet is there already; the second one is
# asked for by older versions of PyTorch.
_STORE_IS_THERE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
_LOOK = 0.5  # seconds from one look for signals to the next
# SLURM gives no port. Jobs on one machine differ in their job id.
_SLURM_BASE_PORT = 20000


@dataclass(frozen=True)
class ProcessEnvironment:
    """Place of this process among those that something else has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str

    def __post_init__(self):
        # What Detectron2's local process groups take for granted.
        if self.world_size % self.local_world_size or (
            self.rank % self.local_world_size != self.local_rank
        ):
            raise UserError(
                f"process {self.rank} of {self.world_size} is number {self.local_rank} of "
                f"{self.local_world_size} on its machine: give every machine the same number of "
                "processes, and number them machine by machine (SLURM: --ntasks-per-node, "
                "--distribution=block)"
            )


def read_process_environment(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    """What torchrun or SLURM's ``srun`` say; None when neither has started this process.

    Args:
        environ: ``os.environ``.

    Raises:
        ValueError: SLURM's variables are incomplete, or the processes are not spread evenly.
    """
    return _started_by_torchrun(environ) or _started_by_srun(environ)


def _started_by_torchrun(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    if not all(k in environ for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")):
        return None
    world_size = int(environ["WORLD_SIZE"])
    return ProcessEnvironment(
        rank=int(environ["RANK"]),
        world_size=world_size,
        local_rank=int(environ["LOCAL_RANK"]),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
        init_method="env://",
    )


def _started_by_srun(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    # The batch script itself, and an interactive allocation, have SLURM_NTASKS too; only what srun
    # started belongs to a step. With a single task there is nothing to join.
    if "SLURM_STEP_ID" not in environ or world_size == 1:
        return None
    try:
        rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
    except KeyError as error:
        raise UserError(
            f"SLURM has started this process without {error.args[0]}: start it with srun"
        ) from error
    # "8(x2)", "4", or "3,1" for machines with different numbers.
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    counts = {int(n) for n in re.findall(r"(?:^|,)(\d+)", tasks)} if tasks else {world_size}
    if len(counts) > 1:
        raise UserError(
            f"SLURM has spread the processes unevenly over the machines ({tasks}): give every "
            "machine the same number, with --ntasks-per-node"
        )
    address = environ.get("MASTER_ADDR") or _first_host(hosts)
    port = environ.get("MASTER_PORT") or str(
        _SLURM_BASE_PORT + int(environ.get("SLURM_JOB_ID", "0")) % 20000
    )
    return ProcessEnvironment(rank, world_size, local_rank, counts.pop(), f"tcp://{address}:{port}")


def check_gpus_are_there(num_gpus: int, overrides: Sequence[str]) -> None:
    """Refuse to run on CPUs only because there are no GPUs.

    Args:
        num_gpus: processes that are asked for.
        overrides: of the config; ``train.device=cpu`` asks for the CPU by name.

    Raises:
        UserError: several are asked for, there is no GPU, and it is not the CPU that is meant.
    """
    by_name = any(text.lstrip("+").startswith("train.device=cpu") for text in overrides)
    if num_gpus > 1 and not torch.cuda.is_available() and not by_name:
        raise UserError(
            f"--num-gpus {num_gpus}, but PyTorch sees no GPU here; with train.device=cpu it is the "
            "number of processes on the CPU"
        )


def _check_not_one_of_many(environ: Mapping[str, str]) -> None:
    """
    Raises:
        UserError: something has started several processes, and this one does not know its place.
    """
    size = environ.get("WORLD_SIZE", "")
    if size.isdigit() and int(size) > 1:
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR")
        missing = " and ".join(name for name in names if name not in environ)
        raise UserError(
            f"WORLD_SIZE={size} is set, but not {missing}: each of the {size} processes would "
            "train alone, into one folder. Start them with torchrun or srun, give --num-machines, "
            "--machine-rank and --dist-url, or unset WORLD_SIZE"
        )


def launch(
    main: Callable[..., Any],
    args: Any,
    *,
    device: str = "cuda",
    timeout: timedelta = timedelta(minutes=30),
) -> Any:
    """Run ``main(args)`` in every process of a job.

    Under torchrun or srun this process is one of them already; otherwise Detectron2's ``launch``
    starts ``args.num_gpus`` processes. Processes on CPUs talk through Gloo. One srun task a
    machine that itself starts a process for each GPU works, too: it names ``--num-gpus`` and
    ``--num-machines``.

    Args:
        main: called as ``main(args)``; a module's function, as other processes import it.
        args: from Detectron2's ``default_argument_parser``.
        device: what the processes compute on, ``train.device``.
        timeout: of the process group.

    Raises:
        UserError: more processes are asked for than there are GPUs, the environment contradicts
            itself, or several machines have no address.
        SystemExit: a process that was started here has ended with an exit code, after saying why,
            or was killed.
    """
    environment = _started_by_torchrun(os.environ)
    if environment is None and args.num_gpus * args.num_machines == 1:
        environment = _started_by_srun(os.environ)
    on_gpu = torch.cuda.is_available() and torch.device(device).type == "cuda"
    if environment is not None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal_at_end_of_parent()  # torchrun itself dies of SIGUSR1
        return _join(environment, main, args, on_gpu=on_gpu, timeout=timeout)

    if args.num_gpus < 1 or args.num_machines < 1:
        raise UserError("--num-gpus and --num-machines must be at least 1")
    if args.num_machines == 1:
        _check_not_one_of_many(os.environ)
    if on_gpu and args.num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {args.num_gpus}, but PyTorch sees {torch.cuda.device_count()} GPUs here"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, with a free "
            "port of the machine of --machine-rank 0"
        )
    if args.num_gpus * args.num_machines > 1 and not on_gpu:
        # Detectron2 takes NCCL where there is a GPU, which cannot exchange a CPU's tensors.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    passed: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            run, dist_url = _main_with_share_of_cores, args.dist_url
            if args.num_gpus * args.num_machines > 1:
                run = _main_of_started_process
                stack.enter_context(_signals_passed_on(passed))
                if dist_url == "auto":
                    dist_url = stack.enter_context(_meeting_place())
            return detectron2_launch(
                run,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=dist_url,
                args=(main, args, 1 if on_gpu else args.num_gpus),
                timeout=timeout,
            )
    except ProcessExitedException as error:
        if error.signal_name in passed:  # which came before it could handle signals
            _end_before_training(error.signal_name)
        if error.signal_name is not None:  # nothing has been said yet
            sys.exit(
                f"error: process {error.error_index} was ended from outside by "
                f"{error.signal_name} (SIGKILL: often the system, short of memory), and the "
                "others with it. The checkpoints are intact: go on with --resume"
            )
        sys.exit(error.exit_code)
    except ProcessRaisedException as error:
        if _have_not_met(error):
            if passed:
                _end_before_training(passed[-1])
            raise UserError(_port_is_taken(args.dist_url)) from error
        raise


def _have_not_met(error: ProcessRaisedException) -> bool:
    """Whether the port of the processes was taken; not one of ``main``, perhaps hours later."""
    return _TAKEN in str(error) and "init_process_group" in str(error)


@contextlib.contextmanager
def _meeting_place() -> Iterator[str]:
    """Where the processes of this machine meet: a store of this process, which listens already.

    A port that Detectron2 has found free is free until the first process has imported PyTorch,
    seconds later. Another run may find the same one meanwhile, and its processes would meet those
    of this run.
    """
    if sys.platform == "win32":  # PyTorch has no libuv there, which the processes would ask for
        yield "auto"
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = {name: os.environ.get(name) for name in _STORE_IS_THERE}
    os.environ.update(_STORE_IS_THERE)
    try:
        yield f"tcp://127.0.0.1:{store.port}"
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _port_is_taken(address: str) -> str:
    return (
        f"the port of {address} is taken by another program: choose another one (--dist-url, or "
        "MASTER_PORT under srun and torchrun); on one machine leave --dist-url out, and a free one "
        "is found"
    )


@contextlib.contextmanager
def _signals_passed_on(passed: list[str]) -> Iterator[None]:
    """What asks this process to end is for those that it has started, which write a checkpoint.

    Args:
        passed: names of the signals that have come are appended.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(signal.Signals(number).name)
        processes = multiprocessing.active_children()
        if not processes:  # none is there yet to be told
            _end_before_training(passed[-1])
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    with handled_by(pass_on), _woken_now_and_then():
        yield


@contextlib.contextmanager
def _woken_now_and_then() -> Iterator[None]:
    """While this lasts, the main thread looks for signals, however long it waits.

    A process that is stopped, as by a scheduler, is given a signal when it goes on, in any of its
    threads. That wakes no other thread, and Python handles signals in the main one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # also of one that is under way
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


def _end_before_training(signal_name: str) -> NoReturn:
    print(
        f"{signal_name}, before training: the processes end, nothing is lost. The same command "
        "starts them again",
        file=sys.stderr,
    )
    raise InterruptedRun


def _join(
    environment: ProcessEnvironment,
    main: Callable[..., Any],
    args: Any,
    *,
    on_gpu: bool,
    timeout: timedelta,
) -> Any:
    """Take this process's place in the group, and run."""
    if on_gpu:
        # With --gpus-per-task a process sees only its own GPU, as number 0.
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())
    if environment.rank == 0:
        print(
            f"waiting for {environment.world_size} processes at {environment.init_method}",
            flush=True,
        )
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=environment.init_method,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    except dist.DistNetworkError as error:
        if _TAKEN in str(error):
            address = environment.init_method
            if address == "env://":
                address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(_port_is_taken(address)) from error
        raise
    comm.create_local_process_group(environment.local_world_size)
    comm.synchronize()
    sharing = 1 if on_gpu else environment.local_world_size
    result = _main_with_share_of_cores(main, args, sharing)
    # Only after success: a group whose other members are gone may wait for them here.
    dist.destroy_process_group()
    return result


def _main_with_share_of_cores(main: Callable[..., Any], args: Any, sharing: int) -> Any:
    # Several processes on the cores of one machine would each start a thread for every core.
    if sharing > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // sharing))
    return main(args)


def _main_of_started_process(main: Callable[..., Any], args: Any, sharing: int) -> None:
    """``main`` in a process that Detectron2 has started; see :func:`_end_without_finalization`."""
    try:
        _main_with_share_of_cores(main, args, sharing)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        atexit.register(_end_without_finalization, code)
        raise
    atexit.register(_end_without_finalization, 0)


def _end_without_finalization(code: int) -> None:
    """Exit by ``os._exit``, after the other ``atexit`` functions and a flush.

    A thread of Gloo may be about to free the tensors of the last exchange. It would need the
    interpreter for that, and where that has gone PyTorch aborts: SIGABRT in the place of the code.
    """
    atexit.unregister(_end_without_finalization)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


def _first_host(hosts: str) -> str:
    """First name of a SLURM node list: "node[03-05,9]-ib,x1" -> "node03-ib"."""
    # The first entry ends at a comma outside of brackets.
    entry = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts).group()
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry)
    if not host:
        raise UserError(f"SLURM's node list {hosts!r} names no host")
    return host
