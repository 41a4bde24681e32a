"""Several processes must compute what one computes with the whole batch."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import patience
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model, default_argument_parser
from detectron2.utils.events import EventStorage
from patience import PATIENCE, wait_until
from small_runs import make_batch, make_detector, run_overrides
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from two_processes import run_two_processes

from detection_toolkit.engine import processes
from detection_toolkit.engine.interruption import EXIT_INTERRUPTED, InterruptedRun
from detection_toolkit.engine.processes import check_gpus_are_there, read_process_environment
from detection_toolkit.engine.train_loop import DetectionTrainLoop
from detection_toolkit.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

# Objects of the images of process 0, then of process 1.
CASES = [((2, 1), (3, 2)), ((2, 3), (0, 0)), ((0, 0), (0, 0)), ((1, 0), (0, 0)), ((9, 0), (1, 1))]
ACCUMULATED = ((3, 0), (1, 2))


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {k: v.detach() for k, v in losses.items()}, gradients


def split(case):
    images = make_batch(case[0] + case[1])
    return images[: len(case[0])], images[len(case[0]) :]


def one_step(model, batches, folder):
    """Scalars of a step that changes no weight, as its gradients are to be compared."""
    loop = DetectionTrainLoop(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.0),
        device="cpu",
        accumulation_steps=len(batches),
        output_dir=str(folder),
    )
    with EventStorage() as storage:
        loop.run_step()
    return {k: v[0] for k, v in storage.latest().items()}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # As the trainer builds it: no search for unused parameters.
    model = create_ddp_model(
        make_detector(), device_ids=None, broadcast_buffers=False, find_unused_parameters=False
    )
    results = [losses_and_gradients(model, split(case)[rank]) for case in CASES]
    torch.save(results, f"{folder}/rank{rank}.pt")

    # Each process takes one step over its two images, one after the other.
    batches = [[image] for image in split(ACCUMULATED)[rank]]
    scalars = one_step(model, batches, folder)
    gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    torch.save((scalars, gradients), f"{folder}/accumulated{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_two_processes(run_rank, folder)
    return folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(c) for c in CASES])
def test_two_processes_equal_one_with_the_whole_batch(two_processes, case):
    first, second = split(CASES[case])
    expected_losses, expected_gradients = losses_and_gradients(make_detector(), first + second)
    results = [torch.load(two_processes / f"rank{rank}.pt")[case] for rank in range(2)]
    (losses0, gradients0), (losses1, gradients1) = results
    assert losses0.keys() == losses1.keys() == expected_losses.keys()
    for name, expected in expected_losses.items():
        torch.testing.assert_close((losses0[name] + losses1[name]) / 2, expected)
    assert gradients0.keys() == gradients1.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients0[name], gradients1[name], rtol=0, atol=0)
        torch.testing.assert_close(gradients0[name], expected, rtol=1e-6, atol=1e-9)


def test_two_processes_that_accumulate_equal_one_with_the_whole_batch(two_processes, tmp_path):
    model = make_detector()
    first, second = split(ACCUMULATED)
    expected = one_step(model, [first + second], tmp_path)
    results = [torch.load(two_processes / f"accumulated{rank}.pt") for rank in range(2)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for _, gradients in results:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)
    scalars = results[0][0]  # of the main process, which logs the means over all
    for name in ("total_loss", "loss_cls", "stage0/cls", "stage2/giou", "grad_norm"):
        assert scalars[name] == pytest.approx(expected[name], rel=1e-6), name


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_machines_on_the_loopback_address(tmp_path):
    overrides = [*run_overrides(tmp_path), "train.max_iter=2"]
    command = [
        *(sys.executable, str(ROOT / "train_net.py")),
        *("--config-file", "stageinteractor/shapes_tiny.py"),
        *("--num-gpus", "1", "--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"),
    ]
    # A GPU of the machine that runs the tests would be shared by both processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        patience.start([*command, "--machine-rank", str(rank), *overrides], env=environment)
        for rank in range(2)
    ]
    logs = patience.outputs(*processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    assert "2 per step over 2 processes" in logs[0]
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_torchrun_is_recognised():
    environ = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "1234",
    }
    found = read_process_environment(environ)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert found.init_method == "env://"


SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4321",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_slurm_is_recognised():
    found = read_process_environment(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (9, 16, 1, 8)
    assert found.init_method == "tcp://gpu007:24321"
    assert read_process_environment({**SLURM, "MASTER_PORT": "7"}).init_method == "tcp://gpu007:7"


def test_a_plain_shell_or_a_lone_slurm_task_starts_processes_itself():
    assert read_process_environment({}) is None
    assert read_process_environment({**SLURM, "SLURM_NTASKS": "1"}) is None
    # An interactive allocation without srun.
    assert read_process_environment({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None


def test_a_step_smaller_than_its_allocation_counts_its_own_tasks():
    step = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    found = read_process_environment({**step, "SLURM_PROCID": "1"})
    assert (found.rank, found.world_size, found.local_world_size) == (1, 2, 2)


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("gpu3", "gpu3"),
        ("a,b", "a"),
        ("node[03-05,9],x1", "node03"),
        ("node[7,9]-ib", "node7-ib"),
        ("r[1-2]n[01-04]", "r1n01"),
    ],
)
def test_the_first_host_of_a_node_list_is_where_processes_meet(hosts, first):
    found = read_process_environment({**SLURM, "SLURM_STEP_NODELIST": hosts})
    assert found.init_method == f"tcp://{first}:24321"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID: start it with srun"),
        ({"SLURM_STEP_TASKS_PER_NODE": "9,7"}, "unevenly over the machines"),
        ({"SLURM_LOCALID": "4"}, "distribution=block"),
    ],
)
def test_slurm_variables_that_do_not_do_are_named(change, message):
    environ = {k: v for k, v in {**SLURM, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        read_process_environment(environ)


def arguments(**changes):
    args = default_argument_parser().parse_args([])
    vars(args).update(changes)
    return args


def test_processes_that_are_asked_for_are_started_also_within_a_slurm_task(monkeypatch):
    # One task a machine, which starts a process for each GPU.
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    calls = []
    monkeypatch.setattr(processes, "detectron2_launch", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    processes.launch(print, arguments(num_gpus=8, num_machines=2), device="cpu")
    ((_, num_gpus), options) = calls[0]
    assert (num_gpus, options["num_machines"]) == (8, 2)


def test_a_process_that_has_said_why_it_ends_is_not_followed_by_a_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ProcessExitedException("ended", 0, 1, exit_code=1)

    monkeypatch.setattr(processes, "detectron2_launch", fail)
    with pytest.raises(SystemExit) as error:
        processes.launch(print, arguments(), device="cpu")
    assert error.value.code == 1


def test_a_process_that_was_killed_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise ProcessExitedException("", 1, 1, exit_code=-9, signal_name="SIGKILL")

    monkeypatch.setattr(processes, "detectron2_launch", fail)
    with pytest.raises(SystemExit, match="process 1 was ended from outside by SIGKILL"):
        processes.launch(print, arguments(num_gpus=2), device="cpu")


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_signal_before_training_ends_the_launcher_with_its_own_code(
    monkeypatch, capsys, has_begun
):
    """Before there is a process to be told, and before a process knows of signals."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
    child.start()

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        child.join(PATIENCE)
        raise ProcessExitedException(
            "", 0, child.pid, exit_code=child.exitcode, signal_name="SIGTERM"
        )

    monkeypatch.setattr(processes, "detectron2_launch", signalled)
    monkeypatch.setattr(processes.multiprocessing, "active_children", lambda: [child] * has_begun)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        processes.launch(print, arguments(num_gpus=2), device="cpu")
    assert error.value.code == EXIT_INTERRUPTED
    assert "SIGTERM, before training: the processes end, nothing is lost" in capsys.readouterr().err
    assert child.exitcode == (-signal.SIGTERM if has_begun else None)
    child.kill()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_number_of_processes_below_one_is_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        processes.launch(print, arguments(num_gpus=0), device="cpu")


