"""Weights as the original repository, detrex and Hugging Face publish them."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from convert_checkpoint import main as convert_checkpoint
from deformable_detr_weights import CONFIGS, DATA, empty_model, random_checkpoint, version_3
from detectron2.config import instantiate
from torch import Tensor

from deformable_detr.checkpoint import CATEGORY_ROWS, DEFORMABLE_DETR
from detection_toolkit.checkpoint import hub as hub_module
from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.hub import local_file
from detection_toolkit.checkpoint.official import (
    CheckpointMismatchError,
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
    official_file,
)
from detection_toolkit.checkpoint.official_files import (
    CheckpointFileError,
    read_checkpoint,
    write_official,
)
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.errors import MissingPackageError, UnknownNameError

BIAS = "model.backbone.bias=true"
KIND = {"plain": "plain", "refine": "refined", "two_stage": "two-stage"}

# MMDetection 2 -> the others, in this order; written without the tables that are tested.
_HEADS = [
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    (r"^bbox_head\.reg_branches\.(\d)\.0\.", r"bbox_embed.\1.layers.0."),
    (r"^bbox_head\.reg_branches\.(\d)\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^bbox_head\.reg_branches\.(\d)\.4\.", r"bbox_embed.\1.layers.2."),
]
_INPUT = [
    (r"^neck\.extra_convs\.0\.conv\.", "input_proj.3.0."),
    (r"^neck\.extra_convs\.0\.gn\.", "input_proj.3.1."),
    (r"^neck\.convs\.(\d)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d)\.gn\.", r"input_proj.\1.1."),
]
RENAMED = {
    "detrex": [
        *_HEADS,
        (r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1."),
        (r"^backbone\.layer1\.", "backbone.res2."),
        (r"^backbone\.layer2\.", "backbone.res3."),
        (r"^backbone\.layer3\.", "backbone.res4."),
        (r"^backbone\.layer4\.", "backbone.res5."),
        (r"^(backbone\..*)\bbn(\d)\.", r"\1conv\2.norm."),
        (r"downsample\.0\.", "shortcut."),
        (r"downsample\.1\.", "shortcut.norm."),
        (r"\.gn\.", ".norm."),
        (r"^bbox_head\.", ""),
    ],
    "original": [
        *_HEADS,
        *_INPUT,
        (r"^backbone\.", "backbone.0.body."),
        (r"^bbox_head\.transformer\.", "transformer."),
        (r"^(transformer\.encoder.*)\.attentions\.0\.", r"\1.self_attn."),
        (r"^(transformer\.decoder.*)\.attentions\.0\.attn\.", r"\1.self_attn."),
        (r"^(transformer\.decoder.*)\.attentions\.1\.", r"\1.cross_attn."),
        (r"^(transformer\.encoder.*)\.norms\.0\.", r"\1.norm1."),
        (r"^(transformer\.encoder.*)\.norms\.1\.", r"\1.norm2."),
        (r"^(transformer\.decoder.*)\.norms\.0\.", r"\1.norm2."),
        (r"^(transformer\.decoder.*)\.norms\.1\.", r"\1.norm1."),
        (r"^(transformer\.decoder.*)\.norms\.2\.", r"\1.norm3."),
        (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
        (r"\.ffns\.0\.layers\.1\.", ".linear2."),
        (r"level_embeds", "level_embed"),
        (r"^bbox_head\.query_embedding\.", "query_embed."),
    ],
    # From the names of the original repository.
    "huggingface": [
        (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model."),
        (r"^input_proj\.", "model.input_proj."),
        (r"^transformer\.", "model."),
        (r"^(model\.encoder.*)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"^(model\.encoder.*)\.norm2\.", r"\1.final_layer_norm."),
        (r"^(model\.decoder.*)\.norm2\.", r"\1.self_attn_layer_norm."),
        (r"^(model\.decoder.*)\.norm1\.", r"\1.encoder_attn_layer_norm."),
        (r"^(model\.decoder.*)\.norm3\.", r"\1.final_layer_norm."),
        (r"\.cross_attn\.", ".encoder_attn."),
        (r"\.linear(\d)\.", r".fc\1."),
        (r"^query_embed\.", "model.query_position_embeddings."),
    ],
}


def renamed(name: str, source: str) -> str:
    for pattern, replacement in RENAMED[source]:
        name = re.sub(pattern, replacement, name)
    return name


def published(weights: dict[str, Tensor], variant: str, source: str) -> dict[str, Tensor]:
    """Weights of MMDetection 2, with biases of the neck, as another source has them."""
    if source == "mmdetection2":
        return dict(weights)
    if source == "mmdetection3":
        return {version_3(name): x for name, x in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    if source == "detrex":
        weights = {renamed(name, source): x for name, x in weights.items()}
        return {**weights, **aliases(weights, variant, "transformer.decoder.")}
    weights = {renamed(name, "original"): x for name, x in weights.items()}
    generator = torch.Generator().manual_seed(1)
    shared: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("class_embed."):
            continue
        if id(tensor) not in shared:
            rows = torch.randn(91, *tensor.shape[1:], generator=generator)
            rows[list(CATEGORY_ROWS) if "class_embed.6" not in name else slice(0, 80)] = tensor
            shared[id(tensor)] = rows
        weights[name] = shared[id(tensor)]
    if source == "original":
        return {**weights, **aliases(weights, variant, "transformer.decoder.")}
    found = {}
    for name, tensor in weights.items():
        name = renamed(name, source)
        if "in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                found[name.replace("in_proj_", f"{part}_proj.")] = third
        else:
            found[name] = tensor
    return {**found, **aliases(found, variant, "model.decoder.")}


def aliases(weights: dict[str, Tensor], variant: str, prefix: str) -> dict[str, Tensor]:
    """What a network lists twice: box layers where it refines, all of the heads if two-stage."""
    twice = {"plain": (), "refine": ("bbox",), "two_stage": ("bbox", "class")}[variant]
    return {prefix + n: x for n, x in weights.items() for part in twice if n.startswith(part)}


def with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    biases = {
        name.replace("conv.weight", "conv.bias"): torch.randn(256, generator=generator)
        for name in weights
        if name.startswith("neck.") and name.endswith("conv.weight")
    }
    assert len(biases) == 4
    return {**weights, **biases}


@pytest.fixture(scope="module", params=CONFIGS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def released(variant) -> dict[str, Tensor]:
    """Weights by the names of MMDetection 2, with biases of the neck."""
    return with_biases(random_checkpoint(variant))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("source", DEFORMABLE_DETR.sources)
def test_every_source_gives_the_same_weights_and_comes_back(source, variant, released):
    model = empty_model(variant, BIAS)
    expected = convert_official_state_dict(released, model).model
    assert sum(name.endswith("bias") and "projections" in name for name in expected) == 6
    official = published(released, variant, source)
    assert is_official_state_dict(official)
    converted = convert_official_state_dict(official, model, require_unused=True)
    same(converted.model, expected)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(model.state_dict(), model, extras=converted.extras, source=source)
    same(back, official)


def test_names_are_those_of_transformers(variant, released):
    with gzip.open(DATA / f"keys_deformable_detr_huggingface_{variant}.tsv.gz", "rt") as file:
        rows = [line.split() for line in file if not line.startswith("#")]
    listed = {name: tuple(map(int, shape.split("x"))) for name, shape in rows}
    model = empty_model(variant, BIAS)
    weights = convert_official_state_dict(released, model).model
    back = convert_to_official(weights, model, source="huggingface")
    assert {name: tuple(x.shape) for name, x in back.items()} == listed


def test_the_proposals_class_is_row_0_and_categories_are_the_ids_of_coco():
    assert len(CATEGORY_ROWS) == 80 and CATEGORY_ROWS[:12] == (*range(1, 12), 13)
    assert {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}.isdisjoint(CATEGORY_ROWS)
    model = empty_model("two_stage", BIAS)
    official = published(with_biases(random_checkpoint("two_stage")), "two_stage", "original")
    for t in range(7):
        layer = torch.arange(91.0)
        for begin in ("", "transformer.decoder."):
            official[f"{begin}class_embed.{t}.bias"] = layer
    weights = convert_official_state_dict(official, model).model
    proposals = weights["initial_queries.head.classes.bias"]
    assert proposals.tolist() == list(range(80))
    assert weights["decoder.stages.5.head.classes.bias"].tolist() == list(CATEGORY_ROWS)
    # Trained here, the other rows are of classes that nothing is.
    back = convert_to_official(weights, model, source="original")["class_embed.5.bias"]
    assert back[[0, 12, 45]].sigmoid().allclose(torch.full((3,), 0.01))
    assert back[list(CATEGORY_ROWS)].tolist() == list(CATEGORY_ROWS)


@pytest.mark.parametrize(("classes", "expected"), [(91, 91), (6, 80)])
def test_rows_of_categories_are_chosen_unless_all_are_wanted(classes, expected):
    model = empty_model("plain", BIAS, f"model.num_classes={classes}")
    official = published(with_biases(random_checkpoint("plain")), "plain", "huggingface")
    converted = convert_official_state_dict(official, model, allow_other_sizes=True)
    assert converted.model["decoder.stages.3.head.classes.bias"].shape == (expected,)


REFUSED: dict[str, tuple[str, Callable[[dict], object], str, tuple[str, ...]]] = {
    "kind": ("refine", lambda w: None, r"it is refined \(the model is plain\): take", ()),
    "shared heads": (
        "plain",
        lambda w: None,
        r"it is plain \(the model is refined\): take deformable_detr/deformable_detr_r50_50e.py",
        (),
    ),
    "bias": (
        "plain",
        lambda w: None,
        r"its neck has biases \(the model's lacks them\): set model.backbone.bias=true",
        ("model.backbone.bias=false",),
    ),
    "levels": (
        "plain",
        lambda w: w.update({"transformer.level_embed": torch.zeros(1, 256)}),
        r"it is for 1 levels \(the model has 4\)",
        (),
    ),
    "stages": (
        "plain",
        lambda w: None,
        r"it has 6 stages \(the model has 3\): set model.decoder.num_stages=6",
        ("model.decoder.num_stages=3",),
    ),
    "layers": (
        "plain",
        lambda w: None,
        r"it has 6 layers of the encoder \(the model has 2\)",
        ("model.encoder.num_layers=2",),
    ),
    "alias": (
        "refine",
        lambda w: w.update({"transformer.decoder.bbox_embed.2.layers.1.bias": torch.zeros(256)}),
        "transformer.decoder.bbox_embed.2.layers.1.bias and bbox_embed.2.layers.1.bias are one",
        (),
    ),
    "surplus": (
        "plain",
        lambda w: w.update({"label_enc.weight": torch.zeros(92, 256)}),
        "1 surplus: label_enc.weight",
        (),
    ),
    "missing": (
        "plain",
        lambda w: w.pop("transformer.encoder.layers.4.linear1.bias"),
        r"1 missing: transformer.encoder.layers.4.linear1.bias \(our encoder.layers.4",
        (),
    ),
}
# The config that the weights are tried with, where it is not their own.
_OTHER = {"kind": "plain", "shared heads": "refine"}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_detector_are_named(case):
    variant, change, said, overrides = REFUSED[case]
    official = published(with_biases(random_checkpoint(variant)), variant, "original")
    change(official)
    model = empty_model(_OTHER.get(case, variant), BIAS, *overrides)
    with pytest.raises(CheckpointMismatchError, match=said) as error:
        convert_official_state_dict(official, model, allow_other_sizes=True)
    assert "the original repository" in str(error.value)


def test_released_weights_lack_the_bias_that_a_model_wants():
    with pytest.raises(CheckpointMismatchError, match="neck lacks biases .*bias=false"):
        convert_official_state_dict(random_checkpoint("plain"), empty_model("plain", BIAS))


def test_another_detector_is_refused():
    official = random_checkpoint("plain")
    with torch.device("meta"):
        others = [
            instantiate(get_config(name).model)
            for name in ("adamixer/adamixer_r50_100q_1x.py", "dfvt/mask_rcnn_dfvt_tiny_1x.py")
        ]
    with pytest.raises(CheckpointMismatchError, match="Deformable DETR weights, .* is AdaMixer"):
        convert_official_state_dict(official, others[0])
    with pytest.raises(CheckpointMismatchError, match="official Deformable DETR weights, but"):
        convert_official_state_dict(official, others[1])


def test_an_unknown_source_is_named():
    model = empty_model("plain")
    weights = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    with pytest.raises(UnknownNameError, match="'detr' of .*mmdetection3, original, detrex, hug"):
        convert_to_official(weights, model, source="detr")
    with torch.device("meta"):
        other = instantiate(get_config("adamixer/adamixer_r50_100q_1x.py").model)
    with pytest.raises(UnknownNameError, match="of AdaMixer weights: there is one"):
        convert_to_official(other.state_dict(), other, source="original")


@pytest.mark.parametrize(
    ("source", "keys"),
    [("mmdetection3", {"meta", "state_dict"}), ("original", {"model"}), ("detrex", {"model"})],
)
def test_files_hold_what_their_readers_look_for(source, keys):
    model = empty_model("plain")
    weights = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    assert set(official_file(weights, model, source=source)) == keys


# A small detector, whose files are read and written.

SMALL = [
    "model.num_classes=80",
    "model.encoder.num_layers=1",
    "model.encoder.ffn_channels=16",
    "model.decoder.num_stages=2",
    "model.decoder.ffn_channels=16",
    "model.initial_queries.num_queries=9",
    "model.backbone.out_channels=32",
    "model.encoder.num_heads=4",
    "model.decoder.num_heads=4",
    BIAS,
]


def small(variant: str):
    torch.manual_seed(0)
    model = instantiate(apply_overrides(get_config(CONFIGS[variant]), SMALL).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


DESCRIPTION = {
    "model_type": "deformable_detr",
    "with_box_refine": True,
    "two_stage": False,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_n_points": 4,
    "decoder_n_points": 4,
    "position_embedding_type": "sine",
    "activation_function": "relu",
    "dilation": None,
}


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """A folder of a refined detector, as the hub has it, and the model; to be looked at only."""
    pytest.importorskip("safetensors")
    model = small("refine")
    folder = tmp_path_factory.mktemp("hub") / "refined"
    content = official_file(model.state_dict(), model, source="huggingface")
    write_official(folder / "model.safetensors", content)
    (folder / "config.json").write_text(json.dumps(DESCRIPTION))
    return folder, model


@pytest.fixture
def folder(refined, tmp_path):
    """A copy of that folder, and the model."""
    return shutil.copytree(refined[0], tmp_path / "refined"), refined[1]


def fresh(variant: str = "refine"):
    torch.manual_seed(7)
    return instantiate(apply_overrides(get_config(CONFIGS[variant]), SMALL).model)


@pytest.mark.parametrize("named", ["folder", "file", "bin", "hub"])
def test_a_model_of_the_hub_begins_a_run(named, folder, monkeypatch):
    folder, model = folder
    path = {"folder": str(folder), "file": str(folder / "model.safetensors")}.get(named, "")
    if named == "bin":
        weights = read_checkpoint(folder / "model.safetensors")["model"]
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        path = str(folder)
    if named == "hub":
        hub = pytest.importorskip("huggingface_hub")
        asked = []

        def download(model, name, revision):
            asked.append((model, name, revision))
            return str(folder / name)

        monkeypatch.setattr(hub, "hf_hub_download", download)
        monkeypatch.setattr(hub_module, "_check_is_reached", lambda *_: None)
        path = "hf://SenseTime/refined@abc"
    loaded = fresh()
    Checkpointer(loaded, strict=True).load(path)
    same(loaded.state_dict(), model.state_dict())
    if named == "hub":
        assert asked[0] == ("SenseTime/refined", "model.safetensors", "abc")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "rt_detr"}, "of a model of type rt_detr, not of deformable_detr"),
        ({"with_box_refine": False}, r"it is plain \(the model is refined\)"),
        ({"decoder_attention_heads": 8}, "decoder_attention_heads is 8, here 4"),
        ({"encoder_n_points": 2}, "encoder_n_points is 2, here 4"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is learned, here sine"),
        ({"dilation": True}, "dilation is True, here False"),
    ],
)
def test_what_the_config_of_the_hub_tells_is_heeded(changes, said, folder):
    folder, _ = folder
    (folder / "config.json").write_text(json.dumps({**DESCRIPTION, **changes}))
    with pytest.raises(CheckpointMismatchError, match=said) as error:
        Checkpointer(fresh()).load(str(folder))
    assert "\n" not in str(error.value)


def test_a_damaged_config_of_the_hub_is_named(folder):
    folder, _ = folder
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointFileError, match=r"config\.json cannot be read"):
        Checkpointer(fresh()).load(str(folder))
    (folder / "config.json").write_text("[]")  # another program's
    Checkpointer(fresh(), strict=True).load(str(folder))


def test_heads_that_are_stored_once_are_those_of_all_stages(folder):
    """transformers leaves out what is one tensor, or listed under an alias."""
    folder, model = folder
    weights = read_checkpoint(folder / "model.safetensors")["model"]
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not re.match(r"bbox_embed\.|class_embed\.[1-9]", name)
    }
    assert len(kept) == len(weights) - 2 * 6 - 2
    write_official(folder / "model.safetensors", kept)
    loaded = fresh()
    Checkpointer(loaded, strict=True).load(str(folder))
    for begin in ("decoder.stages.0.head.", "decoder.stages.1.head."):
        first = model.get_submodule("decoder.stages.0.head.classes")
        assert torch.equal(loaded.get_submodule(f"{begin}classes").weight, first.weight)
        own = model.get_submodule(f"{begin}box")
        same(loaded.get_submodule(f"{begin}box").state_dict(), own.state_dict())


def test_a_folder_without_weights_and_a_hub_out_of_reach_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointFileError, match="has neither model.safetensors nor pytorch_mod"):
        local_file(tmp_path)
    assert local_file("detectron2://a.pkl") == "detectron2://a.pkl"
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    monkeypatch.setattr(hub_module, "_check_is_reached", lambda *_: None)
    for error, said in (
        (
            errors.LocalEntryNotFoundError("no network\nat all"),
            r"LocalEntryNotFoundError: no network\)",
        ),
        (ValueError("bad name"), r"cannot be downloaded \(ValueError: bad name\)"),
        (errors.EntryNotFoundError("404"), "has no model.safetensors or pytorch_model.bin: look"),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(hub, "hf_hub_download", fail)
        with pytest.raises(CheckpointFileError, match=said) as raised:
            local_file("hf://SenseTime/deformable-detr")
        assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match="pip install .*huggingface_hub"):
        local_file("hf://SenseTime/deformable-detr")


def test_the_command_line_converts_a_folder_and_back(folder, tmp_path, capsys):
    folder, _ = folder
    config = ["--config-file", CONFIGS["refine"]]

    def run(*arguments: object) -> int:
        return convert_checkpoint([*map(str, arguments), *config, *SMALL])

    ours = tmp_path / "ours.pth"
    assert run(folder, "--output", ours) == 0
    assert "14 without use" not in capsys.readouterr().out
    back = tmp_path / "back.safetensors"
    assert run(ours, "--output", back, "--to-official", "--source", "huggingface") == 0
    before, after = (read_checkpoint(x)["model"] for x in (folder / "model.safetensors", back))
    same(after, before)
    again = tmp_path / "original.pth"
    assert run(ours, "--output", again, "--to-official", "--source", "original") == 0
    assert set(torch.load(again, weights_only=True)) == {"model"}
    capsys.readouterr()
    assert run(ours, "--output", back, "--to-official") == 1
    assert "the extras class_embed" in capsys.readouterr().err
    assert run(ours, "--output", back, "--to-official", "--source", "x") == 1
    assert "no source 'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, "--output", ours, "--source", "huggingface")
