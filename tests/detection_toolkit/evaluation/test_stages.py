"""Evaluation by stage: one pass, the last stage as always, and the command line's switch."""

import json

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from small_runs import make_config

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import dataset_names, register_coco_json
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine import evaluation as evaluation_module
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation import (
    AllStages,
    StageEvaluator,
    compared_label_assigners,
    configured_label_assigners,
    evaluate_stages,
)
from detection_toolkit.modeling import QueryDetector
from detection_toolkit.structures import StageOutput
from detection_toolkit.training import HungarianMatcher, LabelAssigner, StagewiseMatcher
from stageinteractor import CrossStageMatcher


class Oracle(QueryDetector):
    """Two stages and five queries on images of ``make_document``: the first stage's boxes are off
    and its scores high; the second has the objects, one of them twice, and one false positive."""

    def __init__(self, label_assigner=None):
        torch.nn.Module.__init__(self)
        self.num_classes = 3
        self.criterion = None
        if label_assigner is not None:
            self.criterion = torch.nn.Module()
            self.criterion.matcher = HungarianMatcher()
            self.criterion.label_assigner = label_assigner
        self.decoder = torch.nn.Module()
        self.decoder.num_stages = self.decoder.num_stages_at_test = 2
        self.decoder.auxiliary_names = ()

    def forward(self, batched_inputs):
        return [{"instances": x} for x in self.inference_stages(batched_inputs)[1][-1]]

    def inference_stages(self, batched_inputs):
        logits, boxes = [], []
        for x in batched_inputs:
            scale = x["image"].shape[-1] / x["width"]
            truth = torch.tensor([[4.0, 6, 34, 31], [14, 11, 44, 36]])
            classes = torch.tensor([x["image_id"] % 3, (x["image_id"] + 1) % 3])
            last = torch.cat([truth, truth[:1] + 1, torch.tensor([[60.0, 40, 90, 60]] * 2)])
            score = torch.full((2, 5, 3), -8.0)
            for query, label in enumerate([classes[0], classes[1], classes[0], 0]):
                score[:, query, label] = torch.tensor([3.0, 2.0])
            score[:, 2] -= 0.5  # the second answer for the same object
            score[:, 3, 0] = torch.tensor([-1.0, 0.0])  # grows, and comes last
            boxes.append(torch.stack([last + 6, last]) * scale)
            logits.append(score)
        logits, boxes = torch.stack(logits, 1), torch.stack(boxes, 1)
        outputs = [StageOutput(a, b, b, b) for a, b in zip(logits, boxes)]
        return outputs, [
            [
                self._instances(a, b, x)
                for a, b, x in zip(output.logits, output.boxes, batched_inputs)
            ]
            for output in outputs
        ]

    def _instances(self, logits, boxes, x):
        scores, index = logits.sigmoid().flatten().topk(5)
        query = index // 3
        instances = Instances((x["height"], x["width"]))
        instances.pred_boxes = Boxes(boxes[query] * x["width"] / x["image"].shape[-1])
        instances.scores, instances.pred_classes = scores, index % 3
        instances.query_index = query
        return instances


@pytest.fixture
def dataset(tmp_path):
    return register_coco_json(*write_dataset(tmp_path / "data"))


def loader(scale=1):
    return [
        [
            {
                "image": torch.zeros(3, 64 * scale, 96 * scale),
                "image_id": i,
                "height": 64,
                "width": 96,
            }
            for i in ids
        ]
        for ids in ((1, 2), (3, 4))
    ]


@pytest.mark.parametrize("scale", [1, 2])
def test_metrics_of_a_detector_whose_answers_are_known(dataset, tmp_path, scale):
    file = tmp_path / "out" / "stage_metrics.json"
    _, metrics = evaluate_stages(
        Oracle(), loader(scale), dataset_name=dataset, output_file=file, facts={"weights": "plain"}
    )
    assert json.loads(file.read_text()) == metrics
    assert metrics["weights"] == "plain" and metrics["num_images"] == 4
    first, last = metrics["stages"]
    # The second answers and false positives come after the objects, so that AP does not see them.
    assert last["AP"] == pytest.approx(100) and last["AP75"] == pytest.approx(100)
    assert first["AP"] < 20
    # Four detections an image reach the score, of which one doubles another.
    assert (last["detections"], last["duplicates"]) == (16, 0.25)
    after_nms = metrics["last_stage_after_nms"]
    assert after_nms["AP"] == pytest.approx(100)
    assert (after_nms["detections"], after_nms["duplicates"]) == (12, 0.0)
    for threshold, changes in zip((0.5, 0.75), metrics["score_changes"]):
        assert changes["iou_threshold"] == threshold
        assert changes["true_positives"] == 8
        assert changes["faded"] == 0.0  # the boxes were never better
        assert changes["false_positives"] == 12
        assert changes["grown_from_stage"] == [changes["grown"]]
        assert changes["grown"] == pytest.approx(4 / 12)


