"""Official checkpoints convert there and back, for every released model."""

from __future__ import annotations

import gzip
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from convert_checkpoint import main
from detectron2.config import instantiate
from loaded_configs import build_empty, load_config
from torch import nn

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.name_rules import merge_channel_major, merge_neighbour_major
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_backbone_state_dict,
    convert_official_state_dict,
    convert_to_official,
    is_backbone_state_dict,
    is_official_state_dict,
)
from detection_toolkit.checkpoint.official_files import (
    EXTRAS,
    CheckpointFileError,
    read_checkpoint,
    split_weights,
    write_checkpoint,
)
from detection_toolkit.config import apply_overrides

DATA = Path(__file__).resolve().parents[2] / "data"

RELEASED = {
    "keys_r50_100q": "stageinteractor/stageinteractor_r50_100q_1x.py",
    "keys_r50_300q_3x": "stageinteractor/stageinteractor_r50_300q_crop_3x.py",
    "keys_r101_300q_3x": "stageinteractor/stageinteractor_r101_300q_3x.py",
    "keys_dx101_300q_3x": "stageinteractor/stageinteractor_dx101_300q_3x.py",
    "keys_swin_s_300q_3x": "stageinteractor/stageinteractor_swin_s_300q_3x.py",
    "keys_adamixer_r50_100q": "adamixer/adamixer_r50_100q_1x.py",
    "keys_sqr_adamixer_r101_7stages": "sqr/adamixer_sqr_r101_7stages_300q_3x.py",
}


def random_checkpoint(key_list: str) -> dict[str, torch.Tensor]:
    """Random values for every tensor of a list of names, shapes and types.

    The tensors are shared between calls: to be replaced, not to be written to.
    """
    return dict(_drawn(key_list))


@lru_cache(maxsize=2)  # of which the largest has half a gigabyte
def _drawn(key_list: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(key_list))
    weights = {}
    with gzip.open(DATA / f"{key_list}.tsv.gz", "rt") as file:
        for line in file:
            if line.startswith("#"):
                continue
            name, shape, dtype, _ = line.rstrip("\n").split("\t")
            size = () if shape == "scalar" else tuple(map(int, shape.split("x")))
            if dtype == "float32":
                weights[name] = torch.randn(size, generator=generator)
            else:
                weights[name] = torch.randint(1000, size, generator=generator)
    return weights


def empty_model(config: str, *overrides: str) -> nn.Module:
    """The detector of a config, without memory for its weights."""
    return build_empty(apply_overrides(load_config(config), overrides))


