"""Every command of docs/coming_from.md is run, and every key and name in it is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import pytest
import user_commands
from coco_files import write_dataset
from format_files import make_splits, write_roboflow_coco, write_yolo

import detection_toolkit.engine
import detection_toolkit.visualization
from detection_toolkit.config import apply_overrides, config_names, get_config
from detection_toolkit.data.formats import convert, open_source

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
(DATA,) = re.findall(r"^```\n(.*?)^```", TEXT, flags=re.DOTALL | re.M)
CODE = [
    code
    for row in re.findall(r"^\|(?! there|---)(.+)\|$", TEXT, flags=re.M)
    for code in re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])
]
COMMANDS = list(dict.fromkeys(code for code in CODE if code.startswith("stageinteractor ")))
TRAINS = [code for code in COMMANDS if code.startswith("stageinteractor train") and "RUN" in code]


def test_every_habit_has_an_answer():
    assert len(COMMANDS) > 10 and len(TRAINS) > 3
    for name in ("Ultralytics", "RF-DETR", "MMDetection", "detrex"):
        assert f"## {name}\n\n" in TEXT


def test_keys_are_those_of_the_config():
    keys = [code for code in CODE if re.fullmatch(r"[a-z]+\.[\w.]+=\S+", code)]
    assert len(keys) > 15
    apply_overrides(get_config("stageinteractor/stageinteractor_tiny_custom.py"), keys)
    apply_overrides(get_config("dino/dino_tiny_custom.py"), keys)


def test_names_of_python_and_configs_are_there():
    assert hasattr(detection_toolkit.engine.Predictor, "from_run")
    for name in ("TiledPredictor", "Tiling", "to_supervision"):
        assert name in TEXT and hasattr(detection_toolkit.engine, name)
    assert hasattr(detection_toolkit.visualization, "select_confident")
    named = re.findall(r"--config-file (\w+/\w+\.py)", TEXT)
    assert named and set(named) <= set(config_names())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the data of the page, and a run."""
    folder = tmp_path_factory.mktemp("coming_from")
    json_file, _ = write_dataset(folder / "my", num_images=5)
    splits = make_splits(train=5, val=2)
    write_yolo(folder / "pets", splits)
    table = "path: pets\ntrain: images/train\nval: images/val\nnames: [cat, dog, bird]\n"
    (folder / "my.yaml").write_text(table)
    write_roboflow_coco(folder / "roboflow", splits)
    convert(open_source(folder / "pets"), folder / "voc", to="voc")
    for name in ("train", "val"):
        shutil.copyfile(json_file, folder / "my" / f"{name}.json")
    clip = cv2.VideoWriter(
        str(folder / "my" / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, (96, 64)
    )
    for image in sorted((folder / "my" / "images").iterdir()):
        clip.write(cv2.imread(str(image)))
    clip.release()
    call(folder, TRAINS[0])
    return folder


def call(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page as if it were installed, with few steps; it must succeed."""
    words = shlex.split(command.replace("DATA", DATA).replace("RUN", "run"))[1:]
    if words[0] == "train":
        words += ["train.max_iter=2", "train.eval_period=2", "train.device=cpu"]
        words += ["dataloader.train.total_batch_size=2", "model.decoder.num_stages=2"]
        if "--resume" not in words and "--print-config" not in words:
            words.append("--move-aside")
    return user_commands.call(["-m", "detection_toolkit", *words], folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_do_what_they_say(folder, command):
    if "--track" in command:
        pytest.importorskip("trackers")
    call(folder, command)
    makes = {
        "predict": "drawn",
        "export": "model.onnx",
        "--save-json": "found.json",
        "as_yolo": "as_yolo/data.yaml",
        "divided": "divided/annotations/instances_val.json",
        "small": "small/images/train",
    }
    made = [makes[word] for word in set(makes) & set(command.split())]
    made += ["seen/index.html"] if " view data " in command else []
    for name in made:
        assert (folder / name).exists()


@pytest.mark.slow
def test_the_run_holds_what_the_page_says(folder):
    names = re.search(r"It holds (.*?)\n\n", TEXT, flags=re.DOTALL)[1]
    for name in re.findall(r"`([\w.]+)`", names):
        assert (folder / "run" / name).is_file(), name
