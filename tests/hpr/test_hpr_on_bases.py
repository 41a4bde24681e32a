"""HPR on Align-DETR and on DDQ: released tensors, sizes and beginnings, and steps of training."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from dino_models import SMALL, make_model
from loaded_configs import build_empty, empty_model, load_config
from small_runs import make_batch
from torch import Tensor, nn

from detection_toolkit.checkpoint.official import convert_official_state_dict, convert_to_official
from detection_toolkit.checkpoint.official_format import format_of_official
from detection_toolkit.config import apply_overrides, find_config_file
from hpr import HPRDDQ

DATA = Path(__file__).resolve().parents[1] / "data"
FOLDER = Path(find_config_file("hpr/hpr_ddq_r50_12e.py")).parent
FROZEN_NORMS = 53_120  # affine weights of R50's norms, which are buffers here
# Config, format of its weights, and parameters (all, trainable) of the published model.
MODELS = {
    "align_detr_r50": ("hpr_align_detr_r50_12e.py", "HPR", 140_613_372, 140_603_964),
    "ddq_r50": ("hpr_ddq_r50_12e.py", "HPR on DDQ", 143_411_128 - FROZEN_NORMS, 143_135_608),
    "align_detr_swin_l": ("hpr_align_detr_swin_l_12e.py", "HPR", 307_460_848, 307_460_848),
    "ddq_swin_l": ("hpr_ddq_swin_l_12e.py", "HPR on DDQ", 310_206_508, 310_206_508),
}
BASES = ["align_detr", "ddq"]


def official(name: str) -> dict[str, Tensor]:
    """Tensors of the released names and shapes."""
    weights = {}
    with gzip.open(DATA / f"keys_hpr_{name}.tsv.gz", "rt") as file:
        for line in file:
            if not line.startswith(("#", "name\t")):
                key, shape = line.rstrip("\n").split("\t")
                sizes = [] if shape == "scalar" else [int(x) for x in shape.split("x")]
                weights[key] = torch.empty(sizes, device="meta")
    return weights


def empty(name: str) -> nn.Module:
    return build_empty(load_config(f"hpr/{MODELS[name][0]}"))


@pytest.mark.parametrize("name", MODELS)
def test_the_released_tensors_load_and_go_back(name):
    weights, model = official(name), empty(name)
    assert format_of_official(weights).name == MODELS[name][1]
    converted = convert_official_state_dict(weights, model)
    model.load_state_dict(converted.model, strict=True, assign=True)
    back = convert_to_official(converted.model, model, extras=converted.extras)
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in weights.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_published_number_of_parameters(name):
    _, _, count, trainable = MODELS[name]
    parameters = list(empty_model(f"hpr/{MODELS[name][0]}").parameters())
    assert sum(p.numel() for p in parameters) == count
    assert sum(p.numel() for p in parameters if p.requires_grad) == trainable


def small(base: str, *overrides: str) -> nn.Module:
    own = ["model.decoder.inner_channels=4", "model.decoder.num_samples=3"]
    config = load_config(f"hpr/hpr_{base}_shapes_tiny.py")
    torch.manual_seed(0)
    return instantiate(apply_overrides(config, [*SMALL, *own, *overrides]).model)


def past_its_start(model: nn.Module) -> nn.Module:
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("counts", [(2, 1), (2, 0), (0, 0), (40, 1)])
def test_any_number_of_objects_has_the_same_losses_and_gradients(base, counts):
    model = past_its_start(small(base)).train()
    names = set(model(make_batch([2, 1])))
    losses = model(make_batch(counts))
    assert set(losses) == names and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    branches = {name.split("_", 2)[2].rpartition("_stage")[0] for name in names}
    plain = {"denoising", "dense"} if base == "ddq" else {"denoising"}
    heads = {"regional", "dynamic"}
    expected = heads | plain | {f"{head}_{x}" for head in heads for x in plain} | {"encoder"}
    assert branches - {"dense_encoder", ""} == expected


@pytest.mark.parametrize("base", BASES)
def test_auxiliary_heads_count_half(base):
    model = small(base)
    for name, criterion in model.criterion.branches.items():
        half = 0.5 if name.startswith(("regional", "dynamic")) else 1.0
        assert criterion.class_weight == half and criterion.giou_weight == 2 * half
        assert criterion.l1_weight == (0 if "dense" in name else 5 * half)
        if base == "align_detr" and name in ("regional", "dynamic"):
            assert criterion.matcher.repeats == model.criterion.matcher.repeats == [2, 1]


def test_inactive_queries_are_so_for_all_heads():
    model = past_its_start(
        small(
            "ddq",
            "model.decoder.iou_threshold=0.3",
            "model.decoder.first_keeps_all=false",
            "model.initial_queries.num_queries=12",
        )
    ).train()
    with torch.no_grad():
        model.initial_queries.head.box[-1].bias[2:] += 2  # boxes so large that some cover others
    batch = make_batch([2, 1])
    images = model.preprocess_image(batch)
    truth = model.prepare_ground_truth(batch, images.image_sizes)
    predictions = model.predict(images, truth)
    last = predictions.stages[-1]
    assert not last.active.all()
    branches = {branch.name: branch.outputs[-1] for branch in predictions.branches}
    for head in ("regional", "dynamic"):
        assert torch.equal(branches[head].active, last.active)
        assert branches[f"{head}_dense"].active.all()


def test_merge_weights_of_ddq_are_drawn_and_others_are_one():
    """As the released code does, which draws all matrices of DDQ's decoder."""
    torch.manual_seed(0)
    for base in BASES:
        config = load_config(f"hpr/hpr_{base}_shapes_tiny.py")
        weights = torch.cat(
            [
                getattr(stage, name).weights.flatten()
                for stage in instantiate(config.model).decoder.stages
                for name in ("merge_attended", "merge_refined")
            ]
        )
        if base == "align_detr":
            assert (weights == 1).all()
            continue
        bound = (6 / (64 + 3)) ** 0.5  # of 64 channels and 3 refiners
        assert weights.abs().max() <= bound
        # 1536 numbers: the standard error of the deviation is about 1 percent.
        assert weights.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(weights.mean().item()) < 0.02


