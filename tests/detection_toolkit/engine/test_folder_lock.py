"""One run at a time in an output folder."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from fault_runs import difference, fork, run_forked, run_overrides, wait
from patience import PATIENCE, wait_until
from small_runs import data_overrides, write_dataset

from detection_toolkit.commands import train
from detection_toolkit.engine import folder_lock
from detection_toolkit.engine.arguments import parse_arguments
from detection_toolkit.engine.folder_lock import (
    LOCK_NAME,
    FolderInUseError,
    check_unlocked,
    locked_folder,
)
from detection_toolkit.engine.runs import claim_folder
from detection_toolkit.errors import UserError


@contextlib.contextmanager
def holder(folder, *, then=lambda: time.sleep(PATIENCE)):
    """Another process that has locked a folder; its id."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), locked_folder(folder):
            os.write(tell, b"x")
            then()
        os._exit(0)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def end(child, number=signal.SIGKILL):
    os.kill(child, number)
    os.waitpid(child, 0)


def test_a_second_process_is_told_of_the_first(tmp_path):
    with holder(tmp_path) as child:
        words = rf"process {child} on {socket.gethostname()}, since \d"
        with pytest.raises(FolderInUseError, match=words), locked_folder(tmp_path):
            pass
        with pytest.raises(FolderInUseError, match=words):
            check_unlocked(tmp_path)
        for move_aside in (False, True):
            with pytest.raises(FolderInUseError, match="is not over"):
                claim_folder(str(tmp_path), move_aside=move_aside)
        (tmp_path / "linked").symlink_to(tmp_path)  # the same folder by another name
        with pytest.raises(FolderInUseError), locked_folder(tmp_path / "linked"):
            pass


def test_one_that_is_killed_is_replaced_without_a_wait(tmp_path, caplog, monkeypatch):
    with holder(tmp_path) as child:
        end(child)
        monkeypatch.setattr(folder_lock.time, "sleep", lambda _: pytest.fail("it waits"))
        with locked_folder(tmp_path):
            assert f"the run of process {child}" in caplog.text
            assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()
        assert (tmp_path / LOCK_NAME).read_text() == ""
    caplog.clear()
    with locked_folder(tmp_path):
        pass
    assert not caplog.text


def test_processes_that_outlive_the_holder_hold_nothing(tmp_path):
    """Loader processes take a while to notice its end."""

    started, tell = os.pipe()

    def start_another():
        if os.fork() == 0:
            os.write(tell, b"%d\n" % os.getpid())
        time.sleep(PATIENCE)

    with holder(tmp_path, then=start_another) as child, os.fdopen(started) as file:
        another = int(file.readline())
        try:
            end(child)
            with locked_folder(tmp_path):
                pass
        finally:
            os.kill(another, signal.SIGKILL)  # it is there to the end
            os.close(tell)


def test_a_process_may_lock_a_folder_twice(tmp_path):
    with locked_folder(tmp_path):
        with locked_folder(tmp_path):
            check_unlocked(tmp_path)
            claim_folder(str(tmp_path))
        # The inner one has not unlocked it.
        assert in_child(lambda: check_unlocked(tmp_path)) == "FolderInUseError"
    assert in_child(lambda: check_unlocked(tmp_path)) == ""


