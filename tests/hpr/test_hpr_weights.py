"""Names of the authors' checkpoints, at the released size, and starting from a plain DINO."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from dino_models import make_model as make_dino
from hpr_models import make_model, small_config
from small_runs import make_batch
from torch import Tensor, nn

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    adapt_checkpoint,
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
    official_file,
)
from detection_toolkit.checkpoint.official_format import format_of_official
from detection_toolkit.config import get_config

DATA = Path(__file__).resolve().parents[1] / "data"
# Config, and parameters of the published model. Affine weights of frozen batch norms are
# parameters there and buffers here.
MODELS = {
    "dino_r50": ("hpr/hpr_dino_r50_12e.py", 140_665_468),
    "deformable_detr_r50": ("hpr/hpr_deformable_detr_r50_12e.py", 140_644_988),
    "dino_swin_l": ("hpr/hpr_dino_swin_l_12e.py", 307_460_848),
}
FROZEN_NORMS = 53_120
LAYER = {
    "auxiliary.dynamic.look": 11_634_048,
    "auxiliary.regional.look": 920_576,
    "attention": 230_272,
    "self_attention.attention": 263_168,
    "auxiliary.dynamic.self_attention.attention": 263_168,
    "merge_attended": 768,
    "merge_refined": 768,
}


def official(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """Random values for every tensor."""
    generator = torch.Generator().manual_seed(0) if device == "cpu" else None
    weights = {}
    with gzip.open(DATA / f"keys_hpr_{name}.tsv.gz", "rt") as file:
        for line in list(file)[1:]:
            key, shape = line.rstrip("\n").split("\t")
            sizes = [] if shape == "scalar" else [int(x) for x in shape.split("x")]
            weights[key] = torch.rand(sizes, generator=generator, device=device)
    return weights


def empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return instantiate(get_config(MODELS[name][0]).model)


@pytest.mark.parametrize("name", MODELS)
def test_the_published_tensors_load_and_go_back(name):
    weights, model = official(name, "meta"), empty(name)
    assert is_official_state_dict(weights) and format_of_official(weights).name == "HPR"
    converted = convert_official_state_dict(weights, model)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(converted.model, model, extras=converted.extras)
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in weights.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_published_number_of_parameters(name):
    model, published = empty(name), MODELS[name][1]
    frozen = 0 if "swin" in name else FROZEN_NORMS
    assert sum(p.numel() for p in model.parameters()) + frozen == published
    stage = model.decoder.stages[0]
    heads = sum(p.numel() for p in stage.head.parameters())
    assert sum(p.numel() for p in stage.parameters()) - heads == 16_733_184
    for part, count in LAYER.items():
        assert sum(p.numel() for p in stage.get_submodule(part).parameters()) == count, part


class Hidden(nn.Module):
    """A backbone whose tensors nobody sees: those of a plain one have no official names."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.__dict__["backbone"] = backbone
        self.size_divisibility = backbone.size_divisibility

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.backbone(image)


def named(detector: nn.Module) -> nn.Module:
    """A small detector of which all tensors have official names."""
    detector.backbone.bottom_up = Hidden(detector.backbone.bottom_up)
    return detector


def small_weights(detector: nn.Module) -> dict[str, Tensor]:
    return convert_to_official(detector.state_dict(), detector)


def test_values_go_both_ways():
    detector = named(make_model())
    weights = small_weights(detector)
    filters = weights["decoder.layers.1.dy_conv.dynamic_layer.weight"]
    stage = detector.decoder.stages[1]
    assert torch.equal(filters, stage.auxiliary["dynamic"].look.filters.weight)
    norm = weights["decoder.norm_aux.0.bias"]
    assert torch.equal(norm, detector.decoder.auxiliary_norms["regional"].bias)
    box = weights["bbox_head_aux.1.reg_branches.0.4.bias"]
    assert torch.equal(box, detector.decoder.auxiliary_heads["dynamic"][0].box[4].bias)
    again = convert_official_state_dict(weights, detector).model
    assert all(torch.equal(again[k], x) for k, x in detector.state_dict().items())
    content = official_file(detector.state_dict(), detector)
    assert content["state_dict"].keys() == weights.keys()


def test_from_a_plain_dino_of_mmdetection_it_starts_as_that_dino():
    std = small_config().pixel_std
    same = ["model.decoder.prediction_eps=1e-5", "model.backbone.bias=false"]
    dino = named(make_dino("dino", *same, f"model.pixel_std={std}"))
    weights = convert_to_official(dino.state_dict(), dino, source="mmdetection3")
    assert format_of_official(weights).name == "DINO"
    detector = make_model("model.decoder.merge_start=[1,0,0]", "model.decoder.merge=fixed")
    detector.backbone.bottom_up = dino.backbone.bottom_up
    content = adapt_checkpoint({"state_dict": weights}, detector, "dino.pth")["model"]
    missing, surplus = detector.load_state_dict(content, strict=False)
    assert not surplus and all(name.startswith("decoder.") for name in missing)
    assert {name.split(".")[1] for name in missing} == {
        "stages",
        "auxiliary_norms",
        "auxiliary_heads",
    }
    batch = make_batch([1, 1])
    for one, other in zip(dino.eval()(batch), detector.eval()(batch), strict=True):
        one, other = one["instances"], other["instances"]
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


def test_a_plain_dino_is_no_whole_hpr_where_a_model_is_only_read(tmp_path):
    same = ["model.decoder.prediction_eps=1e-5", "model.backbone.bias=false"]
    dino = named(make_dino("dino", *same, f"model.pixel_std={small_config().pixel_std}"))
    weights = convert_to_official(dino.state_dict(), dino, source="mmdetection3")
    torch.save({"state_dict": weights}, tmp_path / "dino.pth")
    detector = named(make_model("model.decoder.merge_start=[1,0,0]"))
    with pytest.raises(CheckpointMismatchError, match="auxiliary"):
        Checkpointer(detector, strict=True).load(str(tmp_path / "dino.pth"))


def test_weights_that_lack_a_tensor_or_have_another_are_refused():
    detector = named(make_model())
    weights = small_weights(detector)
    del weights["decoder.layers.0.merger_FFN.weights"]
    weights["surplus"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatchError, match=r"(?s)merger_FFN.*surplus"):
        convert_official_state_dict(weights, detector)


def test_weights_for_another_detector_are_refused():
    detector = named(make_model())
    weights = small_weights(detector)
    with pytest.raises(CheckpointMismatchError):
        convert_official_state_dict(weights, named(make_dino("dino")))
    deformable = instantiate(get_config("deformable_detr/deformable_detr_shapes_tiny.py").model)
    with pytest.raises(CheckpointMismatchError, match="choose a config of hpr/"):
        convert_official_state_dict(weights, deformable)