@pytest.mark.parametrize("base", BASES)
def test_heads_start_as_released(base):
    """Those of one head are alike; those of an auxiliary one are of another draw but for DDQ."""
    model = small(base)
    decoder = model.decoder
    main = decoder.stages[0].head.state_dict()

    def like(head: nn.Module, other: dict[str, Tensor]) -> bool:
        return all(torch.equal(other[name], x) for name, x in head.state_dict().items())

    assert like(decoder.stages[1].head, main) and like(model.initial_queries.head, main)
    for heads in decoder.auxiliary_heads.values():
        assert like(heads[1], heads[0].state_dict())
        assert like(heads[0], main) == (base == "ddq")
    if base == "ddq":
        assert isinstance(model, HPRDDQ)
        for heads in (decoder.dense_heads, *decoder.auxiliary_dense_heads.values()):
            assert like(heads[0], main) and like(heads[1], main)


RECIPES = {
    "12e": (88_000, [80_000]),
    "24e": (176_000, [117_300, 161_300]),
    "36e": (264_000, [205_300, 249_300]),
}
RELEASED = sorted(path.name for base in BASES for path in FOLDER.glob(f"hpr_{base}_*[0-9]e.py"))


def test_all_released_recipes_are_there():
    assert len(RELEASED) == 22
    assert sum("lsj" in name for name in RELEASED) == 12
    assert sum("swin_l" in name for name in RELEASED) == 12


@pytest.mark.parametrize("name", RELEASED)
def test_the_recipe_is_the_released_one(name):
    config = load_config(f"hpr/{name}")
    steps, drops = RECIPES[name.removesuffix(".py").rpartition("_")[2]]
    if name.startswith("hpr_align_detr_r50"):  # counted in epochs of 7330 iterations
        steps, drops = round(steps / 88_000) * 12 * 7330, [11 * 7330]
        if steps > 88_000:
            drops = [16 * 7330, 22 * 7330]
    assert config.train.max_iter == steps
    is_ddq = "ddq" in name
    assert config.optimizer.lr == (2e-4 if is_ddq else 1e-4)
    assert config.optimizer.weight_decay == (0.05 if is_ddq else 1e-4)
    factor_at = instantiate(config.lr_multiplier)
    for i, drop in enumerate(drops):
        assert factor_at((drop - 1) / steps) == pytest.approx(0.1**i)
        assert factor_at((drop + 1) / steps) == pytest.approx(0.1 ** (i + 1))
    assert factor_at(0) == pytest.approx(1e-4 if is_ddq else 1)
    assert factor_at(2000 / steps) == pytest.approx(1)
    assert config.dataloader.train.dataset.filter_empty == ("lsj" not in name)
    model = config.model
    assert model.initial_queries.num_queries == (300 if is_ddq else 900)
    swin = "swin_l" in name
    assert model.backbone.get("bias", False) == (swin or not is_ddq)
    assert (list(model.decoder.roi_strides or []) == [8, 16, 32, 64]) == swin
    assert list(model.pixel_std) == [58.395, 57.12, 57.375]
    if not swin:
        assert model.backbone.bottom_up.freeze_at == (2 if is_ddq else 1)
    position = model.encoder.position_temperature, model.encoder.position_offset
    assert position == ((20, 0.0) if is_ddq else (10000, -0.5))


@pytest.mark.parametrize("base", BASES)
def test_with_merge_weights_of_the_primary_refiner_alone_it_is_the_base(base):
    """In training, too: dense and denoising queries, who is active, and losses of the base."""
    plain = past_its_start(make_model(base)).train()
    hybrid = small(base, "model.decoder.merge_start=[1,0,0]").double().train()
    found = hybrid.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("auxiliary" in x or "merge_" in x for x in found.missing_keys)
    batch, results = make_batch([2, 1]), []
    for model in (plain, hybrid):
        torch.manual_seed(1)
        results.append(model(batch))
    # The order of additions differs where nothing is added.
    for name, loss in results[0].items():
        torch.testing.assert_close(results[1][name], loss, rtol=1e-9, atol=1e-12)
    detections = [model.eval()(batch)[1]["instances"] for model in (plain, hybrid)]
    assert torch.equal(detections[0].pred_classes, detections[1].pred_classes)
    torch.testing.assert_close(detections[0].scores, detections[1].scores)
