"""The configs: recipe, weight decay, masks, and a short run with an evaluation."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.structures import PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from dfvt_cases import DATA

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.engine import Trainer
from dfvt import VARIANTS, DFvTBackbone, get_instance_segmentation_dataset
from dfvt.checkpoint import convert_to_official
from dfvt.data import PolygonCropTransform, RandomPolygonCrop

# Parameters of the detector; tensors and numbers in them that are not decayed. As published.
SIZES = {
    "tiny": (23_769_651, 43, 15_537),
    "small": (31_118_805, 43, 21_441),
    "base": (57_392_840, 78, 60_664),
}
STAGEINTERACTOR = "stageinteractor/stageinteractor_dfvt_small_100q_1x.py"


def config(variant: str):
    return get_config(f"dfvt/mask_rcnn_dfvt_{variant}_1x.py")


def build(cfg):
    with torch.device("meta"):
        model = instantiate(cfg.model)
    return model, Trainer.build_optimizer(cfg, model)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_detector_and_decay_are_the_published_ones(variant):
    cfg = config(variant)
    model, optimizer = build(cfg)
    parameters, spared_tensors, spared_numbers = SIZES[variant]
    assert sum(p.numel() for p in model.parameters()) == parameters
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert len(spared["params"]) == spared_tensors
    assert sum(p.numel() for p in spared["params"]) == spared_numbers
    assert len(decayed["params"]) + spared_tensors == len(list(model.parameters()))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4}
    assert optimizer.defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", ["dfvt/mask_rcnn_dfvt_base_1x.py", STAGEINTERACTOR])
def test_decay_is_spared_by_the_authors_names(name):
    model, optimizer = build(get_config(name))
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    backbone = model.backbone.bottom_up
    found = convert_to_official(dict(backbone.named_parameters()), backbone)
    found = {k for k, p in found.items() if id(p) in spared}
    variant = "base" if "base" in name else "small"
    lines = gzip.decompress((DATA / f"keys_dfvt_{variant}.tsv.gz").read_bytes()).decode()
    fields = [line.split("\t") for line in lines.splitlines()[3:]]
    expected = {
        name
        for name, _, _, kind, where in fields
        if kind == "param"
        and where in ("both", "det")
        and ("norm" in name or "relative_position_bias_table" in name)
    }
    assert found == expected
    assert len(spared) == len(expected)  # nothing outside of the backbone


def test_recipe():
    cfg = config("small")
    schedule = instantiate(cfg.lr_multiplier)
    epoch = 7330 / 87960
    assert cfg.train.max_iter == 87960
    assert math.isclose(schedule(0.0), 0.001)
    assert math.isclose(schedule(501 / 87960), 1.0)
    rates = [schedule(epoch * e + 1e-6) for e in (1, 7.99, 8, 10.99, 11, 11.99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert not cfg.train.clip_grad.enabled
    assert cfg.dataloader.train.total_batch_size == 16
    assert cfg.model.input_format == cfg.dataloader.test.mapper.image_format == "RGB"
    assert cfg.model.backbone.bottom_up.drop_path_rate == 0.1
    assert cfg.dataloader.train.mapper.use_instance_mask
    model, _ = build(cfg)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2 + 4 * 5 + 3 * 2
    assert all(type(m) is torch.nn.BatchNorm2d and m.weight.requires_grad for m in norms)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_soft_nms_is_one_switch_and_on_for_base(variant):
    cfg = config(variant)

    def switches():
        node = cfg.model
        return node.roi_heads.box_predictor.soft_nms, node.proposal_generator.soft_nms

    assert switches() == ((variant == "base"),) * 2
    apply_overrides(cfg, [f"model.roi_heads.box_predictor.soft_nms={variant != 'base'}"])
    assert switches() == ((variant != "base"),) * 2


@pytest.mark.parametrize("name", ["dfvt/mask_rcnn_dfvt_base_1x.py", STAGEINTERACTOR])
def test_config_has_no_keys_without_effect(name):
    keys = {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    assert set(get_config(name)) == keys


def test_stageinteractor_takes_the_backbone():
    model, _ = build(get_config(STAGEINTERACTOR))
    assert isinstance(model.backbone.bottom_up, DFvTBackbone)
    assert model.backbone.size_divisibility == 32


def with_masks(**kwargs):
    document = make_document(**kwargs)
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return document


RUN_LENGTHS = {"size": [64, 96], "counts": [0, 64 * 96]}


def test_masks_are_required(tmp_path):
    document = with_masks()
    json_file, image_root = write_dataset(tmp_path / "whole", document)
    dicts = get_instance_segmentation_dataset(
        json_file=json_file, image_root=image_root, require_polygons=True
    )
    assert len(dicts) == 4

    for annotation in document["annotations"][3:5]:
        del annotation["segmentation"]
    json_file, image_root = write_dataset(tmp_path / "missing", document)
    with pytest.raises(ValueError) as error:
        get_instance_segmentation_dataset(json_file=json_file, image_root=image_root)
    message = str(error.value)
    assert f"{json_file}: 2 objects have no mask" in message
    assert "in image 2 (" in message and "2.png" in message and "box [14.0, 11.0" in message


def test_run_lengths_are_no_polygons_but_crowds_may_have_them(tmp_path):
    document = with_masks()
    document["annotations"][0].update(segmentation=RUN_LENGTHS, iscrowd=1)
    json_file, image_root = write_dataset(tmp_path / "crowd", document)
    arguments = dict(json_file=json_file, image_root=image_root, require_polygons=True)
    assert len(get_instance_segmentation_dataset(**arguments)) == 4

    document["annotations"][1]["segmentation"] = RUN_LENGTHS
    json_file, image_root = write_dataset(tmp_path / "object", document)
    arguments = dict(json_file=json_file, image_root=image_root)
    assert len(get_instance_segmentation_dataset(**arguments)) == 4
    with pytest.raises(ValueError, match="1 objects have a mask in run lengths.*format=bitmask"):
        get_instance_segmentation_dataset(**arguments, require_polygons=True)


def test_crop_moves_polygons_and_the_mask_within_the_box_is_the_same():
    # A triangle of which the crop takes a part.
    triangle = np.array([[10.0, 5.0], [70.0, 30.0], [20.0, 58.0]])
    whole = polygons_to_bitmask([triangle.flatten()], 64, 96).astype(np.uint8)
    crop = PolygonCropTransform(25, 12, 40, 30)
    (moved,) = crop.apply_polygons([triangle.copy()])
    box = crop.apply_box(np.array([[10.0, 5.0, 70.0, 58.0]])).clip(0, [40, 30, 40, 30])
    assert box.tolist() == [[0, 0, 40, 30]]
    masks = PolygonMasks([[moved.flatten()]])
    in_box = masks.crop_and_resize(torch.tensor(box, dtype=torch.float32), 120)[0]
    exact = np.kron(crop.apply_segmentation(whole), np.ones((4, 3)))
    assert (in_box.numpy() != exact).mean() < 0.03
    image = np.zeros((64, 96, 3), np.uint8)
    random = RandomPolygonCrop("absolute_range", [20, 40]).get_transform(image)
    assert isinstance(random, PolygonCropTransform)
    assert 20 <= random.w <= 40 and 20 <= random.h <= 40


def small_run(folder, document, variant, *overrides):
    """A config of the smallest size, for images of 64x96 pixels."""
    json_file, image_root = write_dataset(folder / "data", document)
    sides = [
        f"dataloader.train.mapper.augmentations.{place}.short_edge_length=[64]"
        for place in ("1.tfm_or_aug.augs.0", "2")
    ]
    return apply_overrides(
        config(variant),
        [
            *(
                f"dataloader.{part}.{key}"
                for part in ("train", "test")
                for key in (
                    f"dataset.json_file='{json_file}'",
                    f"dataset.image_root='{image_root}'",
                    "num_workers=0",
                )
            ),
            *sides,
            "dataloader.train.mapper.augmentations.1.tfm_or_aug.augs.1.crop_size=[40,60]",
            "dataloader.test.mapper.augmentations.0.short_edge_length=64",
            "dataloader.train.total_batch_size=2",
            "model.backbone.bottom_up.embed_dim=32",
            "model.backbone.bottom_up.depths=[1,1,2,1]",
            "model.backbone.bottom_up.num_heads=[2,2,2,2]",
            "model.roi_heads.num_classes=3",
            "model.backbone.out_channels=32",
            "model.proposal_generator.head.in_channels=32",
            "model.roi_heads.box_head.input_shape.channels=32",
            "model.roi_heads.box_head.fc_dims=[32]",
            "model.roi_heads.box_predictor.input_shape.channels=32",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",
            "model.roi_heads.mask_head.input_shape.channels=32",
            "model.roi_heads.mask_head.conv_dims=[32,32]",
            "train.device=cpu",
            "train.amp.enabled=false",
            "train.seed=1",
            f"train.output_dir='{folder / 'output'}'",
            "train.max_iter=2",
            "train.eval_period=2",
            "train.checkpointer.period=2",
            *overrides,
        ],
    )


@pytest.mark.parametrize("variant", ["tiny", "base"])
def test_trains_and_evaluates_boxes_and_masks(variant, tmp_path):
    # tiny with plain NMS, base with soft-NMS.
    cfg = small_run(tmp_path, with_masks(num_images=2), variant)
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    results = trainer.train()
    assert set(results) == {"bbox", "segm"}
    assert all(math.isfinite(results[task]["AP"]) for task in results)
    after = trainer.model.state_dict()
    frozen = [k for k in before if torch.equal(before[k], after[k]) and "anchor" not in k]
    assert frozen == []
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    losses = {k for line in lines for k in json.loads(line) if k.startswith("loss_")}
    assert losses == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}


def test_training_without_masks_is_refused_before_it_starts(tmp_path):
    cfg = small_run(tmp_path, make_document(num_images=2), "tiny")
    with pytest.raises(ValueError, match="4 objects have no mask"):
        Trainer(cfg)
