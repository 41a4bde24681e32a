"""Full disks and damaged checkpoints."""

import errno
import os
import random

import patience
import pytest
import torch
from fault_runs import difference, run_forked, run_overrides
from small_disks import small_disk

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.damage import damage
from detection_toolkit.checkpoint.official_files import CheckpointFileError
from detection_toolkit.durable import write_durably


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, small_data, undisturbed):
    """The disk has room for the first checkpoint and half of the second."""
    size = max(p.stat().st_size for p in undisturbed.glob("model_*.pth"))
    disk, log = tmp_path / "disk", tmp_path / "console.txt"
    with small_disk(disk, int(1.6 * size / 1024) + 100):
        output = disk / "output"
        overrides = run_overrides(output, small_data)
        assert run_forked(overrides, log=log) == 1
        text = log.read_text()
        assert "error: " in text.splitlines()[-1]
        assert "No space left on device" in text
        good = output / (output / "last_checkpoint").read_text()
        assert damage(good) is None
        assert f"{good} is intact: fix this, and go on with --resume" in text
        assert not list(output.glob(".*.partial"))
        # With more room the run goes on from there.
        patience.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_forked(["--resume", *overrides], log=log) == 0, log.read_text()
        assert difference(undisturbed, output) is None


class FullDisk:
    """A file that has no room for more than so many bytes."""

    def __init__(self, file, room):
        self.file = file
        self.room = room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def make_checkpointer(folder):
    folder.mkdir(exist_ok=True)
    return Checkpointer(torch.nn.Linear(50, 50), str(folder))


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, monkeypatch, room):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda data, file: save(data, FullDisk(file, room)))
    with pytest.raises(OSError, match=r"No space left.*model_0000001\.pth is intact") as error:
        checkpointer.save("model_0000002", iteration=2)
    assert error.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_the_disk_does_not_keep_is_noticed_before_anything_is_removed(tmp_path, monkeypatch):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    save = torch.save

    def lossy(data, file):
        save(data, file)
        file.seek(-3000, os.SEEK_END)
        file.write(b"\0" * 100)
        file.seek(0, os.SEEK_END)

    monkeypatch.setattr(torch, "save", lossy)
    with pytest.raises(OSError, match="is not what was written"):
        checkpointer.save("model_0000002", iteration=2)
    assert {p.name for p in tmp_path.iterdir()} == {"model_0000001.pth", "last_checkpoint"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit_of_a_weight(path):
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model"]["weight"]
    place = content.find(weight.numpy().tobytes())
    assert place > 0
    content[place + 10] ^= 4
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], weight)


def no_archive(path):
    path.write_bytes(b"<html>quota exceeded</html>" * 40)


DAMAGES = [truncate, empty, zero, flip_a_bit_of_a_weight, no_archive]


@pytest.mark.parametrize("harm", DAMAGES, ids=[d.__name__ for d in DAMAGES])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, harm, caplog):
    checkpointer = make_checkpointer(tmp_path)
    for iteration in (1, 2):
        checkpointer.model.weight.data.fill_(iteration)
        checkpointer.save(f"model_000000{iteration}", iteration=iteration)
    harm(tmp_path / "model_0000002.pth")
    fresh = make_checkpointer(tmp_path)
    rest = fresh.resume_or_load("", resume=True)
    assert rest["iteration"] == 1
    assert (fresh.model.weight == 1).all()
    assert (tmp_path / "model_0000002.pth.damaged").is_file()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert "model_0000002.pth is damaged" in caplog.text


def nothing_in_it(folder):
    (folder / "last_checkpoint").write_bytes(b"")


def no_such_file(folder):
    (folder / "last_checkpoint").write_text("model_0000003.pth")


def removed(folder):
    (folder / "last_checkpoint").unlink()


@pytest.mark.parametrize(
    "lose, said",
    [
        (nothing_in_it, "last_checkpoint is empty"),
        (no_such_file, "last_checkpoint names model_0000003.pth, which does not exist"),
        (removed, "last_checkpoint is missing"),
    ],
)
@pytest.mark.parametrize("newest_is_damaged", [False, True])
def test_a_lost_last_checkpoint_stands_for_the_newest_sound_one(
    tmp_path, caplog, lose, said, newest_is_damaged
):
    checkpointer = make_checkpointer(tmp_path)
    for iteration in (1, 2):
        checkpointer.save(f"model_000000{iteration}", iteration=iteration)
    checkpointer.save("model_best", iteration=1)
    torch.save({"model": {}}, tmp_path / "model_mine.pth")  # newer, but none of the run's
    if newest_is_damaged:
        truncate(tmp_path / "model_0000002.pth")
    lose(tmp_path)
    expected = 1 if newest_is_damaged else 2
    assert make_checkpointer(tmp_path).resume_or_load("", resume=True)["iteration"] == expected
    name = f"model_000000{expected}.pth"
    path = tmp_path / name
    assert f"{said}: going on from {path}, the newest that is sound" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == name


def test_when_the_one_checkpoint_is_gone_the_run_stops(tmp_path):
    no_such_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model_0000003\.pth does not exist.*no other"):
        make_checkpointer(tmp_path).resume_or_load("", resume=True)


def test_when_all_are_damaged_the_run_stops_and_then_begins_anew(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save("model_best", iteration=1)  # lacks nothing, but is not the newest
    truncate(tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointFileError, match="none of the 1 checkpoints"):
        make_checkpointer(tmp_path).resume_or_load("", resume=True)
    assert "iteration" not in make_checkpointer(tmp_path).resume_or_load("", resume=True)


def test_old_checkpoints_go_and_those_of_other_runs_stay(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    for iteration in (9, 1, 2, 3):  # 9: of an earlier run in the same folder
        checkpointer.save(f"model_000000{iteration}", iteration=iteration)
    checkpointer.save("model_final", iteration=3)
    checkpointer.prune(2, 3)
    left = sorted(p.name for p in tmp_path.glob("*.pth"))
    assert left == [
        "model_0000002.pth",
        "model_0000003.pth",
        "model_0000009.pth",
        "model_final.pth",
    ]


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.pth"
    content = {"model": {"weight": torch.arange(300.0)}, "iteration": 3}
    write_durably(path, lambda file: torch.save(content, file))
    good = path.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(300):
        changed = bytearray(good)
        changed[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        if damage(path) is not None:
            found += 1
            continue
        # In what fills the space between records, or says when a file was made.
        again = torch.load(path, weights_only=True)
        assert again["iteration"] == 3
        assert torch.equal(again["model"]["weight"], content["model"]["weight"])
    assert found > 150