def in_child(call):
    """The name of the error that a call raises in another process."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        folder_lock._held.clear()
        try:
            call()
        except BaseException as error:
            os.write(tell, type(error).__name__.encode())
        os._exit(0)
    os.close(tell)
    os.waitpid(child, 0)
    with os.fdopen(ready) as file:
        return file.read()


@pytest.mark.parametrize("left", [False, True])
def test_of_several_that_start_at_once_one_gets_it(tmp_path, left):
    """Also where a killed one has left its file."""
    folders = [tmp_path / str(number) for number in range(10)]
    if left:
        with holder(folders[0]) as child:
            end(child)
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
    together = multiprocessing.get_context("fork").Barrier(4)
    results, tell = os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            with contextlib.suppress(BaseException):
                for number, folder in enumerate(folders):
                    together.wait(PATIENCE)
                    try:
                        with locked_folder(folder):
                            os.write(tell, b"%d locked\n" % number)
                            together.wait(PATIENCE)  # until all have tried
                    except FolderInUseError:
                        os.write(tell, b"%d in use\n" % number)
                        together.wait(PATIENCE)
            os._exit(0)
    os.close(tell)
    with os.fdopen(results) as file:
        found = sorted(file.read().splitlines())
    for child in children:
        os.waitpid(child, 0)
    assert found == [f"{n} {r}" for n in range(10) for r in (*["in use"] * 3, "locked")]


@pytest.fixture
def quick(monkeypatch):
    """No test waits as long as a run does."""
    monkeypatch.setattr(folder_lock, "_BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "_PATIENCE", 1.0)


def of_another_machine(folder):
    content = {"host": "another\x1b[2J", "process": 7, "since": "yesterday"}
    (folder / LOCK_NAME).write_text(json.dumps(content))


def test_one_on_another_machine_that_is_gone_is_replaced(tmp_path, quick):
    of_another_machine(tmp_path)
    with locked_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


@pytest.fixture
def clock(monkeypatch):
    """The time of those who wait for another machine: it passes while they sleep."""
    clock = SimpleNamespace(now=0.0, slept=[], then=lambda: None)

    def sleep(seconds):
        clock.now += seconds
        clock.slept.append(seconds)
        clock.then()

    monkeypatch.setattr(folder_lock.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(folder_lock.time, "sleep", sleep)
    return clock


@pytest.mark.parametrize("stalls", [False, True])
@pytest.mark.parametrize("alive", [True, False])
def test_one_on_another_machine_that_runs_is_not(tmp_path, clock, alive, stalls):
    """Where a network disk keeps the locks of each machine by itself.

    It touches its file in time, also where this process stood still for a minute.
    """
    of_another_machine(tmp_path)

    def touch():
        if stalls and len(clock.slept) == 3:
            clock.now += 60.0
        if alive and sum(clock.slept) >= folder_lock._BEAT:
            os.utime(tmp_path / LOCK_NAME, (1e9, 1e9))

    clock.then = touch
    if not alive:
        with locked_folder(tmp_path):
            assert folder_lock._PATIENCE <= sum(clock.slept) < folder_lock._PATIENCE + 1
        return
    with pytest.raises(FolderInUseError, match="process 7 on 'another") as error:
        with locked_folder(tmp_path):
            pass
    assert "\x1b" not in str(error.value)


def test_a_holder_touches_its_file(tmp_path, quick):
    path = tmp_path / LOCK_NAME
    with locked_folder(tmp_path):
        before = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > before, "a touch")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": 1}', "\0" * 5000])
def test_what_no_run_has_written_locks_nothing(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content)
    with locked_folder(tmp_path):
        pass


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link"), locked_folder(tmp_path):
        pass
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", lockf)
    with locked_folder(tmp_path):
        assert "cannot be locked" in caplog.text


def test_a_run_that_came_and_went_meanwhile_is_not_mixed_with(tmp_path):
    """Between the look at the folder and the lock."""
    args = parse_arguments(
        train.get_parser(),
        ["--config-file", "stageinteractor/shapes_tiny.py", f"train.output_dir='{tmp_path}'"],
    )
    args.is_claimed = True
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(SystemExit, match="holds a run already"):
        train.run(args)
    assert sorted(os.listdir(tmp_path)) == [LOCK_NAME, "last_checkpoint"]


def test_of_two_runs_in_one_folder_one_is_refused_and_the_other_undamaged(tmp_path):
    """Started at the same moment, and again while the first one runs.

    That one does not go on before the others have tried.
    """
    data = data_overrides(*write_dataset(tmp_path / "data", num_images=7))
    alone = tmp_path / "alone"
    assert run_forked(run_overrides(alone, data), log=tmp_path / "alone.txt") == 0
    output = tmp_path / "output"
    overrides = run_overrides(output, data)
    logs = [tmp_path / f"{i}.txt" for i in range(3)]
    others_have_tried = tmp_path / "tried"

    def waiting_in_its_first_step():
        from detection_toolkit.engine.train_loop import DetectionTrainLoop

        update = DetectionTrainLoop._update

        def update_later(self, *arguments):
            wait_until(others_have_tried.is_file, "the attempts of the others")
            update(self, *arguments)

        DetectionTrainLoop._update = update_later

    children = [fork(overrides, sabotage=waiting_in_its_first_step, log=log) for log in logs[:2]]
    codes = {}

    def one_has_ended():
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        return codes

    try:
        wait_until(
            one_has_ended, "one is refused", output=lambda: "".join(x.read_text() for x in logs[:2])
        )
        third = run_forked(["--resume", *overrides], log=logs[2])
    finally:
        others_have_tried.touch()
        codes.update({child: wait(child) for child in children if child not in codes})
    texts = [log.read_text() for log in logs]
    assert sorted(codes.values()) == [0, 1], texts
    assert third == 1, texts
    refused = [codes[child] == 1 for child in children].index(True)
    for text in (texts[refused], texts[2]):
        assert "is the folder of a run that is not over: process " in text.splitlines()[-1]
    assert difference(alone, output) is None