def test_true_positives_fade_when_the_earlier_stage_was_better(dataset):
    oracle = Oracle()

    def reverse(batched_inputs, forward=oracle.inference_stages):
        outputs, detections = forward(batched_inputs)
        worse = outputs[1]._replace(logits=outputs[1].logits - 1.5, boxes=outputs[1].boxes + 1)
        images = zip(worse.logits, worse.boxes, batched_inputs)
        moved = [oracle._instances(*image) for image in images]
        return [outputs[1], worse], [detections[1], moved]

    oracle.inference_stages = reverse
    _, metrics = evaluate_stages(oracle, loader(), dataset_name=dataset)
    changes = metrics["score_changes"][0]
    assert changes["true_positives"] == 8
    assert changes["faded"] == 1.0
    assert changes["grown"] == 0.0
    assert metrics["stages"][0]["AP"] > metrics["stages"][1]["AP"]


@pytest.mark.parametrize(
    "own, others",
    [(CrossStageMatcher(), []), (None, [CrossStageMatcher()]), (None, [CrossStageMatcher()] * 2)],
)
def test_labels_change_as_the_matchers_say(dataset, own, others):
    _, metrics = evaluate_stages(
        Oracle(own), loader(), dataset_name=dataset, label_assigners=others
    )
    assert list(metrics["label_changes"]) == ["own_match", "cross_stage"]
    own, cross = metrics["label_changes"].values()
    # In both stages queries 0 and 1 have the objects. In the first their IoU is below 0.5, so that
    # the cross-stage matcher gives them a label in the second stage only.
    assert own["share_of_labelled"] == 0.0
    assert own["share_of_queries_by_step"] == [0.0]
    assert cross["share_of_labelled"] == 1.0
    assert cross["share_of_queries"] == pytest.approx(2 / 5)


class LastStageMatcher(LabelAssigner):
    """Of another method: every stage takes the labels of the last."""

    name = "last_match"

    def sources(self, assignment, boxes, truth):
        last = torch.arange(len(boxes)) == len(boxes) - 1
        return (assignment.matched.permute(1, 2, 0) & last).expand(len(boxes), -1, -1, -1)


def test_any_label_assigner_is_counted_under_its_own_name(dataset):
    _, metrics = evaluate_stages(Oracle(LastStageMatcher()), loader(), dataset_name=dataset)
    assert list(metrics["label_changes"]) == ["own_match", "last_match"]
    assert metrics["label_changes"]["last_match"]["share_of_queries_by_step"] == [0.0]


def test_the_models_own_label_assigner_takes_the_place_of_one_of_its_name():
    own = CrossStageMatcher(0.7)
    compared = compared_label_assigners(Oracle(own), [CrossStageMatcher(), LastStageMatcher()])
    assert [x.name for x in compared] == ["own_match", "cross_stage", "last_match"]
    assert compared[1] is own
    (alone,) = compared_label_assigners(Oracle(StagewiseMatcher()))
    assert alone.name == "own_match"


@pytest.mark.parametrize(
    "config",
    [
        "stageinteractor/ablations/labels_from_own_stage.py",
        "stageinteractor/bccd_tiny.py",
        "stageinteractor/shapes_hard.py",
        "stageinteractor/stageinteractor_tiny_custom.py",
        "stageinteractor/stageinteractor_r50_100q_ms_3x.py",
        "adamixer/adamixer_r50_100q_1x.py",
        "adamixer/adamixer_r50_300q_3x.py",
        "adamixer/adamixer_shapes_tiny.py",
        "sqr/adamixer_sqr_shapes_tiny.py",
    ],
)
def test_configs_of_the_family_are_compared_by_cross_stage_labels(config):
    (assigner,) = configured_label_assigners(get_config(config))
    assert isinstance(assigner, CrossStageMatcher) and assigner.iou_threshold == 0.5


def test_a_config_may_name_no_label_assigner_or_know_nothing_of_them():
    cfg = get_config("dfvt/mask_rcnn_dfvt_tiny_1x.py")
    assert configured_label_assigners(cfg) == []
    del cfg.dataloader["stage_evaluator"]  # as in those of older runs
    assert configured_label_assigners(cfg) == []


def test_the_mode_of_the_detector_is_left_alone(dataset):
    for mode in (True, False):
        detector = Oracle().train(mode)
        evaluate_stages(detector, loader(), dataset_name=dataset)
        assert detector.training is mode


def test_a_model_without_stages_is_refused(dataset):
    message = r"Linear has no cascade of stages: evaluation by stage \(train.stage_evaluation\)"
    with pytest.raises(UserError, match=message):
        AllStages(torch.nn.Linear(1, 1))


def test_a_test_set_without_objects_is_refused(tmp_path):
    document = make_document()
    document["annotations"] = []
    name = register_coco_json(*write_dataset(tmp_path / "empty", document))
    with pytest.raises(ValueError, match="has no annotated objects"):
        StageEvaluator(name, 2, num_classes=3)


