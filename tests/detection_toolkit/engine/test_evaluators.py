"""``dataloader.evaluator``: any of Detectron2's, several, or of others."""

import pytest
from coco_files import write_dataset
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from omegaconf import OmegaConf
from small_runs import make_config

from detection_toolkit.data import register_coco_json
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.evaluators import build_evaluators, max_dets_per_image


class Counting(DatasetEvaluator):
    """Takes nothing that a run could give."""

    def __init__(self, name="count"):
        self.name = name
        self.images = 0

    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return {self.name: {"images": float(self.images)}}


class Keyword(Counting):
    """Takes the name alone, by keyword."""

    def __init__(self, *, dataset_name):
        super().__init__(dataset_name)


class Stranger:
    """No evaluator."""


def config(*nodes):
    node = list(nodes) if len(nodes) != 1 else nodes[0]
    return OmegaConf.create({"dataloader": {"evaluator": node}}, flags={"allow_objects": True})


def test_each_is_given_what_it_takes(tmp_path):
    name = register_coco_json(*write_dataset(tmp_path))
    folder = str(tmp_path / "results")
    coco = build_evaluators(
        config(L(COCOEvaluator)(dataset_name=None, output_dir=None)), name, folder
    )
    assert coco._output_dir == folder
    assert build_evaluators(config(L(Keyword)()), name, folder).name == name
    # The places of another evaluator's arguments are left in the node when its target changes.
    stale = L(Counting)(dataset_name=None, output_dir=None)
    assert build_evaluators(config(stale), name, folder).name == "count"


def test_detectron2s_own_are_built(tmp_path):
    name = register_coco_json(*write_dataset(tmp_path))
    cityscapes = build_evaluators(
        config(L(CityscapesInstanceEvaluator)(dataset_name=None, output_dir=None)), name, ""
    )
    assert cityscapes._metadata.name == name
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    MetadataCatalog.get("voc_for_evaluators").set(
        dirname=str(tmp_path), split="test", year=2007, thing_classes=["cat"]
    )
    voc = build_evaluators(
        config(L(PascalVOCDetectionEvaluator)(dataset_name=None)), "voc_for_evaluators", ""
    )
    assert voc._class_names == ["cat"]
    MetadataCatalog.remove("voc_for_evaluators")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([L(Stranger)()], "dataloader.evaluator is Stranger, not a DatasetEvaluator"),
        ([{"a": 1}], "must be an evaluator"),
        ([L(Counting)(nmae="x")], "cannot be built.*nmae"),
        ([L(Counting)(), L(Stranger)()], r"evaluator\[1\] is Stranger"),
        ([], "empty list"),
    ],
)
def test_what_is_none_is_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        build_evaluators(config(*nodes), "any", "")


def test_the_limit_of_detections_is_found_among_several():
    limited = {"_target_": "x", "max_dets_per_image": 7}
    assert max_dets_per_image(config(limited)) == 7
    assert max_dets_per_image(config({"_target_": "x"}, limited)) == 7
    assert max_dets_per_image(config({"_target_": "x"})) is None


def run(cfg):
    trainer = Trainer(prepare_config(cfg))
    return trainer.train()


def test_several_see_the_same_detections(tmp_path):
    cfg = make_config(tmp_path, "train.max_iter=1", num_images=3)
    cfg.dataloader.evaluator = [cfg.dataloader.evaluator, L(Counting)()]
    results = run(cfg)
    assert results["count"] == {"images": 3.0}
    assert "AP" in results["bbox"]
    assert isinstance(
        Trainer.build_evaluator(cfg, register_coco_json(*write_dataset(tmp_path / "data"))),
        DatasetEvaluators,
    )


def test_a_wrong_one_is_refused_before_training(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataloader.evaluator = L(Stranger)()
    with pytest.raises(ValueError, match="not a DatasetEvaluator"):
        Trainer(prepare_config(cfg))


def test_without_one_a_run_ends_without_results(tmp_path, caplog):
    cfg = make_config(tmp_path, "train.max_iter=1")
    del cfg.dataloader.evaluator
    assert not run(cfg)
    assert "is not evaluated: the config has no dataloader.evaluator" in caplog.text
