"""What tools/make_shapes_checkpoint.py keeps of a training, and what the repository carries."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from small_runs import data_overrides

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.runs import describe_run
from detection_toolkit.engine.shipped import shipped_checkpoint, shipped_config
from detection_toolkit.errors import UserError

RUN = {"classes": ["cat", "dog"], "input_format": "RGB", "resizing": [], "recipe": {}}


@pytest.fixture(scope="module")
def maker(load_script):
    return load_script("tools/make_shapes_checkpoint.py")


def training_checkpoint(path: Path, **more) -> Path:
    model = {"weight": torch.ones(3, 2, dtype=torch.float64), "count": torch.tensor(7)}
    state = {"optimizer": {"state": [1, 2]}, "iteration": 9}
    torch.save({"model": model, "run": RUN, **state, **more}, path)
    return path


def test_only_the_weights_and_what_they_tell_of_their_run_are_kept(maker, tmp_path):
    source = training_checkpoint(tmp_path / "model_final.pth")
    output = tmp_path / "new" / "small.pth"
    maker.export_weights(source, output)
    written = torch.load(output, weights_only=True)
    assert set(written) == {"model", "run"} and written["run"] == RUN
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
    broken = {"run": RUN, "model": {"good": torch.ones(1), "bad": torch.tensor([math.nan])}}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="not finite in bad"):
        maker.export_weights(tmp_path / "broken.pth", output)
    del broken["run"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(UserError, match='broken.pth has no key "run"'):
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
    held = torch.load(path, weights_only=True)
    assert set(held) == {"model", "run"}
    weights = held["model"]
    assert sum(t.numel() for t in weights.values()) == facts["parameters"]
    result = instantiate(get_config(shipped_config()).model).load_state_dict(weights)
    assert not result.missing_keys and not result.unexpected_keys


def test_the_shipped_checkpoint_tells_what_a_run_of_its_config_would():
    told = torch.load(shipped_checkpoint(), weights_only=True)["run"]
    assert told == describe_run(get_config(shipped_config()))
    assert told["classes"] == MetadataCatalog.get("shapes_train").thing_classes


def load_for_training(folder, names, caplog, *overrides):
    """The detector before a fine-tuning on objects of such classes, and the log of its weights.

    Also the detector as it is without weights.
    """
    document = make_document()
    document["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    for annotation in document["annotations"]:
        annotation["category_id"] = annotation["id"] % len(names)
    data = data_overrides(*write_dataset(folder / "data", document))
    fixed = ["train.device=cpu", f"train.output_dir='{folder / 'output'}'", *data, *overrides]
    models = []
    for weights in ("", shipped_checkpoint()):
        cfg = get_config("stageinteractor/stageinteractor_tiny_custom.py")
        cfg = prepare_config(apply_overrides(cfg, [*fixed, f"train.init_checkpoint='{weights}'"]))
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="detection_toolkit"):
            trainer.resume_or_load(resume=False)
        models.append(trainer.checkpointer.model.state_dict())
    log = [f"{r.levelname} {r.getMessage()}" for r in caplog.records]
    return models[1], models[0], [line for line in log if "weights:" not in line]


def shapes_weights():
    return torch.load(shipped_checkpoint(), weights_only=True)["model"]


ROWS = [
    f"decoder.stages.{i}.class_tower.out.{kind}" for i in range(4) for kind in ("weight", "bias")
]


def test_fine_tuning_on_other_classes_keeps_those_of_the_same_name(tmp_path, caplog):
    ours, fresh, log = load_for_training(tmp_path, ["bolt", "Star", "circle"], caplog)
    (line,) = [line for line in log if "classes" in line]
    assert line == (
        "INFO classes: 2 of 3 keep what the weights (6 classes) know of them (Star, circle); "
        "new: bolt"
    )
    weights = shapes_weights()
    for name in ROWS:
        assert torch.equal(ours[name][1:], weights[name][[3, 0]]), name
        assert torch.equal(ours[name][0], fresh[name][0]), name
    key = "decoder.stages.1.mixing.filter_generator.weight"
    assert torch.equal(ours[key], weights[key]) and not torch.equal(ours[key], fresh[key])


def test_as_many_classes_of_other_names_do_not_begin_as_the_shapes(tmp_path, caplog):
    names = ["ant", "bee", "cow", "doe", "elk", "fox"]
    ours, fresh, log = load_for_training(tmp_path / "a", names, caplog)
    (line,) = [line for line in log if "classes" in line]
    assert line == (
        "WARNING classes: 0 of 6 keep what the weights (6 classes) know of them; new: ant, bee, "
        "cow, doe, elk, fox. If classes are only renamed, train.keep_known_classes=false takes "
        "them by their order"
    )
    assert all(torch.equal(ours[name], fresh[name]) for name in ROWS)
    switch = "train.keep_known_classes=false"
    ours, _, log = load_for_training(tmp_path / "b", names, caplog, switch)
    assert all(torch.equal(ours[name], shapes_weights()[name]) for name in ROWS)
    assert not [line for line in log if "classes" in line]


def test_a_backbone_of_the_shapes_alone_says_nothing_of_classes(tmp_path, caplog):
    prefix = "train.init_prefix=backbone.bottom_up."
    _, _, log = load_for_training(tmp_path, ["cat", "dog"], caplog, prefix)
    assert not [line for line in log if "classes" in line]
