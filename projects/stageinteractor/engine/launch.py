"""Starting processes: Detectron2's ``launch``, torchrun, SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

__all__ = ["ProcessEnvironment", "launch", "read_process_environment"]

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


def read_process_environment(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    """What torchrun or SLURM's ``srun`` say; None when neither has started this process.

    Args:
        environ: ``os.environ``.

    Raises:
        ValueError: SLURM's variables are there but incomplete.
    """
    if all(k in environ for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")):
        world_size = int(environ["WORLD_SIZE"])
        return ProcessEnvironment(
            rank=int(environ["RANK"]),
            world_size=world_size,
            local_rank=int(environ["LOCAL_RANK"]),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", world_size)),
            init_method="env://",
        )
    # An interactive allocation sets SLURM_NTASKS too, but only srun's tasks have a step and a
    # process number; with a single task there is nothing to join.
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        try:
            rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
            hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
        except KeyError as error:
            raise ValueError(
                f"SLURM has started this process without {error.args[0]}: start it with srun"
            ) from error
        world_size = int(environ["SLURM_NTASKS"])
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
        local = int(re.match(r"\d+", tasks).group()) if tasks else world_size
        address = environ.get("MASTER_ADDR") or _first_host(hosts)
        port = environ.get("MASTER_PORT") or str(
            _SLURM_BASE_PORT + int(environ.get("SLURM_JOB_ID", "0")) % 20000
        )
        return ProcessEnvironment(rank, world_size, local_rank, local, f"tcp://{address}:{port}")
    return None


def launch(main: Callable[..., Any], args: Any, *, timeout: timedelta = timedelta(minutes=30)):
    """Run ``main(args)`` in every process of a job.

    Under torchrun or srun this process is one of them already; otherwise Detectron2's ``launch``
    starts ``args.num_gpus`` processes, with Gloo where there is no GPU.

    Args:
        main: called as ``main(args)``.
        args: from Detectron2's ``default_argument_parser``.
        timeout: of the process group.
    """
    environment = read_process_environment(os.environ)
    if environment is None:
        return detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            timeout=timeout,
        )
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(environment.local_rank)
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        init_method=environment.init_method,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
    try:
        comm.create_local_process_group(environment.local_world_size)
        comm.synchronize()
        return main(args)
    finally:
        dist.destroy_process_group()


def _first_host(hosts: str) -> str:
    """First name of a SLURM node list: "node[03-05,9],x1" -> "node03"."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", hosts)
    if match is None:
        raise ValueError(f"SLURM's node list {hosts!r} names no host")
    return match.group(1) + (match.group(2) or "")
