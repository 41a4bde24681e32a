"""The losses and labels of the authors' implementations, of the predictions that are stored."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.structures import (
    Assignment,
    Branch,
    GroundTruth,
    HeadOutput,
    Predictions,
    Queries,
)
from dino.denoising import Noise

DATA = Path(__file__).resolve().parents[1] / "data" / "dino" / "losses.npz"
CONFIGS = {"dino": "dino/dino_r50_4scale_12e.py", "dn": "dino/dn_deformable_r50_50e.py"}
TERMS = {"loss_cls": "loss_ce", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}
STAGES = 3
KINDS = ["own", "clean", "clean_keep_own"]


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA) as archive:
        found = {key: archive[key] for key in archive.files if key.startswith(f"{name}/")}
    return {key[len(name) + 1 :]: value for key, value in found.items()}


def parts(name: str, labels: str):
    """The criterion and the denoising of the released recipe, for the nine classes of the case."""
    config = json.loads(str(arrays(name)["config_json"]))
    overrides = [f"model.num_classes={config['C']}", f"model.backbone.out_channels={config['D']}"]
    if labels != "own":
        keep = str(labels == "clean_keep_own").lower()
        overrides.append(
            "model.criterion.main.label_assigner="
            f"{{_target_:stageinteractor.CrossStageMatcher,keep_own:{keep}}}"
        )
    cfg = apply_overrides(get_config(CONFIGS[name]), overrides)
    return instantiate(cfg.model.criterion), instantiate(cfg.model.denoising)


def truth_of(name: str, dtype: torch.dtype) -> GroundTruth:
    case = arrays(name)
    return GroundTruth.collate(
        [torch.from_numpy(case[f"gt/{b}/boxes"]).to(dtype) for b in range(2)],
        [torch.from_numpy(case[f"gt/{b}/labels"]) for b in range(2)],
        [tuple(map(int, size)) for size in case["in/img_shapes"]],
    )


def outputs_of(name: str, prefix: str, dtype: torch.dtype) -> list[HeadOutput]:
    case = arrays(name)
    sizes = torch.from_numpy(case["in/img_shapes"])
    logits, boxes = (
        torch.from_numpy(case[prefix + kind]).to(dtype) for kind in ("logits", "boxes")
    )
    if logits.dim() == 3:
        logits, boxes = logits[None], boxes[None]
    return [HeadOutput(x, boxes_in_pixels(y, sizes)) for x, y in zip(logits, boxes)]


def stored_noise(name: str, label_noise: float, shape, like) -> Noise:
    """The draws of the file, which has them for the objects alone, group by group."""
    case = arrays(name)
    counts = [len(case[f"gt/{b}/labels"]) for b in range(2)]
    real = (torch.arange(shape[-1]) < torch.tensor(counts)[:, None]).expand(shape)
    replace = torch.from_numpy(case["dn/random/label_u"]).to(like)
    labels = torch.zeros(len(replace), dtype=torch.long)
    labels[replace < label_noise] = torch.from_numpy(case["dn/random/label_new"])
    amount = torch.from_numpy(case["dn/random/box_u"]).to(like)
    if "dn/random/box_sign01" in case:
        sign = 2 * torch.from_numpy(case["dn/random/box_sign01"]).to(like) - 1
    else:
        amount = 2 * amount - 1
        sign, amount = amount.sign(), amount.abs()
    slots = [x.new_zeros(*shape, *x.shape[1:]) for x in (replace, labels, amount, sign)]
    for slot, x in zip(slots, (replace, labels, amount, sign)):
        slot[real] = x
    return Noise(*slots)


def result(name: str, labels: str, dtype: torch.dtype):
    criterion, denoising = parts(name, labels)
    denoising.to(dtype)
    denoising.draw = partial(stored_noise, name, denoising.label_noise)
    truth = truth_of(name, dtype)
    queries = Queries(
        torch.zeros(2, 24, 256, dtype=dtype),
        torch.zeros(2, 24, 4, dtype=dtype),
    )
    queries, index = denoising(queries, truth)
    denoised = outputs_of(name, "train/dn_", dtype)
    assert denoised[0].boxes.shape[1] == index.shape[1] == queries.content.shape[1] - 24
    branches = [Branch("denoising", denoised, Assignment(index.expand(STAGES, -1, -1)))]
    if name == "dino":
        branches.append(Branch("encoder", outputs_of(name, "infer/enc_topk_", dtype)))
    predictions = Predictions(outputs_of(name, "train/", dtype), tuple(branches))
    return criterion(predictions, truth), queries, index


def official_losses(name: str) -> dict[str, float]:
    """Under our names."""
    case, losses = arrays(name), {}
    for ours, official in TERMS.items():
        for t in range(STAGES):
            end = "" if t == STAGES - 1 else f"_{t}"
            of_noise = f"{official}_dn{end}" if name == "dino" else f"tgt_{official}{end}"
            losses[f"{ours}_stage{t}"] = case[f"train/losses/{official}{end}"]
            losses[f"{ours}_denoising_stage{t}"] = case[f"train/losses/{of_noise}"]
        if name == "dino":
            losses[f"{ours}_encoder_stage0"] = case[f"train/losses/{official}_interm"]
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_released_losses_are_met(name, labels, dtype):
    case, (losses, _, _) = arrays(name), result(name, labels, dtype)
    assert np.array_equal(losses.main.assignment.object_index, case["train/assigned_gt"])
    expected, total = official_losses(name), case["train/total_loss"]
    if labels != "own":
        targets = losses.main.class_targets.multi_hot
        assert np.array_equal(targets, case[f"cross/{labels}/labels"])
        for t in range(STAGES):
            expected[f"loss_cls_stage{t}"] = case[f"cross/{labels}/loss_ce/{t}"]
            count = losses.main.cls_normalizer[t]
            assert float(count) == pytest.approx(float(case[f"cross/{labels}/avg_factor/{t}"]))
        total = case[f"cross/{labels}/total_loss"]
    found = losses.as_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-4), key
    assert float(sum(found.values())) == pytest.approx(float(total), rel=1e-5)


def test_denoising_queries_are_those_of_the_draws():
    """Of DINO, query by query; what a network makes of them has cases of its own."""
    _, queries, index = result("dino", "own", torch.float64)
    case = arrays("dino")
    half = 4 * 25  # slots of a kind in all groups
    u, sign = case["dn/random/box_u"], 2 * case["dn/random/box_sign01"] - 1
    boxes = np.concatenate([case[f"gt/{b}/boxes"] for b in range(2)]).astype(np.float64)
    sizes = np.array([[160, 128, 160, 128]] * 4 + [[136, 112, 136, 112]] * 2)
    corners = boxes / sizes
    assert index.shape == (2, 2 * half)
    for group, kind, b, slot in ((0, 0, 0, 0), (0, 1, 1, 1), (7, 1, 0, 3), (24, 0, 1, 0)):
        one = [0, 4][b] + slot
        drawn = 6 * (2 * group + kind) + one
        sides = np.tile(corners[one, 2:] - corners[one, :2], 2)
        moved = corners[one] + sign[drawn] * (u[drawn] + kind) * sides / 2
        moved = np.clip(moved, 0, 1)
        expected = np.concatenate([(moved[:2] + moved[2:]) / 2, moved[2:] - moved[:2]])
        place = (2 * group + kind) * 4 + slot
        found = queries.geometry[b, place].numpy()
        assert np.allclose(found, np.clip(expected, 1e-3, 1 - 1e-3), atol=1e-6)
        assert index[b, place] == (-1 if kind else slot)
