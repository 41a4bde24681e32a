"""Losses of training on a test set: what they are, where they are told, what they leave alone."""

import contextlib
import copy
import json
import logging
import math

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from small_runs import make_config
from tolerances import tolerance

from detection_toolkit.config import get_config
from detection_toolkit.data import dataset_names
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation import build_loss_evaluator, run_evaluator
from detection_toolkit.modeling import QueryDetector

NAMES = ("cls", "bbox", "giou")
PERIODIC = ["train.max_iter=4", "train.eval_period=2", "train.ema.enabled=true"]


def build(folder, *overrides, **dataset):
    """The model of a small run, past its initialisation, and its test set."""
    cfg = prepare_config(make_config(folder, *overrides, **dataset))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    (name,) = dataset_names(cfg.dataloader.test.dataset)
    return cfg, model, name


def with_truth(batch, document):
    """The test images of a batch with their objects, as training has them: without crowds."""
    classes = {c["id"]: k for k, c in enumerate(document["categories"])}
    for x in batch:
        annotations = [
            a
            for a in document["annotations"]
            if a["image_id"] == x["image_id"] and not a["iscrowd"]
        ]
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        height, width = x["image"].shape[-2:]
        scale = torch.tensor([width / x["width"], height / x["height"]]).repeat(2)
        x["instances"] = Instances((height, width))
        x["instances"].gt_boxes = Boxes(boxes * scale)
        x["instances"].gt_classes = torch.tensor([classes[a["category_id"]] for a in annotations])
    return batch


@pytest.fixture
def document():
    """Five images with two, one and no object, and a crowd."""
    document = make_document(5)
    document["annotations"][3]["iscrowd"] = 1
    document["annotations"] = document["annotations"][:-3]
    return document


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("assigner", [None, "StagewiseMatcher"])
def test_they_are_the_losses_of_one_batch_of_all_images(tmp_path, document, batch_size, assigner):
    resizing = "{_target_:detectron2.data.transforms.Resize,shape:[96,120]}"
    overrides = [
        f"dataloader.test.batch_size={batch_size}",
        f"dataloader.test.mapper.augmentations=[{resizing}]",
    ]
    if assigner:
        target = f"detection_toolkit.training.{assigner}"
        overrides.append(f"model.criterion.label_assigner={{_target_:{target}}}")
    cfg, model, name = build(tmp_path, *overrides, document=document)
    results = Trainer.test(cfg, model)
    batch = [x for images in Trainer.build_test_loader(cfg, name) for x in images]
    with torch.no_grad():
        expected = model.train()(with_truth(batch, document))
    found = results["validation"]
    # The images of a batch and alone: convolutions of other shapes, and sums of another order.
    limits = tolerance(torch.float32, scale=sum(map(float, expected.values())), operations=1000)
    for key, value in expected.items():
        kind, stage = key.removeprefix("loss_").split("_stage")
        assert found[f"stage{stage}/{kind}"] == pytest.approx(float(value), abs=limits["atol"])
    for kind in NAMES:
        stages = [v for k, v in found.items() if k.endswith(f"/{kind}")]
        assert len(stages) == 3 and found[kind] == pytest.approx(sum(stages))
    assert found["total"] == pytest.approx(sum(found[kind] for kind in NAMES))


@pytest.mark.parametrize(
    "config",
    [
        "sqr/stageinteractor_sqr_shapes_tiny.py",
        "deformable_detr/deformable_detr_shapes_tiny.py",
        "adamixer/adamixer_shapes_tiny.py",
    ],
)
def test_routes_and_families_have_those_of_their_stages(config):
    cfg = get_config(config)
    criterion = instantiate(cfg.model).criterion
    assert criterion.of_stages.label_assigner is not None
    plain = instantiate(cfg.model.criterion)
    assert type(criterion.of_stages.label_assigner) is type(plain.of_stages.label_assigner)


def test_a_run_writes_them_beside_ap_for_each_of_its_weights(tmp_path):
    cfg = prepare_config(make_config(tmp_path, *PERIODIC))
    trainer = Trainer(cfg)
    trainer.train()
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    evaluated = [x for x in map(json.loads, lines) if "validation/total" in x]
    assert [x["iteration"] for x in evaluated] == [1, 4]  # the last one comes after the last step
    for scalars in evaluated:
        for prefix in ("", "plain/", "averaged/"):
            parts = [scalars[f"{prefix}validation/{kind}"] for kind in NAMES]
            assert scalars[f"{prefix}validation/total"] == pytest.approx(sum(parts))
            assert f"{prefix}validation/stage2/giou" in scalars
    assert not [key for key in evaluated[0] if "validation" in key and "loss" in key]
    assert list((tmp_path / "output").glob("events.out.tfevents*"))
    (file,) = (tmp_path / "output").glob("inference/*/metrics.json")
    assert json.loads(file.read_text())["results"]["validation"]["total"] > 0