def assert_same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("key_list", "config"),
    # Trained with SQR or without, AdaMixer's tensors have the same names.
    [*RELEASED.items(), ("keys_adamixer_r50_100q", "sqr/adamixer_sqr_r50_100q_1x.py")],
)
def test_every_released_checkpoint_round_trips(key_list, config):
    official = random_checkpoint(key_list)
    model = empty_model(config)
    assert is_official_state_dict(official)
    converted = convert_official_state_dict(official, model, require_unused=True)
    model.load_state_dict(converted.model, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    back = convert_to_official(model.state_dict(), model, extras=converted.extras)
    assert_same(back, official)


@pytest.fixture(scope="module")
def small():
    """A small AdaMixer: (config overrides, model, official weights)."""
    overrides = ["model.decoder.ffn_channels=64", "model.decoder.out_points=8"]
    overrides += ["model.decoder.num_stages=2", "model.initial_queries.num_queries=7"]
    config = "adamixer/adamixer_r50_100q_1x.py"
    cfg = load_config(config)
    apply_overrides(cfg, overrides)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    return [config, *overrides], model, convert_to_official(model.state_dict(), model)


def test_query_boxes_that_are_not_the_whole_image_are_warned_of(small, caplog):
    """They have no place here: detections would silently be others."""
    _, model, official = small
    convert_official_state_dict(official, model)
    assert not caplog.records
    boxes = official["rpn_head.init_proposal_bboxes.weight"].clone()
    boxes[3, 2] = 0.5
    changed = {**official, "rpn_head.init_proposal_bboxes.weight": boxes}
    convert_official_state_dict(changed, model)
    (record,) = caplog.records
    assert "init_proposal_bboxes.weight is not the whole image" in record.getMessage()


def convert(source, output, config, *options) -> int:
    arguments = [source, "--config-file", config[0], "--output", output, *options, *config[1:]]
    return main([str(x) for x in arguments])


def test_command_line_both_ways(small, tmp_path, capsys):
    config, model, official = small
    official = dict(official)
    # The unused tensor must survive although it is not what training starts from.
    official["rpn_head.init_proposal_bboxes.weight"] = torch.rand(7, 4)
    torch.save({"meta": {"epoch": np.float64(12)}, "state_dict": official}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config) == 0
    assert convert(tmp_path / "b.pth", tmp_path / "c.pth", config, "--to-official") == 0
    assert "1 without use kept for the way back" in capsys.readouterr().out
    assert_same(torch.load(tmp_path / "c.pth")["state_dict"], official)
    ours = torch.load(tmp_path / "b.pth")
    assert_same(ours["model"], model.state_dict())
    assert set(ours[EXTRAS]) == {"rpn_head.init_proposal_bboxes.weight"}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pth", "b.pth", "c.pth"]


def test_safetensors_both_ways(small, tmp_path):
    pytest.importorskip("safetensors")
    config, model, official = small
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.safetensors", config) == 0
    assert_same(read_checkpoint(tmp_path / "b.safetensors")["model"], model.state_dict())
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.pth", config, "--to-official") == 0
    assert_same(torch.load(tmp_path / "c.pth")["state_dict"], official)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install .*safetensors"):
        write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_weights_trained_here_get_the_unused_tensors_of_a_fresh_official_network():
    model = empty_model("stageinteractor/stageinteractor_r50_100q_1x.py")
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in model.state_dict().items()}
    official = convert_to_official(weights, model)
    names = random_checkpoint("keys_r50_100q")
    assert {k: v.shape for k, v in official.items()} == {k: v.shape for k, v in names.items()}
    boxes = official["rpn_head.init_proposal_bboxes"]
    assert torch.equal(boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(100, 4))
    statistics = "roi_head.bbox_head.4.iou_snyc_statistics."
    assert official[statistics + "running_var"].item() == 1
    assert official[statistics + "running_mean"].item() == 0
    assert official[statistics + "num_batches_tracked"].dtype == torch.int64
    assert not official["roi_head.bbox_head.5.dynamic_conv.subbox_score_list.3.weight"].any()


def test_frozen_batch_norms_of_detectron2_lack_only_the_counter(small):
    _, model, official = small
    lacking = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}

    class Bare(nn.Module):
        def state_dict(self):
            return lacking

    converted = convert_official_state_dict(official, Bare())
    assert set(converted.model) == set(lacking)
    assert sum(k.endswith("num_batches_tracked") for k in converted.extras) == 53
    assert_same(convert_to_official(lacking, Bare(), extras=converted.extras), official)
    assert_same(convert_to_official(lacking, Bare()), official)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("neck.gn_out.bias"), "1 missing: neck.gn_out.bias"),
        (lambda w: w.pop("roi_head.bbox_head.1.iof_tau"), "missing: roi_head.bbox_head.1.iof_tau"),
        (
            lambda w: w.pop("rpn_head.init_proposal_bboxes.weight"),
            "missing: rpn_head.init_proposal_bboxes.weight",
        ),
        (lambda w: w.update(extra=torch.ones(2)), "1 surplus: extra"),
        (
            lambda w: w.update({"roi_head.bbox_head.2.iof_tau": torch.ones(8)}),
            "surplus: roi_head.bbox_head.2.iof_tau",
        ),
        (
            lambda w: w.update({"roi_head.bbox_head.0.fc_cls.bias": torch.ones(3)}),
            r"wrong shape: roi_head.bbox_head.0.fc_cls.bias .* is \(3,\), the model has \(80,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(small, change, said, tmp_path, capsys):
    config, model, official = small
    official = dict(official)
    change(official)
    with pytest.raises(CheckpointMismatchError, match=said):
        convert_official_state_dict(official, model, require_unused=True)
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    (tmp_path / "out.pth").write_text("precious")
    assert convert(tmp_path / "a.pth", tmp_path / "out.pth", config) == 1
    assert "error: official AdaMixer weights do not fit" in capsys.readouterr().err
    assert (tmp_path / "out.pth").read_text() == "precious"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pth", "out.pth"]


def test_missing_unused_tensors_can_be_accepted(small, tmp_path):
    config, _, official = small
    official = {k: v for k, v in official.items() if "init_proposal_bboxes" not in k}
    torch.save(official, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config) == 1
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config, "--allow-missing-unused") == 0


