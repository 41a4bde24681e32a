from pathlib import Path

import pytest
from detectron2.config import instantiate

from detection_toolkit.config import apply_overrides, find_config_file, get_config
from detection_toolkit.training import StagewiseMatcher

CONFIG = "stageinteractor/shapes_tiny.py"


@pytest.fixture
def cfg():
    return get_config(CONFIG)


def test_configs_are_found_by_file_and_by_name():
    path = find_config_file(CONFIG)
    assert find_config_file(path) == path
    assert Path(find_config_file(f"configs/{CONFIG}")).samefile(path)


def test_a_missing_config_is_named_with_those_spelled_alike():
    with pytest.raises(FileNotFoundError, match=r"shapes_tyni\.py does not exist.*shapes_tiny\.py"):
        find_config_file("stageinteractor/shapes_tyni.py")


def test_overrides_set_values_of_every_kind(cfg):
    apply_overrides(
        cfg,
        [
            "train.max_iter=7",
            "optimizer.lr=1e-3",
            "train.amp.enabled=true",
            "train.output_dir=/data/my run/ä",
            "dataloader.train.dataset.names=[shapes_train,shapes_val]",
            "dataloader.train.dataset.json_file=null",
        ],
    )
    assert cfg.train.max_iter == 7
    assert cfg.optimizer.lr == 1e-3
    assert cfg.train.amp.enabled is True
    assert cfg.train.output_dir == "/data/my run/ä"
    assert cfg.dataloader.train.dataset.names == ["shapes_train", "shapes_val"]
    assert cfg.dataloader.train.dataset.json_file is None


def test_interpolated_values_follow_an_override(cfg):
    apply_overrides(cfg, ["model.num_classes=9"])
    assert cfg.model.decoder.num_classes == cfg.model.criterion.num_classes == 9


def test_an_argument_that_the_config_leaves_at_its_default_may_be_set(cfg):
    apply_overrides(cfg, ["model.decoder.channel_reuse_cap=1"])
    assert cfg.model.decoder.channel_reuse_cap == 1


def test_an_item_of_a_list_may_be_set(cfg):
    apply_overrides(cfg, ["dataloader.train.mapper.augmentations.0.prob=0.1"])
    assert cfg.dataloader.train.mapper.augmentations[0].prob == 0.1


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("train.max_itr=3", "train.max_iter"),
        ("optimzer.lr=3", "optimizer.lr"),
        ("model.decoder.num_stage=3", "model.decoder.num_stages"),
        ("model.decoder.chanel_reuse_cap=1", "model.decoder.channel_reuse_cap"),
        ("num_queries=3", "model.initial_queries.num_queries"),
        ("dataloader.train.mapper.augmentations.7.prob=0.1", "dataloader.train.mapper"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(cfg, override, nearest):
    with pytest.raises(KeyError) as error:
        apply_overrides(cfg, [override])
    assert override.split("=")[0] in str(error.value)
    assert nearest in str(error.value)


def test_several_keys_of_a_group_may_be_set_at_once(cfg):
    apply_overrides(cfg, ["train.amp={enabled:true,precision:bfloat16}"])
    assert cfg.train.amp == {"enabled": True, "evaluation": False, "precision": "bfloat16"}
    with pytest.raises(KeyError, match="no key 'train.amp.precison'.*train.amp.precision"):
        apply_overrides(cfg, ["train.amp={precison:float16}"])


def test_a_group_of_keys_is_not_replaced_by_a_value(cfg):
    keys = r"train.amp is a group of keys \(enabled, evaluation, precision\)"
    with pytest.raises(ValueError, match=keys):
        apply_overrides(cfg, ["train.amp=true"])
    apply_overrides(cfg, ["dataloader.evaluator=null"])
    assert cfg.dataloader.evaluator is None


def test_a_plus_adds_a_key(cfg):
    apply_overrides(cfg, ["+train.note=hello"])
    assert cfg.train.note == "hello"


def test_what_sets_nothing_is_an_error(cfg):
    with pytest.raises(ValueError, match="'train.max_iter' does not set anything"):
        apply_overrides(cfg, ["train.max_iter"])


def test_an_option_among_the_overrides_is_an_error(cfg):
    with pytest.raises(ValueError, match="'--resume': options stand before"):
        apply_overrides(cfg, ["train.max_iter=2", "--resume"])


def test_a_value_that_cannot_be_parsed_is_an_error(cfg):
    with pytest.raises(ValueError, match="cannot be understood"):
        apply_overrides(cfg, ["train.output_dir=[a"])


def test_deleting_is_refused(cfg):
    with pytest.raises(ValueError, match="only key=value"):
        apply_overrides(cfg, ["~train.max_iter=3"])


def test_what_calls_something_else_replaces_the_node_with_its_arguments(cfg):
    target = "detection_toolkit.training.StagewiseMatcher"
    assert cfg.model.criterion.label_assigner.iou_threshold == 0.5
    apply_overrides(cfg, [f"model.criterion.label_assigner={{_target_:{target}}}"])
    assert dict(cfg.model.criterion.label_assigner) == {"_target_": target}
    assert type(instantiate(cfg.model.criterion).label_assigner) is StagewiseMatcher
    apply_overrides(cfg, ["model.criterion.class_weight=3", "train.ema={decay:0.9}"])
    assert cfg.train.ema == {"enabled": True, "decay": 0.9}  # groups are merged, as before
