"""Official checkpoints: every released name, values there and back, and what does not fit."""

from __future__ import annotations

import ast
import gzip
import re

import convert_checkpoint
import pytest
import torch
from detectron2.config import instantiate
from dfvt_cases import DATA, MINI

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.official import CheckpointMismatchError
from detection_toolkit.config import apply_overrides, get_config
from dfvt import VARIANTS, DFvTBackbone, DFvTClassifier
from dfvt.checkpoint import (
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
)


def released(variant: str, part: str) -> dict[str, torch.Tensor]:
    """All tensors of a released "cls" or "det" state dict, without values."""
    lines = gzip.decompress((DATA / f"keys_dfvt_{variant}.tsv.gz").read_bytes()).decode()
    state = {}
    for line in lines.splitlines()[3:]:
        name, shape, dtype, _, where = line.split("\t")
        if where in ("both", part):
            dtype = getattr(torch, dtype)
            state[name] = torch.empty(ast.literal_eval(shape), dtype=dtype, device="meta")
    return state


def facts(state: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {k: (tuple(v.shape), v.dtype) for k, v in state.items()}


@pytest.mark.parametrize(
    ("variant", "part", "entries"),
    [
        ("tiny", "cls", 288),
        ("small", "cls", 288),
        ("base", "cls", 437),
        ("tiny", "det", 295),
        ("small", "det", 295),
        ("base", "det", 442),
    ],
)
def test_every_released_tensor_has_its_place_there_and_back(variant, part, entries):
    official = released(variant, part)
    assert len(official) == entries
    with torch.device("meta"):
        network = DFvTClassifier if part == "cls" else DFvTBackbone
        model = network(**VARIANTS[variant])
    converted = convert_official_state_dict(official, model)
    assert facts(converted) == facts(model.state_dict())  # loads strictly
    assert facts(convert_to_official(converted, model)) == facts(official)


def test_imagenet_weights_leave_the_output_maps_alone():
    with torch.device("meta"):
        model = DFvTBackbone(**VARIANTS["small"])
    converted = convert_official_state_dict(released("small", "cls"), model)
    left = set(model.state_dict()) - set(converted)
    assert {name.split(".")[0] for name in left} == {"outputs"}
    assert len(left) == 4 * 2 + 3


@pytest.mark.parametrize("window_size", [5, 12])
def test_tables_of_relative_biases_are_resized_for_other_windows(official_classifier, window_size):
    """Bicubically, head by head, as a picture whose middle is the offset zero."""
    model = DFvTBackbone(**MINI, window_size=window_size)
    converted = convert_official_state_dict(official_classifier, model)
    same = convert_official_state_dict(official_classifier, DFvTBackbone(**MINI))
    names = [name for name in converted if name.endswith("bias_table")]
    assert len(names) == sum(MINI["depths"])
    side = 2 * window_size - 1
    for name in names:
        for head in range(converted[name].shape[1]):
            picture = same[name][:, head].reshape(1, 1, 13, 13)
            expected = torch.nn.functional.interpolate(picture, (side, side), mode="bicubic")
            torch.testing.assert_close(converted[name][:, head], expected.flatten())
    assert all(torch.equal(v, same[k]) for k, v in converted.items() if k not in names)
    model.load_state_dict({**model.state_dict(), **converted})


def test_values_survive_the_way_back(official_classifier, official_backbone, mini_classifier):
    backbone = DFvTBackbone(**MINI)
    for official, model in (
        (official_classifier, mini_classifier),
        (official_backbone, backbone),
    ):
        model.load_state_dict(convert_official_state_dict(official, model))
        back = convert_to_official(model.state_dict(), model)
        assert set(official) <= set(back)
        for name, value in official.items():
            assert torch.equal(back[name], value), name
        recomputed = {name.split(".", 4)[4] for name in set(back) - set(official)}
        assert recomputed <= {"attn.relative_position_index", "attn_mask"}


def mmdetection_heads(classes: int = 80) -> dict[str, torch.Tensor]:
    """Names and shapes of neck and heads of MMDetection 2's Mask R-CNN."""
    shapes = {}

    def layer(name: str, *shape: int):
        shapes[f"{name}.weight"] = shape
        # A deconvolution's weight has its inputs first.
        shapes[f"{name}.bias"] = (shape[1 if "upsample" in name else 0],)

    for i, channels in enumerate((96, 192, 384, 768)):
        layer(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
        layer(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    layer("rpn_head.rpn_cls", 3, 256, 1, 1)
    layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    layer("roi_head.bbox_head.fc_cls", classes + 1, 1024)
    layer("roi_head.bbox_head.fc_reg", 4 * classes, 1024)
    layer("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
    layer("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    layer("roi_head.mask_head.upsample", 256, 256, 2, 2)
    layer("roi_head.mask_head.conv_logits", classes, 256, 1, 1)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def whole_detector(classes: int = 80) -> dict[str, torch.Tensor]:
    backbone = {f"backbone.{k}": v for k, v in released("small", "det").items()}
    return {**backbone, **mmdetection_heads(classes)}


@pytest.fixture(scope="module")
def mask_rcnn() -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate(get_config("dfvt/mask_rcnn_dfvt_small_1x.py").model)


@pytest.fixture(scope="module")
def stageinteractor() -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate(
            get_config("stageinteractor/stageinteractor_dfvt_small_100q_1x.py").model
        )


def test_whole_detector_has_its_place_there_and_back(mask_rcnn):
    official = whole_detector()
    converted = convert_official_state_dict(official, mask_rcnn)
    assert facts(converted) == facts(mask_rcnn.state_dict())
    assert facts(convert_to_official(converted, mask_rcnn)) == facts(official)


def test_backbone_of_a_detector_fits_any_other(mask_rcnn, stageinteractor):
    for official in (whole_detector(), released("small", "det")):
        converted = convert_official_state_dict(official, stageinteractor)
        prefix = "backbone.bottom_up."
        wanted = {k: v for k, v in stageinteractor.state_dict().items() if k.startswith(prefix)}
        assert facts(converted) == facts(wanted)
    of_imagenet = convert_official_state_dict(released("small", "cls"), mask_rcnn)
    assert len(of_imagenet) == len(wanted) - 11
    with torch.device("meta"):
        backbone = DFvTBackbone(**VARIANTS["small"])
    assert facts(convert_official_state_dict(whole_detector(), backbone)) == facts(
        backbone.state_dict()
    )


def test_maps_that_the_model_leaves_out_are_dropped():
    with torch.device("meta"):
        backbone = DFvTBackbone(**VARIANTS["small"], out_features=["res3", "res4", "res5"])
    converted = convert_official_state_dict(released("small", "det"), backbone)
    assert facts(converted) == facts(backbone.state_dict())


def test_other_number_of_classes_is_refused_or_left_out(mask_rcnn):
    official = whole_detector(classes=3)
    with pytest.raises(CheckpointMismatchError, match=r"fc_cls.weight is \(4, 1024\)"):
        convert_official_state_dict(official, mask_rcnn)
    converted = convert_official_state_dict(official, mask_rcnn, allow_other_classes=True)
    wanted = mask_rcnn.state_dict()
    assert set(converted) == set(wanted)
    assert {k for k, v in converted.items() if v.shape != wanted[k].shape} == {
        f"roi_heads.{layer}.{part}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("other", ["tiny", "base"])
def test_another_variant_is_named(other, mask_rcnn):
    width, depths = (48, "(1, 1, 2, 1)") if other == "tiny" else (128, "(2, 2, 6, 2)")
    message = (
        f"DFvT with embed_dim {width}, depths {depths}, the model has "
        "embed_dim 96, depths (1, 1, 2, 1)"
    )
    with pytest.raises(CheckpointMismatchError, match=re.escape(message)):
        convert_official_state_dict(released(other, "cls"), mask_rcnn)


def test_missing_and_surplus_tensors_are_named(official_backbone):
    model = DFvTBackbone(**MINI)
    official = dict(official_backbone)
    del official["convlayers.2.conv1.1.bias"]
    official["layers.0.blocks.0.gamma"] = torch.ones(3)
    with pytest.raises(CheckpointMismatchError) as error:
        convert_official_state_dict(official, model)
    assert "1 missing: network.stages.2.reduce.0.norm.bias" in str(error.value)
    assert "1 surplus: layers.0.blocks.0.gamma" in str(error.value)
    assert "though both are DFvT with embed_dim 32, depths (2, 2, 2, 1)" in str(error.value)


def test_what_fits_nowhere_is_refused(official_backbone, mini_classifier):
    assert not is_official_state_dict(mini_classifier.state_dict())
    with pytest.raises(CheckpointMismatchError, match="no official DFvT weights"):
        convert_official_state_dict(mini_classifier.state_dict(), mini_classifier)
    with pytest.raises(CheckpointMismatchError, match="the model is the classifier"):
        convert_official_state_dict(official_backbone, mini_classifier)
    with pytest.raises(CheckpointMismatchError, match="a Linear, has no DFvT"):
        convert_official_state_dict(official_backbone, torch.nn.Linear(1, 1))


def test_detectors_that_the_authors_do_not_have_have_no_way_back(stageinteractor):
    with pytest.raises(CheckpointMismatchError, match="no place for"):
        convert_to_official(stageinteractor.state_dict(), stageinteractor)


MINI_CONFIG = [
    "dfvt/mask_rcnn_dfvt_tiny_1x.py",
    "model.backbone.bottom_up.embed_dim=32",
    "model.backbone.bottom_up.depths=[2,2,2,1]",
    "model.backbone.bottom_up.num_heads=[2,4,4,8]",
    "model.backbone.bottom_up.mlp_ratio=2.0",
]


def test_frozen_batch_norms_take_the_same_weights(official_backbone):
    backbone = DFvTBackbone(**MINI, norm="FrozenBN")
    backbone.load_state_dict(convert_official_state_dict(official_backbone, backbone))
    name = "network.stem.conv1.norm.running_var"
    assert torch.equal(
        backbone.state_dict()[name], official_backbone["patch_embed.norm1.running_var"]
    )


def test_official_file_is_an_initial_checkpoint(tmp_path, official_classifier):
    torch.save({"model": official_classifier, "epoch": 299}, tmp_path / "imagenet.pth")
    backbone = torch.nn.Module()
    backbone.bottom_up = DFvTBackbone(**MINI)
    model = torch.nn.Module()
    model.backbone = backbone
    Checkpointer(model).load(str(tmp_path / "imagenet.pth"))
    loaded = convert_to_official(backbone.bottom_up.state_dict(), backbone.bottom_up)
    for name, value in official_classifier.items():
        if name in loaded:
            assert torch.equal(loaded[name], value), name

    backbone.bottom_up = DFvTBackbone(**{**MINI, "embed_dim": 48, "num_heads": (3, 3, 3, 3)})
    with pytest.raises(CheckpointMismatchError, match=r"embed_dim 32, .* has embed_dim 48"):
        Checkpointer(model).load(str(tmp_path / "imagenet.pth"))


class Detector(torch.nn.Module):
    """With a DFvT where detectors have it, and a class layer."""

    def __init__(self, num_classes=3, **changes):
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.bottom_up = DFvTBackbone(**{**MINI, **changes})
        self.classes = torch.nn.Linear(2, num_classes)


def test_converted_or_trained_weights_of_another_variant_are_refused(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"model": Detector().state_dict()}, path)
    Checkpointer(Detector(num_classes=5)).load(path)  # other classes are left out, as ever

    narrow, deep = {"embed_dim": 16, "num_heads": (2, 2, 2, 2)}, {"depths": (1, 2, 2, 1)}
    with pytest.raises(
        CheckpointMismatchError,
        match=r"embed_dim 32, depths \(2, 2, 2, 1\), the model has embed_dim 16, "
        r"depths \(2, 2, 2, 1\); for example backbone.bottom_up.network.stem.conv1.weight",
    ):
        Checkpointer(Detector(**narrow)).load(path)
    with pytest.raises(CheckpointMismatchError, match=r"the model has embed_dim 32, depths \(1, 2"):
        Checkpointer(Detector(**deep)).load(path)
    Checkpointer(Detector(**narrow), init_prefix="classes.").load(path)

    with pytest.raises(CheckpointMismatchError, match="the model has embed_dim 16"):
        convert_to_official(DFvTBackbone(**MINI).state_dict(), DFvTBackbone(**{**MINI, **narrow}))
    with pytest.raises(CheckpointMismatchError, match=r"the model has .* depths \(1, 2, 2, 1\)"):
        convert_to_official(DFvTBackbone(**MINI).state_dict(), DFvTBackbone(**{**MINI, **deep}))


def test_weights_without_the_detector_are_refused_by_it(tmp_path, mini_classifier):
    torch.save({"model": mini_classifier.state_dict()}, tmp_path / "classifier.pth")
    with pytest.raises(CheckpointMismatchError, match="DFvT by itself.*backbone.bottom_up.network"):
        Checkpointer(Detector()).load(str(tmp_path / "classifier.pth"))
    Checkpointer(mini_classifier).load(str(tmp_path / "classifier.pth"))


def test_command_line_makes_an_initial_checkpoint(tmp_path, official_classifier, capsys):
    torch.save({"model": official_classifier, "epoch": 299}, tmp_path / "imagenet.pth")
    config, *overrides = MINI_CONFIG
    arguments = ["--config-file", config, *overrides, "--output", str(tmp_path / "ours.pth")]
    assert convert_checkpoint.main([str(tmp_path / "imagenet.pth"), *arguments]) == 0
    assert "more tensors of the model are not among them" in capsys.readouterr().out
    weights = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    with torch.device("meta"):
        model = instantiate(apply_overrides(get_config(config), overrides).model)
    incompatible = model.load_state_dict(weights, strict=False, assign=True)
    assert not incompatible.unexpected_keys
    missing = {name for name in incompatible.missing_keys if "bottom_up" in name}
    assert missing and all(".outputs." in name for name in missing)


def test_command_line_goes_both_ways(tmp_path):
    official = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in released("tiny", "cls").items()}
    generator = torch.Generator().manual_seed(0)
    for value in official.values():
        if value.is_floating_point():
            value.normal_(generator=generator)
    with torch.device("meta"):
        model = DFvTClassifier(**VARIANTS["tiny"])
    # The tables are what they are computed to be.
    recomputed = convert_to_official(convert_official_state_dict(official, model), model)
    official.update({k: v for k, v in recomputed.items() if "relative_position_index" in k})
    torch.save({"model": official}, tmp_path / "official.pth")
    run = convert_checkpoint.main
    there = [str(tmp_path / "official.pth"), "--output", str(tmp_path / "ours.pth")]
    back = [str(tmp_path / "ours.pth"), "--output", str(tmp_path / "back.pth"), "--to-official"]
    assert run([*there, "--config-file", "dfvt/classifier_tiny.py"]) == 0
    assert run([*back, "--config-file", "dfvt/classifier_tiny.py"]) == 0
    assert run([*back, "--config-file", "dfvt/classifier_small.py"]) == 1
    result = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert set(result) == set(official)
    assert all(torch.equal(result[k], official[k]) for k in official)


def test_command_line_reports_another_variant_and_writes_nothing(
    tmp_path, official_classifier, capsys
):
    torch.save({"model": official_classifier}, tmp_path / "imagenet.pth")
    arguments = ["--config-file", MINI_CONFIG[0], "--output", str(tmp_path / "ours.pth")]
    assert convert_checkpoint.main([str(tmp_path / "imagenet.pth"), *arguments]) == 1
    error = capsys.readouterr().err
    assert "embed_dim 32, depths (2, 2, 2, 1)" in error and "embed_dim 48" in error
    assert not (tmp_path / "ours.pth").exists()
