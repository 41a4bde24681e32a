"""Signals to real processes of train_net.py, alone and two together."""

import os
import signal
import time

import pytest
import torch
from fault_runs import difference, fork_two, run_forked, run_overrides, start, wait
from patience import PATIENCE, killed, outputs, wait_until

from detection_toolkit.engine.interruption import EXIT_INTERRUPTED


def wait_for_checkpoint(output, process):
    path = output / "last_checkpoint"
    wait_until(path.is_file, str(path), process=process, output=lambda: killed(process))


def last_iteration(output):
    name = (output / "last_checkpoint").read_text()
    return torch.load(output / name, weights_only=True)["iteration"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_leads_to_a_checkpoint_and_its_own_exit_code(
    tmp_path, small_data, undisturbed, number
):
    """The whole process group is sent it, as by a scheduler, loader processes too."""
    overrides = run_overrides(tmp_path, small_data, "train.checkpointer.period=1000000")
    log = tmp_path / "console.txt"

    def signalled_in_step_7():
        from detection_toolkit.engine.train_loop import DetectionTrainLoop

        os.setsid()
        update = DetectionTrainLoop._update

        def update_and_signal(self, *arguments):
            update(self, *arguments)
            if self.iter == 7:
                os.killpg(0, number)

        DetectionTrainLoop._update = update_and_signal

    workers = ["dataloader.train.num_workers=2"]
    code = run_forked([*overrides, *workers], sabotage=signalled_in_step_7, log=log)
    assert code == EXIT_INTERRUPTED, log.read_text()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000007.pth"
    assert "a checkpoint is written after iteration 7; --resume" in log.read_text()
    code = run_forked(["--resume", *overrides], log=log)
    assert code == 0, log.read_text()
    assert difference(undisturbed, tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_before_training_has_the_same_exit_code_and_loses_nothing(
    tmp_path, small_data, number
):
    overrides = run_overrides(tmp_path, small_data, "train.max_iter=3")
    log = tmp_path / "console.txt"
    assert run_forked(overrides, log=log) == 0, log.read_text()
    paths = [tmp_path / "last_checkpoint", *tmp_path.glob("model_*.pth")]
    before = [path.read_bytes() for path in paths]

    def signalled_when_it_resumes():
        from detection_toolkit.engine import Trainer

        resume_or_load = Trainer.resume_or_load

        def resume_and_signal(self, resume):
            resume_or_load(self, resume)
            os.kill(os.getpid(), number)
            time.sleep(PATIENCE)  # ended by the signal

        Trainer.resume_or_load = resume_and_signal

    log.unlink()
    code = run_forked(["--resume", *overrides], sabotage=signalled_when_it_resumes, log=log)
    assert code == EXIT_INTERRUPTED, log.read_text()
    text = log.read_text()
    assert f"{signal.Signals(number).name}, and not in training: the process ends" in text
    assert "Traceback" not in text
    assert [path.read_bytes() for path in paths] == before


def test_the_command_ends_although_only_it_is_told_and_not_its_loaders(tmp_path, small_data):
    """A real end of the interpreter, which waits for its loader processes."""
    endless = [*run_overrides(tmp_path, small_data), "train.max_iter=1000000"]
    process = start(*endless, "dataloader.train.num_workers=2")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    (text,) = outputs(process)
    assert process.returncode == EXIT_INTERRUPTED, text


@pytest.mark.slow
def test_two_processes_end_with_a_checkpoint_that_one_can_go_on_from(tmp_path, small_data):
    endless = [*run_overrides(tmp_path, small_data), "train.max_iter=1000000"]
    process = start("--num-gpus", "2", *endless)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    (text,) = outputs(process)
    assert process.returncode == EXIT_INTERRUPTED, text
    done = last_iteration(tmp_path)
    assert f"a checkpoint is written after iteration {done}" in text, text

    log = tmp_path / "console.txt"
    overrides = [*run_overrides(tmp_path, small_data), f"train.max_iter={done + 3}"]
    assert run_forked(["--resume", *overrides], log=log) == 0, log.read_text()
    assert f"resumed: {done + 1} of {done + 3} iterations are done" in log.read_text()
    message = "the run goes on with 1 process(es) instead of 2. The order of the images and their"
    assert message in log.read_text()


def test_a_killed_process_ends_the_other(tmp_path, small_data):
    """Long before the half hour that processes wait for each other."""
    log = tmp_path / "console.txt"
    endless = [*run_overrides(tmp_path, small_data), "train.max_iter=1000000"]
    first, second = fork_two(endless, log=log)
    wait_until((tmp_path / "last_checkpoint").is_file, "a checkpoint", output=log.read_text)
    os.kill(second, signal.SIGKILL)
    assert wait(second) == -signal.SIGKILL
    assert wait(first) == 1, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error in process 0: the connection to another process is lost")
    # Nothing but what a checkpoint holds is lost: the run goes on from there.
    done = last_iteration(tmp_path)
    overrides = [*run_overrides(tmp_path, small_data), f"train.max_iter={done + 2}"]
    assert run_forked(["--resume", *overrides], log=log) == 0, log.read_text()
    assert f"resumed: {done + 1} of {done + 2} iterations are done" in log.read_text()
