"""Predictions that are not finite, where a detector was exported."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from small_runs import draw_blocks, make_config, make_detector

from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.export import OnnxPredictor
from detection_toolkit.export import predictor as predictor_module
from detection_toolkit.export.graph import DetectionGraph
from detection_toolkit.modeling import QueryDetector


def test_a_graph_has_no_nan_among_its_outputs():
    detector = make_detector().eval()
    images = torch.randint(256, (2, 3, 64, 64)).float()
    images[1] = math.nan
    with torch.no_grad():
        boxes, scores, _ = DetectionGraph(detector)(images, torch.full((2, 2), 64))
    assert (scores[0] >= 0).all()
    assert (scores[1] == -1).all() and (boxes[1] == 0).all()


@pytest.fixture
def exported(monkeypatch):
    """A predictor whose session answers what ``outputs`` holds."""
    outputs = {}
    monkeypatch.setattr(predictor_module, "run_session", lambda *_: outputs["of_session"])
    predictor = object.__new__(OnnxPredictor)
    predictor.session = None
    predictor.description = SimpleNamespace(image_format="RGB", class_names=["a", "b"])
    predictor._augmentations = T.AugmentationList([])
    return predictor, outputs


def answer(boxes, scores):
    boxes, scores = np.float32([boxes]), np.float32([scores])
    return boxes, scores, np.zeros(scores.shape, np.int64)


def test_an_exported_detector_drops_what_is_not_finite(exported, caplog):
    predictor, outputs = exported
    sound = [1.0, 2.0, 30.0, 40.0]
    outputs["of_session"] = answer(
        [sound, [math.nan] * 4, sound, sound, [0.0] * 4], [0.9, 0.8, math.nan, 0.7, -1]
    )
    found = predictor(draw_blocks())["instances"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    assert found.pred_boxes.tensor.tolist() == [sound, sound]
    assert "3 of 5 detections are NaN or infinite" in caplog.text


def test_an_exported_detector_refuses_a_picture_without_any_finite_detection(exported):
    predictor, outputs = exported
    outputs["of_session"] = answer([[math.inf] * 4], [0.5])
    with pytest.raises(NonFinitePredictionError, match="exported weights"):
        predictor(draw_blocks())


def test_scores_that_are_nan_leave_a_json_that_is_one(tmp_path, monkeypatch):
    predict = QueryDetector.predict

    def spoilt(self, images):
        predictions = predict(self, images)
        for stage in predictions.stages:
            stage.logits[:, 0] = math.nan
        return predictions

    monkeypatch.setattr(QueryDetector, "predict", spoilt)
    cfg = prepare_config(make_config(tmp_path))
    Trainer.test(cfg, Trainer.build_model(cfg))
    files = list((tmp_path / "output").rglob("*.json"))
    assert {"coco_instances_results.json", "metrics.json"} <= {f.name for f in files}

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for file in files:
        json.loads(file.read_text(), parse_constant=refuse)
