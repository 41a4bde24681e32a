"""The settings of a run: one place for the defaults, one check of the values."""

import dataclasses

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf
from small_runs import make_config

from detection_toolkit.config import apply_overrides, find_config_file, get_config
from detection_toolkit.engine import RunSettings, Trainer, prepare_config
from detection_toolkit.errors import UnknownNameError, UserError

CONFIG = "stageinteractor/shapes_tiny.py"
COMMON = find_config_file(CONFIG).replace(CONFIG, "common/train.py")


def test_a_config_has_the_defaults_as_plain_values():
    train = LazyConfig.load(COMMON).train
    assert OmegaConf.to_container(train) == RunSettings().as_dict()
    assert list(train) == [f.name for f in dataclasses.fields(RunSettings)]
    assert RunSettings.from_config(train) == RunSettings()


def test_what_a_config_sets_arrives(tmp_path):
    overrides = ["train.ema={enabled:true,decay:0.9}", "train.checkpointer.max_to_keep=null"]
    cfg = apply_overrides(get_config(CONFIG), [*overrides, "+train.ddp.static_graph=true"])
    for _ in range(2):
        settings = RunSettings.from_config(cfg.train)
        assert (settings.max_iter, settings.seed) == (8000, 1)
        assert (settings.ema.enabled, settings.ema.decay) == (True, 0.9)
        assert settings.checkpointer.max_to_keep is None
        assert settings.ddp == {**RunSettings().ddp, "static_graph": True}
        # The same of what a run leaves in its folder.
        LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
        cfg = LazyConfig.load(str(tmp_path / "config.yaml"))


def test_a_value_may_refer_to_another():
    cfg = apply_overrides(get_config(CONFIG), ["train.eval_period='${train.max_iter}'"])
    assert RunSettings.from_config(cfg.train).eval_period == 8000


def test_a_config_of_an_older_version_is_run_with_defaults(tmp_path):
    cfg = make_config(tmp_path, "train.max_iter=1")
    later = ("init_prefix", "deterministic", "max_skipped_steps", "allow_pickle")
    for key in (*later, "stage_evaluation", "ddp", "reference_world_size"):
        del cfg.train[key]
    del cfg.train.amp.evaluation
    settings = RunSettings.from_config(cfg.train)
    assert not settings.amp.evaluation and settings.max_skipped_steps == 20
    trainer = Trainer(prepare_config(cfg))
    trainer.resume_or_load(resume=False)
    assert "bbox" in trainer.train()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_itr": 2}, "train.max_itr is no setting .* nearest keys are train.max_iter"),
        ({"ema": {"decy": 0.9}}, "train.ema.decy is no setting .* nearest keys are train.ema.dec"),
        ({"amp": {"zzz": 1}}, "there are train.amp.enabled, train.amp.evaluation, train.amp.prec"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(given, message):
    with pytest.raises(UnknownNameError, match=message):
        RunSettings.from_config(given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_iter": 1e4}, "train.max_iter must be a whole number, got 10000.0"),
        ({"max_iter": 0}, "train.max_iter must be >= 1, got 0"),
        ({"max_iter": True}, "train.max_iter must be a whole number, got True"),
        ({"deterministic": 1}, "train.deterministic must be true or false, got 1"),
        ({"device": 0}, "train.device must be a text, got 0"),
        ({"device": "gpu"}, "train.device must be a device of PyTorch, such as cpu, .*'gpu'"),
        ({"device": "cuda:x"}, "train.device must be a device of PyTorch, .*'cuda:x'"),
        ({"output_dir": None}, "train.output_dir must be a text, got None"),
        (
            {"ema": True},
            r"train.ema is a group of keys \(enabled, decay, warmup, compare\), got True",
        ),
        ({"ddp": None}, "train.ddp must be a group of keys, got None"),
        ({"ema": {"decay": "x"}}, "train.ema.decay must be a number, got 'x'"),
        ({"ema": {"decay": 1}}, "train.ema.decay must lie between 0 and 1, got 1"),
        ({"accumulation_steps": 0}, "train.accumulation_steps must be >= 1, got 0"),
        ({"max_skipped_steps": -1}, "train.max_skipped_steps must be >= 0, got -1"),
        ({"reference_world_size": -1}, "train.reference_world_size must be >= 0, got -1"),
        ({"log_period": 0}, "train.log_period must be >= 1, got 0"),
        ({"checkpointer": {"period": 0}}, "train.checkpointer.period must be >= 1, got 0"),
        ({"checkpointer": {"max_to_keep": 0}}, "train.checkpointer.max_to_keep must be >= 1"),
        ({"clip_grad": {"max_norm": 0.0}}, "train.clip_grad.max_norm must be > 0, got 0.0"),
        ({"clip_grad": {"norm_type": 0}}, "train.clip_grad.norm_type must be > 0, got 0"),
        ({"best_checkpointer": {"mode": "most"}}, "mode must be max or min, got 'most'"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_key(given, message):
    with pytest.raises(UserError, match=message):
        RunSettings.from_config(given)


@pytest.mark.parametrize("folder", ["", "  "])
def test_an_output_folder_has_a_name(folder):
    with pytest.raises(UserError, match="train.output_dir must name a folder"):
        RunSettings(output_dir=folder)
