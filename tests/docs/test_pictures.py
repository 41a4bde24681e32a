"""The README's pictures are those that the scripts draw, and say what the method does."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import draw_ideas
import draw_readme
import numpy as np
import torch
from PIL import Image

from detection_toolkit.structures import Assignment, GroundTruth
from stageinteractor import CrossStageMatcher

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"


def test_the_picture_of_the_ideas_is_up_to_date():
    script = ROOT / "tools" / "draw_ideas.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ElementTree.parse(IMAGES / "ideas.svg")


def test_the_labels_of_the_picture_are_the_methods():
    frames, matched = zip(*draw_ideas.EXAMPLE)
    boxes = torch.tensor(frames, dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    (width, height), radius = draw_ideas.THUMBNAIL, draw_ideas.STAR
    half, low = radius * np.sin(0.4 * np.pi), radius * np.cos(0.2 * np.pi)
    star = [width / 2 - half, height / 2 - radius, width / 2 + half, height / 2 + low]
    truth = GroundTruth.collate([torch.tensor([star]).float()], [torch.tensor([0])], [(70, 100)])
    index = torch.where(torch.tensor(matched), 0, -1)[:, None, None]
    targets = CrossStageMatcher()(Assignment(index), boxes[:, None, None], truth, num_classes=1)
    learned = targets.multi_hot[:, 0, 0, 0].bool().tolist()
    assert learned == [draw_ideas.learns_star(t) for t in range(len(frames))]
    assert learned == [False, True, True, True]  # which the text below the picture explains


def test_pictures_of_the_shipped_model_are_drawn_as_they_are_shown(tmp_path, capsys):
    assert draw_readme.main(["--output", str(tmp_path)]) == 0
    for path in map(Path, capsys.readouterr().out.split()):
        shown = IMAGES / path.name
        assert shown.stat().st_size < 2_000_000
        with Image.open(path) as drawn, Image.open(shown) as committed:
            assert drawn.size == committed.size
            # Another processor may move a box by a pixel, and other libraries draw other letters.
            one, other = (np.asarray(x.convert("RGB"), dtype=float) for x in (drawn, committed))
            assert np.abs(one - other).mean() < 3
            if path.suffix == ".webp":
                assert committed.n_frames > 20