def test_wrong_model(small, tmp_path, capsys):
    _, model, official = small
    other = empty_model("stageinteractor/stageinteractor_r50_100q_1x.py")
    with pytest.raises(CheckpointMismatchError, match="AdaMixer weights, but .* StageInteractor"):
        convert_official_state_dict(official, other)
    with pytest.raises(
        CheckpointMismatchError,
        match="no weights of AdaMixer, DDQ, DFvT, DINO, Deformable DETR, HPR, HPR on DDQ or "
        "StageInteractor",
    ):
        convert_official_state_dict({"fc.weight": torch.ones(1)}, model)
    with pytest.raises(CheckpointMismatchError, match="missing"):
        convert_to_official({"fc.weight": torch.ones(1)}, model)
    tiny = empty_model("stageinteractor/shapes_tiny.py")
    weights = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in tiny.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="no name in official StageInteractor"):
        convert_to_official(weights, tiny)
    with pytest.raises(CheckpointMismatchError, match="extras .*score.* do not belong"):
        convert_to_official(model.state_dict(), model, extras={"score": torch.ones(1)})


def test_bad_arguments(small, tmp_path, capsys):
    config, model, official = small
    torch.save({"state_dict": official}, tmp_path / "a.pth")
    assert convert(tmp_path / "none.pth", tmp_path / "b.pth", config) == 1
    assert "no such checkpoint" in capsys.readouterr().err
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", ["nowhere.py"]) == 1
    assert "nowhere.py" in capsys.readouterr().err
    assert convert(tmp_path / "a.pth", tmp_path / "b.onnx", config) == 1
    assert ".pth or .pt" in capsys.readouterr().err
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config, "--to-official") == 1
    assert "official checkpoint already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(tmp_path / "a.pth", tmp_path / "a.pth", config)
    assert [x.name for x in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(zipped, tmp_path):
    path = tmp_path / "a.pth"
    weights = {"a": torch.ones(1000)}
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 30, len(content) // 2, len(content) - 8):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointFileError, match="a.pth cannot be read: it is damaged"):
            read_checkpoint(path)
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointFileError, match="damaged"):
        read_checkpoint(path)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run_and_the_flag_is_named(tmp_path):
    path, mark = tmp_path / "a.pth", tmp_path / "mark"
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Trap(mark)}, path)
    with pytest.raises(CheckpointFileError, match="--allow-pickle"):
        read_checkpoint(path)
    assert not mark.exists()


