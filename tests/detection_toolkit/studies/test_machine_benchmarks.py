"""The benchmarks of a shared machine and of the loader."""

from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pytest
from benchmarks import loader, multi_image, shared_machine
from patience import wait_until


class FakeWorker:
    """Takes the seconds that it is told, and three times as many where others are busy."""

    def __init__(self, quiet: float, loaded: float, state: dict[str, bool]):
        self.quiet, self.loaded, self.state, self.calls = quiet, loaded, state, 0

    def measure(self, work: str) -> list[float]:
        self.calls += 1
        return [self.loaded if self.state["busy"] else self.quiet]


def test_variants_take_turns_in_both_phases_and_ratios_are_of_neighbours(monkeypatch):
    state = {"busy": False}
    sent = []

    def kill(pid, number):
        sent.append((pid, number))
        state["busy"] = number == shared_machine.signal.SIGCONT

    monkeypatch.setattr(os, "kill", kill)
    trainers = {
        shared_machine.GNU_SPINS: FakeWorker(1.0, 6.0, state),
        "1000": FakeWorker(1.25, 2.0, state),
    }
    found = shared_machine.measure(trainers, [7], rounds=3, steps=2)
    assert [len(found["1000"][phase]) for phase in shared_machine.PHASES] == [3, 3]
    assert trainers["1000"].calls == 7  # the first warms up
    assert {pid for pid, _ in sent} == {7}
    _, first, second = (line.split() for line in shared_machine.table(found).splitlines())
    assert first == ["300000", "1.000", "1.00", "6.000", "1.00"]
    assert second == ["1000", "1.250", "0.80", "2.000", "3.00"]


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def test_busy_processes_are_stopped_first_and_gone_at_the_end():
    with shared_machine.load(1) as (pid,):
        # The system stops it a moment later.
        wait_until(lambda: state_of(pid) == "T", "the process is stopped")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_decoders_are_compared_and_the_loader_timed(tmp_path, capsys):
    images, annotations = [], []
    for i in range(4):
        smooth = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.roll(smooth, 16 * i, axis=1))
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 96})
        box = {"bbox": [8, 8, 30, 20], "area": 600, "iscrowd": 0, "category_id": 1}
        annotations.append({"id": i, "image_id": i, **box})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    path = tmp_path / "loader_benchmark.json"
    path.write_text(json.dumps(document))
    arguments = ["--json-file", str(path), "--image-root", str(tmp_path), "--rounds", "1"]
    sizes = ["--entries", "9", "--batches", "2", "--workers", "0", "1"]
    loader.main([*arguments, *sizes, "--config", "stageinteractor/shapes_tiny.py"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert "1.00 times as fast   equal in 4 of 4, largest difference 0" in rows["Pillow"]
    assert {"OpenCV", "torchvision", "all,"} <= rows.keys()
    assert rows["0"].endswith("images/s") and "MiB each" in rows["1"]


def test_mosaic_and_mixup_are_timed_beside_images_by_themselves(tmp_path, capsys):
    from coco_files import write_dataset

    json_file, root = write_dataset(tmp_path, num_images=3)
    place = "dataloader.train.dataset"
    options = [f"{place}.json_file='{json_file}'", f"{place}.image_root='{root}'"]
    multi_image.main(["--images", "8", "--rounds", "3", *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines] == list(multi_image.PARTS)
    ratios = [float(line.split()[-4]) for line in lines]
    # A mosaic reads four images for one.
    assert ratios[0] == 1 and ratios[1] > 1.2