def test_processes_are_not_silently_started_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--num-gpus 2, but PyTorch sees no GPU.*train.device=cpu"):
        check_gpus_are_there(2, ["train.max_iter=3"])
    check_gpus_are_there(2, ["train.device=cpu"])
    check_gpus_are_there(1, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--num-gpus 2, but PyTorch sees 1 GPU"):
        processes.launch(print, arguments(num_gpus=2), device="cuda")


@pytest.mark.parametrize("place", [{}, {"RANK": "1", "MASTER_ADDR": "host"}])
def test_one_of_several_processes_that_does_not_know_its_place_is_refused(monkeypatch, place):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    called = []
    monkeypatch.setattr(processes, "detectron2_launch", lambda *a, **k: called.append(a))
    with pytest.raises(UserError, match="WORLD_SIZE=2 is set, but not .*LOCAL_RANK.*torchrun"):
        processes.launch(print, arguments(), device="cpu")
    assert not called
    # A launcher of machines, where this process starts those of its own.
    processes.launch(print, arguments(num_machines=2), device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.launch(print, arguments(), device="cpu")
    assert len(called) == 2


def test_machines_need_an_address_but_one_finds_a_free_port(monkeypatch):
    with pytest.raises(UserError, match="--num-machines 2 needs --dist-url"):
        processes.launch(print, arguments(num_machines=2, dist_url="auto"), device="cpu")


def test_a_signal_that_another_thread_is_given_ends_the_launcher(monkeypatch):
    """As the system may choose when a process that was stopped goes on."""

    def wait(*args, **kwargs):
        # A moment later, as it matters where this thread waits already.
        threading.Timer(
            0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        ).start()
        assert threading.Event().wait(PATIENCE)

    monkeypatch.setattr(processes, "detectron2_launch", wait)
    monkeypatch.setattr(processes.multiprocessing, "active_children", lambda: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(InterruptedRun):
        processes.launch(print, arguments(num_gpus=2, dist_url="auto"), device="cpu")
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def start_launch(folder, *arguments):
    """Two processes that call ``work`` of ``folder/work_of_test.py``, started as by a command."""
    code = (
        "import sys; from argparse import Namespace\n"
        "import work_of_test\n"
        "from detection_toolkit.engine import launch\n"
        "args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url='auto', opts=[])\n"
        "args.words = sys.argv[1:]\n"
        "launch(work_of_test.work, args, device='cpu')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(folder), str(ROOT / "projects"), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    return patience.start([sys.executable, "-c", code, *arguments], env=environment)


@pytest.mark.slow
def test_two_runs_at_once_do_not_meet_at_one_port(tmp_path):
    """Both are there before either goes on, so one port would be used twice."""
    (tmp_path / "work_of_test.py").write_text(
        "from pathlib import Path; from detectron2.utils import comm\n"
        "from patience import wait_until\n"
        "def work(args):\n"
        "    folder, name = args.words\n"
        "    Path(folder, f'{name}{comm.get_rank()}').touch()\n"
        "    met = lambda: len(list(Path(folder).glob('run*'))) == 4\n"
        "    wait_until(met, 'the processes of both runs')\n"
        "    assert comm.all_gather(name) == [name] * 2\n"
    )
    runs = [start_launch(tmp_path, str(tmp_path), name) for name in ("run_a", "run_b")]
    logs = patience.outputs(*runs)
    assert [run.returncode for run in runs] == [0, 0], "\n".join(logs)


@pytest.mark.slow
def test_started_processes_do_all_at_their_end_but_take_the_interpreter_down(tmp_path):
    """Below a thread of Gloo, that would be an abort now and then."""
    (tmp_path / "work_of_test.py").write_text(
        "import atexit, os, sys, threading; from pathlib import Path\n"
        "from detectron2.utils import comm\n"
        "class Global:\n"
        "    def __init__(self, path):\n"
        "        self.file, self.write = os.open(path, os.O_WRONLY | os.O_CREAT), os.write\n"
        "    def __del__(self):\n"
        "        self.write(self.file, b'taken down')\n"
        "def work(args):\n"
        "    folder, rank = Path(args.words[0]), comm.get_rank()\n"
        "    global at_end\n"
        "    at_end = Global(folder / f'end{rank}')\n"
        "    atexit.register((folder / f'atexit{rank}').touch)\n"
        "    threading.Thread(target=(folder / f'thread{rank}').touch).start()\n"
        "    print(f'said by {rank}')\n"
        "    comm.all_gather('x')\n"
        "    sys.exit(75)\n"
    )
    run = start_launch(tmp_path, str(tmp_path))
    (log,) = patience.outputs(run)
    assert run.returncode == 75, log
    # Where one of two has ended with a code, Detectron2 ends the other.
    assert "said by 0" in log or "said by 1" in log
    found = {path.name for path in tmp_path.iterdir()}
    assert found & {"atexit0", "atexit1"} and found & {"thread0", "thread1"}
    assert not any(path.read_text() for path in tmp_path.glob("end*"))


@pytest.fixture
def taken_port():
    """One that this process listens at."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_port_that_is_taken_is_one_line_under_srun(monkeypatch, taken_port):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = default_argument_parser().parse_args([])
    with pytest.raises(UserError, match=f"port of .*127.0.0.1:{taken_port} is taken by another"):
        processes.launch(lambda args: None, args, device="cpu")
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_of_the_launcher(taken_port, tmp_path):
    command = [sys.executable, str(ROOT / "train_net.py"), "--num-gpus", "2", "--dist-url"]
    command += [f"tcp://127.0.0.1:{taken_port}", "--config-file", "stageinteractor/shapes_tiny.py"]
    done = patience.run(
        [*command, *run_overrides(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: the port of tcp://127.0.0.1:{taken_port} is taken")


def test_the_place_to_meet_is_taken_before_any_process_is_started(monkeypatch):
    """A port that is only found free is free for seconds, in which another run may find it, too."""
    places = []

    def launch(*args, dist_url, **kwargs):
        host, port = dist_url.removeprefix("tcp://").split(":")
        places.append(dist_url)
        with socket.socket() as other, pytest.raises(OSError):
            other.bind((host, int(port)))
        # As the processes take it: none of them is to listen there itself.
        for rank in range(2):
            url = f"{dist_url}?rank={rank}&world_size=2"
            store, *_ = next(rendezvous(url, timeout=timedelta(seconds=PATIENCE)))
            store.set(f"rank {rank}", "is here")
            assert store.get("rank 0") == b"is here"
        if len(places) == 1:  # a second run at the same time
            processes.launch(print, args_of_run, device="cpu")

    args_of_run = arguments(num_gpus=2, dist_url="auto")
    monkeypatch.setattr(processes, "detectron2_launch", launch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    before = dict(os.environ)
    processes.launch(print, args_of_run, device="cpu")
    assert len(set(places)) == 2
    assert dict(os.environ) == before


def raised(text):
    return ProcessRaisedException(text, error_index=0, error_pid=1)


def test_a_port_that_is_taken_is_told_from_what_a_run_says_of_its_own(monkeypatch):
    of_meeting = "dist.init_process_group(\n... code: -98, name: EADDRINUSE"
    errors = []

    def launch(*args, **kwargs):
        raise errors.pop()

    monkeypatch.setattr(processes, "detectron2_launch", launch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    args = arguments(num_gpus=2, dist_url="tcp://127.0.0.1:7")
    errors.append(raised(of_meeting))
    with pytest.raises(UserError, match="the port of tcp://127.0.0.1:7 is taken"):
        processes.launch(print, args, device="cpu")
    # What a run says of a port of its own, perhaps after hours.
    errors.append(raised("in train: EADDRINUSE"))
    with pytest.raises(ProcessRaisedException, match="in train"):
        processes.launch(print, args, device="cpu")

    # A signal that was to end the processes counts for more.
    def end_meanwhile(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return launch(*args, **kwargs)

    waiting = SimpleNamespace(pid=None)
    monkeypatch.setattr(processes.multiprocessing, "active_children", lambda: [waiting])
    monkeypatch.setattr(processes, "detectron2_launch", end_meanwhile)
    errors.append(raised(of_meeting))
    with pytest.raises(InterruptedRun):
        processes.launch(print, args, device="cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")
def test_the_end_of_what_has_started_a_process_is_a_signal_to_it(tmp_path):
    """As with torchrun, which dies of SIGUSR1 and leaves its processes alone."""
    child = (
        "import sys; from pathlib import Path\n"
        "from patience import wait_until\n"
        "from detection_toolkit.engine.interruption import Interruption, signal_at_end_of_parent\n"
        "interruption = Interruption()\n"
        "signal_at_end_of_parent()\n"
        "with interruption.caught():\n"
        "    Path(sys.argv[1], 'ready').touch()\n"
        "    wait_until(lambda: interruption.signal_name, 'a signal')\n"
        "Path(sys.argv[1], 'partial').write_text(str(interruption.signal_name))\n"
        "Path(sys.argv[1], 'partial').rename(Path(sys.argv[1], 'signal'))\n"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    paths = [str(ROOT / "projects"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = patience.start(
            [sys.executable, "-c", parent, child, str(tmp_path)], env=environment, stdout=file
        )
    wait_until((tmp_path / "ready").is_file, "the process", process=process, output=log.read_text)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == -signal.SIGUSR1
    wait_until((tmp_path / "signal").is_file, "the end", output=log.read_text)
    assert (tmp_path / "signal").read_text() == "SIGTERM"
