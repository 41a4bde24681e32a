from __future__ import annotations

import pytest

from detection_toolkit.studies import run

# In the place of train_net.py: leaves what a training leaves, within milliseconds. "Variants" fail
# or hang by the value of train.log_period.
TRAINING = """
import json, os, pathlib, signal, sys, time

values = dict(a.lstrip("+").split("=", 1) for a in sys.argv if "=" in a)
folder = pathlib.Path(values["train.output_dir"].strip("'"))
seed, steps = int(values.get("train.seed", 0)), 4
kind = values.get("train.log_period", "0")
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
print("working on", kind)
def end(number, frame):
    (folder / "ended.txt").write_text(signal.Signals(number).name)
    sys.exit(75)

signal.signal(signal.SIGTERM, end)
(folder / "pid.txt").write_text(str(os.getpid()))
with open(folder / "metrics.json", "a") as file:
    file.write(json.dumps({"iteration": 1, "time": 0.25, "bbox/AP": 1.0}) + "\\n")
(folder / "last_checkpoint").write_text("model_0000001.pth")
if kind == "666":
    sys.exit("no space left on device")
if kind == "777" and "--resume" not in sys.argv:
    time.sleep(3600)  # ended by a signal
ap = 10.0 + seed + 2 * int(kind) + 0.1 * seed * (kind != "0")
with open(folder / "metrics.json", "a") as file:
    last = {"iteration": steps, "time": 0.5, "bbox/AP": ap, "bbox/AP-cat": ap / 2}
    file.write(json.dumps(last) + "\\n")
target = folder / "inference" / ("test_split" if "--eval-only" in sys.argv else "made_up")
target.mkdir(parents=True, exist_ok=True)
bbox = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": None, "APm": ap, "APl": ap}
bbox.update({"AP-cat": ap * seed, "AP-dog": 2 * ap} if seed else {})
document = {"dataset": target.name, "weights": "plain", "results": {"bbox": bbox}}
(target / "metrics.json").write_text(json.dumps(document))
if values.get("train.stage_evaluation") == "true":
    stages = [{"AP": ap - 1, "duplicates": 0.2}, {"AP": ap, "duplicates": 0.1}]
    share = {"share_of_labelled": 0.25}
    (target / "stage_metrics.json").write_text(json.dumps({
        "stages": stages,
        "last_stage_after_nms": {"AP": ap},
        "score_changes": [{"faded": 0.3, "grown": 0.4}],
        "label_changes": {"own_match": share, "cross_stage": share},
    }))
"""


@pytest.fixture
def fake_training(tmp_path, monkeypatch):
    """Cells train nothing; returns the folder that stands for the checkout."""
    (tmp_path / "train_net.py").write_text(TRAINING)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path
