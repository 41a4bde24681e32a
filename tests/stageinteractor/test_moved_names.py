"""config.yaml of older runs names things where they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from omegaconf import OmegaConf

import detection_toolkit.config as config_module
import stageinteractor
from detection_toolkit.config import get_config, register_moved_names
from detection_toolkit.data import DetectionMapper
from stageinteractor.moved_names import MOVED_NAMES

OLDER_RUN = Path(__file__).parents[1] / "data" / "older_run" / "config.yaml"

# All that could be named in a config, as packages and modules gave it out.
PUBLIC_THEN = {
    "data": "DetectionMapper EvaluationLoader SkipUnreadable build_test_loader build_train_loader "
    "get_detection_dataset",
    "data.transforms": "OpenCVResizeShortestEdge",
    "evaluation": "AllStages StageEvaluator",
    "modeling": "CascadeDecoder CascadeDynamicMixing DecoderStage Execution FactoredDynamicMixing "
    "FilterBank FrozenStatsBatchNorm2d InitialQueries IoFBiasedSelfAttention PlainConvNet "
    "SharedNormChannelMapper StageInteractor StageInteractorDecoder SubBoxSampling",
    "modeling.attention": "IoFBiasedSelfAttention",
    "modeling.backbone": "FrozenStatsBatchNorm2d PlainConvNet",
    "modeling.backbones": "DeformBottleneckBlock EfficientNetLite0 SwinBackbone TimmBackbone",
    "modeling.decoder": "CascadeDecoder StageInteractorDecoder",
    "modeling.detector": "StageInteractor",
    "modeling.sampling": "SubBoxSampling",
    "modeling.stage": "DecoderStage FeedForward",
    "training": "Criterion CrossStageMatcher HungarianMatcher StagewiseMatcher",
    "training.cross_stage_matcher": "CrossStageMatcher StagewiseMatcher",
    "training.param_groups": "params_with_decay_exceptions",
}


def targets(cfg) -> list[str]:
    """Every target of a config, as text, in the order of its keys."""
    if isinstance(cfg, dict):
        own = [cfg["_target_"]] if "_target_" in cfg else []
        return own + [t for key in sorted(cfg) for t in targets(cfg[key])]
    if isinstance(cfg, list):
        return [t for item in cfg for t in targets(item)]
    return []


def test_config_of_an_older_run_is_that_of_today(tmp_path):
    assert "_target_: stageinteractor.modeling.StageInteractor" in OLDER_RUN.read_text()
    cfg = get_config("stageinteractor/shapes_tiny.py")
    del cfg.dataloader.stage_evaluator  # which older runs do not have
    # Older runs name Detectron2's evaluator, which still works.
    cfg.dataloader.evaluator._target_ = "detectron2.evaluation.COCOEvaluator"
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    today, older = (
        targets(OmegaConf.to_container(get_config(str(path)), resolve=False))
        for path in (tmp_path / "config.yaml", OLDER_RUN)
    )
    assert older == today and len(older) > 20


def test_model_of_an_older_run_is_built():
    cfg = get_config(str(OLDER_RUN))
    with torch.device("meta"):
        model = instantiate(cfg.model)
        expected = instantiate(get_config("stageinteractor/shapes_tiny.py").model)
    assert type(model) is stageinteractor.StageInteractor
    assert list(model.state_dict()) == list(expected.state_dict())
    assert isinstance(instantiate(cfg.dataloader.test.mapper), DetectionMapper)
    assert cfg.model.max_detections == 20  # an interpolation is still one


@pytest.mark.parametrize("package", PUBLIC_THEN)
def test_everything_that_could_be_named_is_found(package, tmp_path):
    for name in PUBLIC_THEN[package].split():
        file = tmp_path / "config.yaml"
        file.write_text(f"part: [{{_target_: stageinteractor.{package}.{name}}}]\n")
        (part,) = get_config(str(file), trust_config=True).part
        assert locate(part._target_).__name__ == name


def test_the_package_of_a_target_brings_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "_MOVED_NAMES", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_method_that_moved.py").write_text(
        "from detection_toolkit.config import register_moved_names\n"
        "register_moved_names({'a_method_that_moved.old': 'collections'})\n"
    )
    (tmp_path / "config.yaml").write_text("_target_: a_method_that_moved.old.OrderedDict\n")
    cfg = get_config(str(tmp_path / "config.yaml"), trust_config=True)
    assert cfg._target_ == "collections.OrderedDict"


def test_what_has_not_moved_is_left_alone(tmp_path):
    text = "a: {_target_: stageinteractor.database.Thing}\nb: {_target_: torch.nn.NoSuchThing}\n"
    (tmp_path / "config.yaml").write_text(text + "c: stageinteractor.data\nd: null\ne: ???\n")
    cfg = get_config(str(tmp_path / "config.yaml"))
    assert cfg.a._target_ == "stageinteractor.database.Thing"
    assert cfg.b._target_ == "torch.nn.NoSuchThing"
    assert cfg.c == "stageinteractor.data" and cfg.d is None


def test_the_table_is_of_this_package_alone():
    assert all(name.startswith("stageinteractor.") for name in MOVED_NAMES)
    before = dict(config_module._MOVED_NAMES)
    register_moved_names(MOVED_NAMES)
    assert config_module._MOVED_NAMES == before