def test_training_does_not_begin_where_the_evaluation_after_it_would_stop(tmp_path):
    document = make_document()
    document["annotations"] = []
    json_file, image_root = write_dataset(tmp_path / "empty", document)
    overrides = [
        "train.stage_evaluation=true",
        f"dataloader.test.dataset.json_file='{json_file}'",
        f"dataloader.test.dataset.image_root='{image_root}'",
    ]
    with pytest.raises(ValueError, match="has no annotated objects"):
        Trainer(prepare_config(make_config(tmp_path, *overrides)))


@pytest.mark.parametrize("kind", ["stageinteractor", "adamixer"])
def test_the_last_stage_is_what_evaluation_without_stages_sees(tmp_path, kind):
    cfg = prepare_config(make_config(tmp_path, "train.stage_evaluation=true"))
    if kind == "adamixer":
        decoder = dict(cfg.model.decoder)
        kept = ("num_classes", "num_stages", "channels", "num_heads", "ffn_channels", "groups")
        cfg.model.decoder = {
            "_target_": "adamixer.AdaMixerDecoder",
            "points": 4,
            "out_points": 4,
            **{k: decoder[k] for k in kept if k in decoder},
        }
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (name,) = dataset_names(cfg.dataloader.test.dataset)
    folder = tmp_path / "output" / "inference" / name

    by_stage = Trainer.test(cfg, model)
    metrics = json.loads((folder / "stage_metrics.json").read_text())
    assert metrics["weights"] == "plain" and metrics["num_stages"] == 3
    assert list(metrics["label_changes"]) == ["own_match", "cross_stage"]
    cfg.train.stage_evaluation = False
    assert Trainer.test(cfg, model)["bbox"] == pytest.approx(by_stage["bbox"], nan_ok=True)
    assert metrics["stages"][-1]["AP"] == pytest.approx(by_stage["bbox"]["AP"])
    # They do not outlive the detections that they belong to.
    assert not (folder / "stage_metrics.json").exists()


def test_with_fewer_stages_the_results_are_those_of_the_last_of_them(tmp_path):
    """By stage and without; labels and losses are still those of all stages."""
    changes = [
        "train.stage_evaluation=true",
        "train.validation_loss=true",
        "model.criterion.label_assigner.stage_offsets=[[0,1],[-1,0],[-1]]",
    ]
    document = make_document(8)
    for annotation in document["annotations"]:  # what a detector finds that was not trained
        annotation.update(bbox=[2.0, 2.0, 84.0, 56.0], area=84.0 * 56)
    cfg = prepare_config(make_config(tmp_path, *changes, document=document))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    file = tmp_path / "output" / "inference" / dataset_names(cfg.dataloader.test.dataset)[0]
    file = file / "stage_metrics.json"
    of_all = Trainer.test(cfg, model)
    metrics = json.loads(file.read_text())

    model.decoder.limit_stages_at_test(2)
    by_stage = Trainer.test(cfg, model)
    assert json.loads(file.read_text()) == metrics
    cfg.train.stage_evaluation = False
    alone = Trainer.test(cfg, model)
    assert str(alone["bbox"]) == str(by_stage["bbox"]) != str(of_all["bbox"])
    assert alone["bbox"]["AP"] == metrics["stages"][1]["AP"] != metrics["stages"][2]["AP"]
    assert of_all["bbox"]["AP"] == metrics["stages"][2]["AP"] > 0
    assert alone["validation"] == by_stage["validation"] == of_all["validation"]


def test_training_evaluates_the_stages_once_at_its_end(tmp_path, monkeypatch):
    calls = []
    evaluate = evaluation_module.evaluate_stages
    monkeypatch.setattr(
        evaluation_module,
        "evaluate_stages",
        lambda *args, **kwargs: calls.append(kwargs) or evaluate(*args, **kwargs),
    )
    overrides = ["train.stage_evaluation=true", "train.eval_period=1", "train.max_iter=2"]
    cfg = prepare_config(make_config(tmp_path, *overrides))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert len(calls) == 1
    assert cfg.train.stage_evaluation is True
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    assert sum("bbox/AP" in json.loads(line) for line in lines) == 2


def test_the_metrics_of_averaged_and_plain_weights_are_kept_apart(tmp_path):
    cfg = prepare_config(make_config(tmp_path, "train.stage_evaluation=true"))
    model = instantiate(cfg.model)
    Trainer.test(cfg, model)
    apply_overrides(cfg, ["train.ema.enabled=true"])
    Trainer.test(cfg, model)
    files = {p.name for p in (tmp_path / "output").glob("inference/*/*")}
    assert {"stage_metrics.json", "stage_metrics_plain.json", "metrics_plain.json"} <= files
    assert {"stage_predictions.npz", "stage_predictions_plain.npz"} <= files
