import os
from pathlib import Path

import pytest
from detectron2.config import instantiate

from detection_toolkit.config import (
    apply_overrides,
    config_names,
    config_text,
    find_config_file,
    get_config,
)
from detection_toolkit.errors import UnknownNameError, UserError
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


@pytest.mark.parametrize(
    "key, can_be_added",
    [("mine", True), ("dataloader.mine", True), ("train.mine", False), ("optimizer.mine", False)],
)
def test_plus_is_named_only_where_it_would_add_a_key(cfg, key, can_be_added):
    with pytest.raises(KeyError) as error:
        apply_overrides(cfg, [f"{key}=1"])
    assert (f"+{key}=... would add it" in str(error.value)) == can_be_added


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


@pytest.mark.parametrize(
    "override, said",
    [
        ("+model.decoder.num_stage=1", "model.decoder.num_stage: .*Decoder takes no 'num_stage'; "),
        ("+model.decoder.num_stage=1", "the nearest are num_stages, "),
        ("+optimizer.xyz=1", "optimizer.xyz: AdamW takes no 'xyz'; it takes .*betas.*weight_decay"),
        (
            "dataloader.train.mapper.augmentations.0={_target_:detectron2.data.transforms."
            "RandomFlip,probability:1}",
            "dataloader.train.mapper.augmentations.0.probability: detectron2.data.transforms."
            "RandomFlip takes no 'probability'",
        ),
    ],
)
def test_an_argument_that_a_call_does_not_take_is_named_with_the_nearest(cfg, override, said):
    with pytest.raises(UnknownNameError, match=said):
        apply_overrides(cfg, [override])


def test_arguments_of_other_versions_in_parts_that_are_left_alone_stay(cfg):
    cfg.optimizer.removed_since = 1
    apply_overrides(cfg, ["model.num_classes=9", "train.max_iter=3"])
    with pytest.raises(UnknownNameError, match="optimizer.removed_since"):
        apply_overrides(cfg, ["optimizer.lr=1"])


def test_what_cannot_be_imported_is_left_to_whoever_builds_it(cfg):
    apply_overrides(cfg, ["+extra={_target_:no_such_package.Thing,x:1}"])
    assert cfg.extra.x == 1


def test_an_argument_that_is_handed_on_may_be_added(cfg):
    apply_overrides(cfg, ["+model.anything=1"])  # a class with **kwargs
    assert cfg.model.anything == 1


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
    # Groups are merged, as before.
    assert cfg.train.ema == {"enabled": True, "decay": 0.9, "warmup": True, "compare": True}


@pytest.mark.parametrize(
    "text",
    ["2024_11_26", "true", "null_1", "1e3", "runs/a, b", "a=b", "10:30", "x'y", "a b"],
)
def test_a_text_is_taken_as_it_stands(cfg, text):
    apply_overrides(cfg, [f"train.output_dir={text}", f"train.init_checkpoint={text}"])
    assert cfg.train.output_dir == cfg.train.init_checkpoint == text
    # An argument that is declared as a text, where the config has none.
    apply_overrides(cfg, [f"dataloader.test.dataset.json_file={text}"])
    assert cfg.dataloader.test.dataset.json_file == text


def test_quotes_around_a_text_are_not_its_own(cfg):
    apply_overrides(cfg, ["train.output_dir='a, b'", 'train.init_checkpoint="1"'])
    assert (cfg.train.output_dir, cfg.train.init_checkpoint) == ("a, b", "1")


def test_a_tilde_is_the_home_folder(cfg, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    apply_overrides(cfg, ["train.output_dir=~/runs/1", "train.init_checkpoint='~/a.pth'"])
    assert cfg.train.output_dir == "/home/me/runs/1"
    assert cfg.train.init_checkpoint == "/home/me/a.pth"
    apply_overrides(cfg, ["train.output_dir=runs/~1"])
    assert cfg.train.output_dir == "runs/~1"
    apply_overrides(cfg, ["train.output_dir=~"])
    assert cfg.train.output_dir == os.path.expanduser("~")


def test_references_that_lead_nowhere_are_one_line():
    cfg = get_config("stageinteractor/shapes_tiny.py")
    with pytest.raises(UserError, match="refers to what is not there: .*oc.env:NAME"):
        apply_overrides(cfg, ["train.output_dir=${HOME}/x"])
    apply_overrides(cfg, ["train.output_dir=${train.there}/x", "+train.there=a"])
    assert cfg.train.output_dir == "a/x"


def test_a_number_with_a_comma_is_one_line():
    cfg = get_config("stageinteractor/shapes_tiny.py")
    with pytest.raises(UserError, match=r"names several values.*optimizer.lr=\[a,b\]"):
        apply_overrides(cfg, ["optimizer.lr=0,0001"])


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_the_home_folder_is_known_in_a_config_file_as_well(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = {
        ".py": [
            "train = dict(output_dir='~/runs', init_checkpoint='~/a.pth', name='a~/b', none=None)",
            "data = dict(files=['~/x.json', '${..train.name}'], root='${train.output_dir}')",
        ],
        ".yaml": [
            "train: {output_dir: ~/runs, init_checkpoint: ~/a.pth, name: a~/b, none: null}",
            "data: {files: [~/x.json, '${..train.name}'], root: '${train.output_dir}'}",
        ],
    }
    path = tmp_path / f"mine{suffix}"
    path.write_text("\n".join(lines[suffix]))
    cfg = get_config(f"~/{path.name}")
    assert cfg.train.output_dir == cfg.data.root == str(tmp_path / "runs")
    assert cfg.train.init_checkpoint == str(tmp_path / "a.pth")
    assert cfg.data.files[0] == str(tmp_path / "x.json")
    assert cfg.train.name == "a~/b" and cfg.train.none is None


def test_what_is_no_text_is_read_as_before(cfg):
    apply_overrides(
        cfg,
        [
            "train.init_checkpoint=null",
            "train.seed=1_000",
            "dataloader.train.dataset.names=[1,b]",
            "model.num_classes=7",  # which others follow by a text, an interpolation
            "model.decoder.num_classes=8",
        ],
    )
    assert cfg.train.init_checkpoint is None and cfg.train.seed == 1000
    assert cfg.dataloader.train.dataset.names == [1, "b"]
    assert (cfg.model.num_classes, cfg.model.decoder.num_classes) == (7, 8)


def test_the_names_that_are_listed_are_those_that_are_found():
    names = config_names()
    assert CONFIG in names and not any(name.startswith("common") for name in names)
    assert all(Path(find_config_file(name)).is_file() for name in names)


def test_the_text_of_a_config_is_what_loads_again(cfg, tmp_path):
    apply_overrides(cfg, ["train.output_dir=2024_11_26"])
    (tmp_path / "config.yaml").write_text(config_text(cfg))
    again = get_config(str(tmp_path / "config.yaml"))
    assert again.train == cfg.train and again.model.decoder.num_stages == 4