def test_the_best_checkpoint_may_go_by_them(tmp_path):
    best = ["train.best_checkpointer.metric=validation/total"]
    cfg = make_config(tmp_path, *PERIODIC, *best, "train.best_checkpointer.mode=min")
    Trainer(prepare_config(cfg)).train()
    record = json.loads((tmp_path / "output" / "model_best.json").read_text())
    assert record["metric"] == "validation/total" and math.isfinite(record["value"])


def test_a_run_with_them_has_the_weights_of_a_run_without(tmp_path):
    weights = []
    for setting in ("true", "false"):
        folder = tmp_path / setting
        overrides = [*PERIODIC, f"train.validation_loss={setting}"]
        seed_all_rng(1)
        trainer = Trainer(prepare_config(make_config(folder, *overrides)))
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert ("validation" in trainer._last_eval_results) is (setting == "true")
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_the_model_stays_as_it_was(tmp_path):
    cfg, model, _ = build(tmp_path)
    before = {k: v.clone() for k, v in [*model.state_dict().items(), *model.named_buffers()]}
    model.train()
    states = []
    for cfg.train.validation_loss in (True, False):
        seed_all_rng(1)
        assert ("validation" in Trainer.test(cfg, model)) is cfg.train.validation_loss
        assert model.training and not model.decoder._forward_hooks
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    after = dict([*model.state_dict().items(), *model.named_buffers()])
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_by_stage_has_the_same(tmp_path):
    cfg, model, _ = build(tmp_path)
    plain = Trainer.test(cfg, model)
    cfg.train.stage_evaluation = True
    assert Trainer.test(cfg, model)["validation"] == plain["validation"]


def test_without_annotations_or_stages_there_are_none(tmp_path):
    json_file, root = write_dataset(tmp_path / "bare", {**make_document(2), "annotations": []})
    data = [
        f"dataloader.test.dataset.json_file='{json_file}'",
        f"dataloader.test.dataset.image_root='{root}'",
    ]
    cfg, model, name = build(tmp_path, *data)
    assert build_loss_evaluator(model, name) is None
    assert "validation" not in Trainer.test(cfg, model)
    assert build_loss_evaluator(torch.nn.Linear(1, 1), name) is None


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_objects_of_a_class_that_the_model_lacks_cost_the_losses_and_not_ap(
    tmp_path, document, iscrowd, caplog
):
    cfg, model, _ = build(tmp_path, document=document)  # three classes
    extended = copy.deepcopy(document)
    extended["categories"].append({"id": 99, "name": "other"})
    extended["annotations"][0] |= {"category_id": 99, "iscrowd": iscrowd}
    json_file, root = write_dataset(tmp_path / "extended", extended)
    cfg.dataloader.test.dataset.json_file = str(json_file)
    cfg.dataloader.test.dataset.image_root = str(root)
    with caplog.at_level(logging.WARNING):
        results = Trainer.test(cfg, model)
    # Crowds are no objects.
    assert set(results) == ({"bbox", "validation"} if iscrowd else {"bbox"})
    reason = "needs 4 classes, and the model has 3"
    assert [reason in r.getMessage() for r in caplog.records].count(True) == 1 - iscrowd
    assert math.isfinite(results["bbox"]["AP"])
    cfg.train.stage_evaluation = True
    refusal = contextlib.nullcontext() if iscrowd else pytest.raises(UserError, match=reason)
    with refusal:
        Trainer.test(cfg, model)


def test_a_query_that_is_not_finite_costs_the_losses_and_not_ap(tmp_path, monkeypatch, caplog):
    predict = QueryDetector.predict

    def spoilt(self, images):
        predictions = predict(self, images)
        predictions.stages[0].logits[:, 0] = math.nan
        return predictions

    monkeypatch.setattr(QueryDetector, "predict", spoilt)
    cfg, model, _ = build(tmp_path)
    with caplog.at_level(logging.WARNING):
        results = Trainer.test(cfg, model)
    assert set(results) == {"bbox"}
    assert "there is no validation loss" in caplog.text


def test_a_model_that_answers_in_another_way_is_evaluated_all_the_same(tmp_path, caplog):
    cfg, model, name = build(tmp_path, "dataloader.test.batch_size=2")
    losses = build_loss_evaluator(model, name)

    class OneByOne(torch.nn.Module):
        def forward(self, batch):
            return [model.eval()([x])[0] for x in batch]

    loader = Trainer.build_test_loader(cfg, name)
    evaluator = Trainer.build_evaluator(cfg, name)
    with losses.listening():
        results = run_evaluator(OneByOne(), loader, DatasetEvaluators([evaluator, losses]))
    assert set(results) == {"bbox"}
    assert "another way than by one pass" in caplog.text