def test_allow_pickle_opens_what_is_trusted(small, tmp_path, capsys):
    config, _, official = small
    meta = Path("work_dirs")
    torch.save({"state_dict": official, "meta": meta}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert convert(tmp_path / "a.pth", tmp_path / "b.pth", config, "--allow-pickle") == 0


@pytest.mark.parametrize("scalar", [np.float64(1.5), np.int64(3), np.float32(2), np.bool_(True)])
def test_numpy_scalars_among_the_notes_are_harmless(scalar, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": {"x": scalar}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["meta"]["x"] == scalar


def test_where_weights_are_found():
    weights = {"a": torch.ones(1)}
    for checkpoint in ({"state_dict": weights}, {"model": weights}, weights):
        assert split_weights(checkpoint, "x")[0] == weights
    wrapped = {"state_dict": {"module.a": weights["a"]}}
    assert split_weights(wrapped, "x")[0] == weights
    for checkpoint in ({"epoch": 3}, {"state_dict": {}}):
        with pytest.raises(CheckpointFileError, match="x holds no weights"):
            split_weights(checkpoint, "x")


def test_patch_merging_reads_the_same_neighbours_in_both_orders():
    channels, image = 3, torch.randn(1, 3, 2, 2, dtype=torch.float64)
    # Official: unfold; original Swin: concatenation of four strided maps.
    unfolded = nn.functional.unfold(image, 2)[0, :, 0]
    corners = [image[0, :, row, col] for row, col in ((0, 0), (1, 0), (0, 1), (1, 1))]
    concatenated = torch.cat(corners)
    weight = torch.randn(5, 4 * channels, dtype=torch.float64)
    ours = merge_neighbour_major(weight)
    torch.testing.assert_close(ours @ concatenated, weight @ unfolded)
    assert torch.equal(merge_neighbour_major(unfolded), concatenated)
    assert torch.equal(merge_channel_major(ours), weight)


def test_official_file_as_initial_checkpoint(small, tmp_path):
    config, model, official = small
    path = tmp_path / "official.pth"
    changed = {k: v + 1 for k, v in official.items()}
    torch.save({"meta": {}, "state_dict": changed}, path)
    cfg = load_config(config[0])
    apply_overrides(cfg, config[1:])
    same = instantiate(cfg.model)
    Checkpointer(same).load(str(path))
    loaded = convert_to_official(same.state_dict(), same)
    unused = "rpn_head.init_proposal_bboxes.weight"
    assert_same({**loaded, unused: changed[unused]}, changed)


def test_official_file_for_another_number_of_classes_and_queries(small, tmp_path):
    config, _, official = small
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    cfg = load_config(config[0])
    overrides = ["model.num_classes=3", "model.initial_queries.num_queries=5"]
    apply_overrides(cfg, [*config[1:3], "model.decoder.num_stages=2", *overrides])
    other = instantiate(cfg.model)
    before = other.initial_queries.content.weight.clone()
    Checkpointer(other).load(str(tmp_path / "official.pth"))
    tau = official["roi_head.bbox_head.1.iof_tau"]
    assert torch.equal(other.decoder.stages[1].attention.tau, tau)
    assert torch.equal(other.initial_queries.content.weight, before)


def test_official_file_of_another_network_as_initial_checkpoint(small, tmp_path):
    _, _, official = small
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    tiny = instantiate(load_config("stageinteractor/shapes_tiny.py").model)
    with pytest.raises(CheckpointMismatchError, match="AdaMixer"):
        Checkpointer(tiny).load(str(tmp_path / "official.pth"))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_imagenet_resnet_as_initial_checkpoint(small, tmp_path, prefix):
    """torchvision's and timm's ResNets share these names."""
    _, model, _ = small
    weights = torchvision.models.resnet50(num_classes=2).state_dict()
    saved = {prefix + name: value for name, value in weights.items()}
    assert is_backbone_state_dict(saved) and not is_official_state_dict(saved)
    torch.save(saved, tmp_path / "resnet50.pth")
    Checkpointer(model).load(str(tmp_path / "resnet50.pth"))
    backbone = model.backbone.bottom_up
    assert torch.equal(backbone.stem.conv1.weight, weights["conv1.weight"])
    block = backbone.res4[0]
    assert torch.equal(block.shortcut.weight, weights["layer3.0.downsample.0.weight"])
    assert torch.equal(block.conv2.norm.running_var, weights["layer3.0.bn2.running_var"])
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    official = torchvision.models.resnet50(num_classes=2).eval()
    official.load_state_dict(weights)
    expected = nn.Sequential(*list(official.double().children())[:-2])(image)
    torch.testing.assert_close(backbone.eval().double()(image)["res5"], expected)


def test_statistics_that_frozen_norms_make_up_are_not_the_files(small, tmp_path):
    _, model, _ = small
    weights = torchvision.models.resnet18().state_dict()
    torch.save({f"encoder.{k}": x for k, x in weights.items()}, tmp_path / "other.pth")
    with pytest.raises(CheckpointMismatchError, match="no tensor of checkpoint .* is one of the"):
        Checkpointer(model).load(str(tmp_path / "other.pth"))


def test_imagenet_weights_of_another_depth_are_refused(small):
    _, model, _ = small
    with torch.device("meta"):
        deeper = torchvision.models.resnet101().state_dict()
        shallower = torchvision.models.resnet34().state_dict()
    with pytest.raises(CheckpointMismatchError, match="surplus: layer3.6"):
        convert_backbone_state_dict(deeper, model)
    with pytest.raises(CheckpointMismatchError, match="missing: backbone.bottom_up"):
        convert_backbone_state_dict(shallower, model)


def test_imagenet_resnext_leaves_deformable_offsets_as_initialised():
    model = empty_model("stageinteractor/stageinteractor_dx101_300q_3x.py")
    with torch.device("meta"):
        # 32x4d: torchvision's class has this width for any depth.
        plain = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4
        )
    converted = convert_backbone_state_dict(plain.state_dict(), model)
    wanted = {k for k in model.state_dict() if k.startswith("backbone.bottom_up.")}
    left_out = wanted - set(converted)
    assert left_out and all(".offset." in name for name in left_out)


def test_original_swin_weights_load_as_they_are():
    model = empty_model("stageinteractor/stageinteractor_swin_s_300q_3x.py")
    prefix = "backbone.bottom_up."
    own = {k[len(prefix) :]: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    plain = {k: v for k, v in own.items() if not k.startswith("norm")}
    classifier = {"norm.weight": torch.ones(768), "head.weight": torch.ones(1000, 768)}
    mask = {"layers.0.blocks.1.attn_mask": torch.ones(64, 49, 49)}
    assert is_backbone_state_dict(plain)
    converted = convert_backbone_state_dict({**plain, **classifier, **mask}, model)
    assert set(converted) == {prefix + name for name in plain}
