"""Commands of docs/own_data.md on data in each of its formats, under the names that it uses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import user_commands
from coco_files import make_document
from format_files import make_splits, write_coco, write_roboflow_coco, write_yolo

from detection_toolkit.commands import main
from detection_toolkit.data.formats import FORMATS, convert, open_source

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.DOTALL | re.M)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
CHECKS = re.findall(r"^\|.*\| `stageinteractor (check [^`]+)` \|$", TEXT, flags=re.M)
CONVERSIONS = [line for line in LINES if " convert data " in line]
RUNS = [line for line in LINES if "--data" in line and "tiny_custom" in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page calls my/."""
    my = tmp_path / "my"
    splits = make_splits(train=4, val=2)
    write_yolo(my / "yolo", splits)
    write_coco(my / "coco", splits)
    write_roboflow_coco(my / "roboflow", splits)
    source = open_source(my / "coco")
    for name in ("voc", "cvat", "labelme"):
        convert(source, my / name, to=name)
    document = make_document(num_images=5)
    flat = write_yolo(tmp_path / "flat", {"train": document})
    (my / "all.json").write_text(json.dumps(document))
    shutil.copytree(flat / "images/train", my / "images")
    shutil.copytree(flat / "images/train", my / "yolo_export/images")
    shutil.copytree(flat / "labels/train", my / "yolo_export/labels")
    (my / "yolo_export/classes.txt").write_text("cat\ndog\nbird\n")
    table = open_source(my / "all.json")
    convert(table, tmp_path / "table", to="csv", images="reference")
    shutil.move(tmp_path / "table/boxes.csv", my / "boxes.csv")
    value = {"x": 25, "y": 50, "width": 25, "height": 25, "rectanglelabels": ["cat"]}
    result = {"original_width": 96, "original_height": 64, "value": value}
    tasks = [
        {
            "id": i,
            "data": {"image": f"/data/upload/1/{i}.png"},
            "annotations": [{"result": [result]}],
        }
        for i in range(1, 6)
    ]
    (my / "export.json").write_text(json.dumps(tasks))
    for name in ("train", "val"):
        (my / f"{name}.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_a_command_for_each_format(folder):
    found = {}
    for command in CHECKS:
        words = shlex.split(command)
        root = words[words.index("--image-root") + 1] if "--image-root" in words else None
        found[command] = open_source(words[words.index("--data") + 1], image_root=root).format
    assert set(found.values()) == set(FORMATS) and len(found) == 10


@pytest.mark.parametrize("command", CHECKS)
def test_checks_say_that_the_data_are_ready(folder, capsys, command):
    assert main(shlex.split(command)) == 0
    shown = capsys.readouterr().out
    title = FORMATS[open_source(shlex.split(command)[2]).format].title
    first, *_, verdict, advice = shown.splitlines()
    assert title in first and "Ready to train" in verdict
    _, _, words = advice.partition("train on it:   ")
    assert shlex.split(words)[-1] in shlex.split(command)  # the data as they were named


def test_conversions_are_made(folder):
    assert len(CONVERSIONS) == 3
    for command in CONVERSIONS:
        words = shlex.split(command)[1:]
        assert main(words) == 0
        assert open_source(words[3]).format == words[words.index("--to") + 1]


@pytest.mark.slow
def test_runs_end_with_weights(folder):
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    assert len(RUNS) == 1
    for command in RUNS:
        words = shlex.split(command)[1:]
        words[0] = str(ROOT / words[0])
        words += ["train.max_iter=2", "dataloader.train.total_batch_size=2", "train.eval_period=0"]
        user_commands.call(words, folder)
        assert (folder / "output/my_data/model_final.pth").is_file()
