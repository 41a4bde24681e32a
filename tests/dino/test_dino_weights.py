"""Names of the authors' checkpoints, of detrex's and of MMDetection's, at the released size."""

from __future__ import annotations

import gzip
import logging
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from loaded_configs import build_empty, load_config
from torch import Tensor, nn

from deformable_detr.checkpoint import CATEGORY_ROWS
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    adapt_checkpoint,
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
    official_file,
)
from detection_toolkit.config import apply_overrides

DATA = Path(__file__).resolve().parents[1] / "data"
CONFIGS = {
    "idea": "dino/dino_r50_4scale_12e.py",
    "detrex": "dino/dino_detrex_r50_4scale_12e.py",
    "mmdet": "dino/dino_mmdet_r50_4scale_12e.py",
}
IDEA_HEADS = re.compile(r"(class|bbox)_embed\.\d+\.(.*)")
REPEATED = "transformer.decoder."


def random_checkpoint(origin: str) -> dict[str, Tensor]:
    """Random values for every tensor; what stands there twice is the same.

    The tensors are shared between calls: to be replaced, not to be written to.
    """
    return dict(_drawn(origin))


@cache
def _drawn(origin: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    with gzip.open(DATA / f"keys_dino_{origin}_r50_4scale.tsv.gz", "rt") as file:
        for line in file:
            if line.startswith(("#", "name\t")):
                continue
            name, shape = line.rstrip("\n").split("\t")
            weights[name] = torch.randn([int(x) for x in shape.split("x")], generator=generator)
    for name in sorted(weights):
        original = name[len(REPEATED) :] if name.startswith(REPEATED) else name
        shared = IDEA_HEADS.fullmatch(original)
        if origin == "idea" and shared:
            original = f"{shared[1]}_embed.0.{shared[2]}"
        if original in weights:
            weights[name] = weights[original]
    return weights


def empty_model(origin: str, *overrides: str) -> nn.Module:
    return build_empty(apply_overrides(load_config(CONFIGS[origin]), overrides))


@pytest.mark.parametrize("origin", CONFIGS)
def test_checkpoints_round_trip(origin):
    official, model = random_checkpoint(origin), empty_model(origin)
    assert is_official_state_dict(official)
    converted = convert_official_state_dict(official, model)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(model.state_dict(), model, extras=converted.extras)
    assert set(back) == set(official)
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name


def test_the_authors_have_so_many_parameters():
    """Without frozen batch norms, and with the rows of 91 classes that ours are not."""
    model = empty_model("idea")
    rows = (91 - 80) * 2 * (256 + 1) + (92 - 80) * 256
    assert sum(p.numel() for p in model.parameters()) + rows == 46_893_182


def test_classes_are_those_of_coco_without_the_gaps():
    assert len(CATEGORY_ROWS) == 80
    official, model = random_checkpoint("idea"), empty_model("idea")
    converted = convert_official_state_dict(official, model)
    for ours, theirs in (
        ("decoder.stages.3.head.classes.weight", "class_embed.3.weight"),
        ("initial_queries.head.classes.bias", "transformer.enc_out_class_embed.bias"),
        ("denoising.label_embedding.weight", "label_enc.weight"),
    ):
        # Person, bicycle, and after the first gaps stop sign (13) and toothbrush (90).
        for row, category in ((0, 1), (1, 2), (11, 13), (79, 90)):
            assert torch.equal(converted.model[ours][row], official[theirs][category])


def test_without_what_was_set_aside_the_other_rows_are_zero():
    official, model = random_checkpoint("idea"), empty_model("idea")
    converted = convert_official_state_dict(official, model)
    back = convert_to_official(converted.model, model)
    assert {name: x.shape for name, x in back.items()} == {n: x.shape for n, x in official.items()}
    weight = back["class_embed.0.weight"]
    assert not weight[0].any() and torch.equal(weight[13], official["class_embed.0.weight"][13])


def test_one_head_can_become_that_of_each_stage():
    official = random_checkpoint("idea")
    model = empty_model("idea", "model.decoder.shared_head=false")
    converted = convert_official_state_dict(official, model).model
    for t in range(6):
        assert torch.equal(
            converted[f"decoder.stages.{t}.head.box.4.bias"], official["bbox_embed.0.layers.2.bias"]
        )


def test_heads_that_differ_do_not_become_one():
    official = random_checkpoint("detrex")
    model = empty_model("detrex", "model.decoder.shared_head=true")
    with pytest.raises(CheckpointMismatchError, match="shared_head=false"):
        convert_official_state_dict(official, model)


def test_what_no_weight_tells_is_asked_of_the_config(caplog):
    said = "position_temperature=20 model.encoder.position_offset=0.0"
    with pytest.raises(CheckpointMismatchError, match=said):
        convert_official_state_dict(
            random_checkpoint("idea"),
            empty_model(
                "idea",
                "model.encoder.position_temperature=10000",
                "model.encoder.position_offset=-0.5",
            ),
        )
    # There are models of MMDetection of both kinds.
    other = empty_model("mmdet", "model.encoder.position_temperature=10000")
    with caplog.at_level(logging.WARNING):
        convert_official_state_dict(random_checkpoint("mmdet"), other)
    assert "model.encoder.position_temperature=20 as a rule" in caplog.text


def test_a_repeated_tensor_with_other_numbers_is_refused():
    official = random_checkpoint("detrex")
    official["transformer.decoder.class_embed.2.bias"] = torch.zeros(80)
    with pytest.raises(CheckpointMismatchError, match="which it repeats"):
        convert_official_state_dict(official, empty_model("detrex"))


def test_weights_of_another_detector_are_refused():
    model = build_empty(load_config("deformable_detr/deformable_detr_r50_50e.py"))
    with pytest.raises(CheckpointMismatchError, match="choose a config of dino/"):
        convert_official_state_dict(random_checkpoint("idea"), model)
    official = random_checkpoint("mmdet")
    official["surplus"] = torch.zeros(1)
    del official["level_embed"]
    with pytest.raises(CheckpointMismatchError, match=r"(?s)missing: level_embed.*surplus"):
        convert_official_state_dict(official, empty_model("mmdet"))


def test_another_number_of_classes_and_queries_initialises():
    model = empty_model("idea", "model.num_classes=3", "model.initial_queries.num_queries=50")
    checkpoint = {"model": random_checkpoint("idea"), "args": None}
    weights = adapt_checkpoint(checkpoint, model, "checkpoint0011_4scale.pth")["model"]
    # Those of COCO's classes, so that they can be kept by name.
    assert weights["decoder.stages.0.head.classes.weight"].shape == (80, 256)
    assert weights["denoising.label_embedding.weight"].shape == (80, 256)
    assert weights.keys() == model.state_dict().keys()


def test_a_detector_without_denoising_does_without_its_embedding():
    model = empty_model("mmdet", "model.denoising=null", "model.criterion.denoising=null")
    official = random_checkpoint("mmdet")
    converted = convert_official_state_dict(official, model)
    assert set(converted.extras) == {"dn_query_generator.label_embedding.weight"}
    back = convert_to_official(converted.model, model, extras=converted.extras)
    assert back.keys() == official.keys()


IDEA_TO_DETREX = [
    (r"^backbone\.0\.body\.conv1\.", "backbone.stem.conv1."),
    (r"^backbone\.0\.body\.bn1\.", "backbone.stem.conv1.norm."),
    (r"^backbone\.0\.body\.layer1\.", "backbone.res2."),
    (r"^backbone\.0\.body\.layer2\.", "backbone.res3."),
    (r"^backbone\.0\.body\.layer3\.", "backbone.res4."),
    (r"^backbone\.0\.body\.layer4\.", "backbone.res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^input_proj\.(\d)\.0\.", r"neck.convs.\1.conv."),
    (r"^input_proj\.(\d)\.1\.", r"neck.convs.\1.norm."),
    (r"^neck\.convs\.3\.", "neck.extra_convs.0."),
    (r"level_embed$", "level_embeds"),
    (r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0.attn."),
    (r"(decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.1."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.norms.0."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.norms.2."),
    (r"\.linear1\.", ".ffns.0.layers.0.0."),
    (r"\.linear2\.", ".ffns.0.layers.1."),
    (r"^label_enc\.", "label_encoder."),
]


def dn_model() -> nn.Module:
    return build_empty(load_config("dino/dn_deformable_r50_50e.py"))


def dn_weights() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A model, its weights, and those under the authors' names."""
    model, generator = dn_model(), torch.Generator().manual_seed(0)
    ours = {
        name: torch.randn(x.shape, generator=generator) for name, x in model.state_dict().items()
    }
    return model, ours, convert_to_official(ours, model)


def test_weights_of_dn_deformable_detr_round_trip():
    model, ours, official = dn_weights()
    assert official["label_enc.weight"].shape == (92, 255)
    assert official["tgt_embed.weight"].shape == (300, 255)
    assert official["class_embed.5.weight"].shape == (91, 256)
    repeated = official["transformer.decoder.bbox_embed.0.layers.2.weight"]
    assert torch.equal(repeated, official["bbox_embed.0.layers.2.weight"])
    again = convert_official_state_dict(official, model).model
    assert all(torch.equal(again[name], x) for name, x in ours.items())


def test_detrex_names_the_same_tensors_of_dn_deformable_detr():
    model, ours, official = dn_weights()
    renamed = {}
    for name, tensor in official.items():
        for pattern, replacement in IDEA_TO_DETREX:
            name = re.sub(pattern, replacement, name)
        if re.fullmatch(r"class_embed\..*|label_encoder\..*", name):
            extra = [0] if name.startswith("label") else []
            tensor = tensor[[*CATEGORY_ROWS, *extra]]
        renamed[name] = tensor
    assert not any(re.search(r"norm1|self_attn|body", name) for name in renamed)
    again = convert_official_state_dict(renamed, model).model
    assert all(torch.equal(again[name], x) for name, x in ours.items())


def test_a_source_whose_model_this_is_not_is_refused():
    model, ours, _ = dn_weights()
    with pytest.raises(CheckpointMismatchError, match="mmdetection3 has no weights of DN"):
        convert_to_official(ours, model, source="mmdetection3")
    detrex = convert_to_official(ours, model, source="detrex")
    assert detrex["label_encoder.weight"].shape == (81, 255)
    again = convert_official_state_dict(detrex, model).model
    assert all(torch.equal(again[name], x) for name, x in ours.items())
    official, shared = random_checkpoint("idea"), empty_model("idea")
    converted = convert_official_state_dict(official, shared)
    with pytest.raises(CheckpointMismatchError, match="a head a stage"):
        convert_to_official(converted.model, shared, source="detrex")


@pytest.mark.parametrize(("origin", "key"), [("idea", "model"), ("mmdet", "state_dict")])
def test_files_are_as_their_code_base_writes_them(origin, key):
    official, model = random_checkpoint(origin), empty_model(origin)
    converted = convert_official_state_dict(official, model)
    content = official_file(converted.model, model, extras=converted.extras)
    assert content[key].keys() == official.keys()
