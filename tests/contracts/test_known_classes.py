"""Every detector keeps what weights know of classes, by the classes' names."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf
from small_runs import make_batch
from tolerances import tolerance

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.class_rows import find_class_rows, keep_known_classes
from detection_toolkit.config import config_names, get_config
from detection_toolkit.engine.setup import class_number, classes_to_keep

FAMILIES = [name for name in config_names() if name.endswith("shapes_tiny.py")]
OTHERS = [
    "dfvt/mask_rcnn_dfvt_tiny_1x.py",
    "ddq/ddq_mmdet_r50_900q_12e.py",
    "deformable_detr/deformable_detr_two_stage_r50_50e.py",
    "hpr/hpr_deformable_detr_r50_12e.py",
]
NAMES = ["circle", "square", "triangle", "star", "cross", "ring"]
ORDER = [4, 2, 0, 5, 1, 3]


def config(name, num_classes):
    cfg = copy.deepcopy(get_config(name))
    key = "num_classes" if "num_classes" in cfg.model else "roi_heads.num_classes"
    OmegaConf.update(cfg.model, key, num_classes)
    assert class_number(cfg) == num_classes
    return cfg


def built(name, num_classes, seed):
    torch.manual_seed(seed)
    model = instantiate(config(name, num_classes).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_known_classes_keep_their_rows_in_all_tensors(name):
    """Shapes alone, and rows numbered by their class: no model of any size is computed."""
    before = ["bird", *NAMES[:4]]
    now = ["ring", "Star ", "square", "bolt", "bird", "nut", "circle"]
    places = [None, 4, 2, None, 0, None, 1]
    names = classes_to_keep(config(name, len(now)), now)
    old, new = names.build(len(before)), names.build(len(now))
    rows = find_class_rows(names.build, len(now))
    assert rows
    weights = {k: torch.zeros(v.shape) for k, v in old.state_dict().items() if k in rows}
    for key, row in rows.items():
        numbers = torch.arange(float(weights[key].shape[row.axis])) + 1
        shape = [1] * weights[key].dim()
        shape[row.axis] = -1
        weights[key] += numbers.view(shape)
    model = new.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(-1)
    kept = keep_known_classes(weights, before, model, names)
    nameless = 0
    for key, row in rows.items():
        nameless += not row.by_name
        source = places if row.by_name else [0, 1, 2, 3, 4, None, None]
        expected = [
            -1.0 if place is None else 1.0 + place * row.per_class + k
            for place in source
            for k in range(row.per_class)
        ]
        expected += [1.0 + row.per_class * len(before) + k for k in range(row.others)]
        seen = kept[key].movedim(row.axis, 0).flatten(1) if kept[key].dim() > 1 else kept[key]
        assert (seen[:, 0] if seen.dim() > 1 else seen).tolist() == expected, key
    assert (nameless > 0) == ("two_stage" in name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_and_every_head_is_among_them(name):
    """What has classes: as many tensors as outputs of classes, and embeddings of labels."""
    cfg = config(name, 6)
    names = classes_to_keep(cfg, NAMES)
    rows = find_class_rows(names.build, 6)
    model = names.build(6)
    stages = {key.split(".")[2] for key in rows if key.startswith("decoder.stages.")}
    assert stages == {str(t) for t in range(len(model.decoder.stages))}
    grows = {key for key, x in model.state_dict().items() if 6 in x.shape[:1]}
    assert {key for key in rows if "label_embedding" in key} == {
        key for key in grows if "label_embedding" in key
    }
    proposed = {key for key in model.state_dict() if key.startswith("initial_queries.head.classes")}
    assert proposed <= rows.keys()


def answers(model, batch, order):
    """Classes as names in a fixed order, so that models of another order can be compared."""
    with torch.no_grad():
        found = [x["instances"] for x in model.eval()(batch)]
    numbers = torch.tensor(order)
    return [(x.scores, x.pred_boxes.tensor, numbers[x.pred_classes]) for x in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_its_classes_in_another_order_finds_the_same(name, tmp_path, caplog):
    old, new = built(name, 6, seed=1).double(), built(name, 6, seed=2).double()
    state = old.state_dict()
    torch.save({"model": state, "run": {"classes": NAMES}}, tmp_path / "a.pth")
    shuffled = [NAMES[i] for i in ORDER]
    names = classes_to_keep(config(name, 6), shuffled)
    with caplog.at_level(logging.INFO, "detection_toolkit"):
        Checkpointer(new, classes=names).load(str(tmp_path / "a.pth"))
    assert "classes: all 6 are known to the weights" in caplog.text
    batch = make_batch([2, 1])
    first = answers(old, batch, range(6))
    second = answers(new, batch, ORDER)
    limits = tolerance(torch.float32, scale=96, operations=8)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a[0], b[0], **limits)
        torch.testing.assert_close(a[1], b[1], **limits)
        assert torch.equal(a[2], b[2])


def test_the_shapes_have_these_names():
    get_config("stageinteractor/shapes_tiny.py")
    assert MetadataCatalog.get("shapes_train").thing_classes == NAMES
