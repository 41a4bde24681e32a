"""docs/architecture.md: the picture is today's, and the example is a detector that trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.modeling import META_ARCH_REGISTRY
from small_runs import run_overrides

from detection_toolkit.config import apply_overrides
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.modeling import QUERY_HEADS
from sqr import RecollectionSchedule
from stageinteractor import CrossStageMatcher

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_picture_is_drawn_from_todays_imports():
    script = ROOT / "tools" / "draw_architecture.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_is_short():
    assert len((CODE + CONFIG).splitlines()) < 80


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("projects")
    (folder / "minimal").mkdir()
    (folder / "minimal" / "__init__.py").write_text(CODE)
    (folder / "minimal_shapes.py").write_text(CONFIG)
    sys.path.insert(0, str(folder))
    yield folder / "minimal_shapes.py"
    sys.path.remove(str(folder))
    sys.modules.pop("minimal", None)
    META_ARCH_REGISTRY._obj_map.pop("Minimal", None)
    QUERY_HEADS._obj_map.pop("MinimalDecoder", None)


def load(config_file, folder, *overrides):
    common = [x for x in run_overrides(folder) if not x.startswith("model.decoder")]
    cfg = LazyConfig.load(str(config_file))
    return prepare_config(apply_overrides(cfg, [*common, *overrides]))


def test_the_example_trains_resumes_and_is_evaluated_by_stage(config_file, tmp_path):
    Trainer(load(config_file, tmp_path, "train.max_iter=2")).train()
    trainer = Trainer(
        load(config_file, tmp_path, "train.max_iter=4", "train.stage_evaluation=true")
    )
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    (stages,) = (tmp_path / "output").glob("inference/*/stage_metrics.json")
    assert len(json.loads(stages.read_text())["stages"]) == 3


def test_cross_stage_labels_and_recollection_are_one_line_each(config_file, tmp_path):
    lines = re.findall(r"`(model\.[^`]*=\{[^`]*\})`", PAGE)
    assert len(lines) == 2
    trainer = Trainer(load(config_file, tmp_path, "train.max_iter=1", *lines))
    assert isinstance(trainer.model.decoder.route.schedule, RecollectionSchedule)
    assert isinstance(trainer.model.criterion.label_assigner, CrossStageMatcher)
    trainer.train()
