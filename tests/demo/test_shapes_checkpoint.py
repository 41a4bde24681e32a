"""What tools/make_shapes_checkpoint.py keeps of a training, and what the repository carries."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from detection_toolkit.config import get_config
from detection_toolkit.engine.shipped import shipped_checkpoint, shipped_config


@pytest.fixture(scope="module")
def maker(load_script):
    return load_script("tools/make_shapes_checkpoint.py")


def training_checkpoint(path: Path, **more) -> Path:
    model = {"weight": torch.ones(3, 2, dtype=torch.float64), "count": torch.tensor(7)}
    torch.save({"model": model, "optimizer": {"state": [1, 2]}, "iteration": 9, **more}, path)
    return path


def test_only_the_weights_are_kept(maker, tmp_path):
    source = training_checkpoint(tmp_path / "model_final.pth")
    output = tmp_path / "new" / "small.pth"
    maker.export_weights(source, output)
    written = torch.load(output, weights_only=True)
    assert set(written) == {"model"}
    assert written["model"]["weight"].dtype == torch.float32
    assert written["model"]["count"].item() == 7
    assert [p.name for p in output.parent.iterdir()] == ["small.pth"]


def test_averaged_weights_are_preferred(maker, tmp_path):
    averaged = {"n_averaged": torch.tensor(5), "module.weight": torch.full((3, 2), 4.0)}
    source = training_checkpoint(tmp_path / "model_final.pth", ema=averaged)
    weights = maker.export_weights(source, tmp_path / "small.pth")
    assert set(weights) == {"weight"} and weights["weight"].eq(4).all()


def test_what_must_not_be_shipped_is_refused(maker, tmp_path, monkeypatch):
    output = tmp_path / "small.pth"
    broken = {"model": {"good": torch.ones(1), "bad": torch.tensor([math.nan])}}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="not finite in bad"):
        maker.export_weights(tmp_path / "broken.pth", output)
    monkeypatch.setattr(maker, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100"):
        maker.export_weights(training_checkpoint(tmp_path / "large.pth"), output)
    assert not output.exists()


def test_the_shipped_checkpoint_is_what_its_notes_say(maker):
    path = Path(shipped_checkpoint())
    facts = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size == facts["bytes"] <= maker.MAX_BYTES
    assert facts["shapes_val"]["AP"] >= 65
    assert path.with_name("README.md").read_text() == maker.describe(facts, path.name)
    weights = torch.load(path, weights_only=True)["model"]
    assert sum(t.numel() for t in weights.values()) == facts["parameters"]
    result = instantiate(get_config(shipped_config()).model).load_state_dict(weights)
    assert not result.missing_keys and not result.unexpected_keys
