"""Paths of any kind, and mistakes that are told early."""

from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import LazyPath, PathHandler
from small_runs import make_config, make_detector

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.data import DetectionMapper, dataset_num_classes, get_detection_dataset
from detection_toolkit.data.images import read_image, shown_size
from detection_toolkit.engine import Predictor, Trainer, prepare_config
from detection_toolkit.engine.bad_batch import read_bad_batch, write_bad_batch
from detection_toolkit.errors import UserError
from detection_toolkit.modeling.backbones.timm_backbone import TimmBackbone
from detection_toolkit.training import HungarianMatcher


def lazy(path):
    return LazyPath(lambda: str(path))


def register(name, folder, kind, *, image_root=None):
    """A data set without any JSON, whose file names are paths of a kind."""
    document = make_document()
    _, images = write_dataset(folder, document)
    records = [
        {
            "file_name": kind(Path(images) / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [
                {"bbox": [4.0, 6.0, 34.0, 31.0], "bbox_mode": 0, "category_id": 1, "iscrowd": 0}
            ],
        }
        for image in document["images"]
    ]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    if image_root is not None:
        MetadataCatalog.get(name).image_root = image_root
    return records


@pytest.mark.parametrize("kind", [str, Path, lazy])
def test_file_names_of_any_kind_are_read(tmp_path, kind):
    register("paths", tmp_path, kind, image_root=tmp_path / "images")
    first = get_detection_dataset("paths")[0]
    assert isinstance(first["file_name"], str)
    assert DetectionMapper(True, augmentations=[])(first)["image"].shape == (3, 64, 96)
    DatasetCatalog.remove("paths")
    MetadataCatalog.remove("paths")


@pytest.mark.parametrize("kind", [Path, lazy])
def test_an_image_outside_of_its_folder_is_refused_whatever_the_kind_of_its_path(tmp_path, kind):
    register("outside", tmp_path, kind, image_root=tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="outside of its image folder"):
        get_detection_dataset("outside")


@pytest.mark.parametrize("kind", [Path, lazy])
def test_an_image_is_read_by_any_kind_of_path(tmp_path, kind):
    register("images", tmp_path, kind)
    path = tmp_path / "images" / "1.png"
    assert np.array_equal(read_image(kind(path)), read_image(str(path)))
    assert shown_size(kind(path)) == (64, 96)


def test_a_registered_data_set_without_json_is_trained_and_evaluated_by_paths(tmp_path):
    register("no_json", tmp_path, Path)
    cfg = make_config(tmp_path, "train.max_iter=1")
    for part in ("train", "test"):
        cfg.dataloader[part].dataset.update(names="no_json", json_file=None, image_root=None)
    cfg.train.output_dir = tmp_path / "by_path"
    trainer = Trainer(prepare_config(cfg))
    trainer.resume_or_load(resume=False)
    assert "AP" in trainer.train()["bbox"]
    final = tmp_path / "by_path" / "model_final.pth"
    assert final.is_file()

    cfg.train.init_checkpoint = final
    predictor = Predictor(cfg)
    trained = trainer.model.state_dict()
    for key, value in predictor.model.state_dict().items():
        assert torch.equal(value, trained[key])
    checkpointer = Checkpointer(predictor.model, tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    checkpointer.save("again")
    checkpointer.load(tmp_path / "saved" / "again.pth")


class Elsewhere(PathHandler):
    """Paths ``elsewhere://...`` are those of a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["elsewhere://"]

    def _get_local_path(self, path, force=False, **kwargs):
        return str(self.folder / path.removeprefix("elsewhere://"))

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode)


def test_images_are_read_through_a_handler_of_the_path_manager(tmp_path, monkeypatch):
    monkeypatch.setattr(PathManager, "_path_handlers", PathManager._path_handlers.copy())
    PathManager.register_handler(Elsewhere(tmp_path / "images"))
    register("handled", tmp_path, lambda path: f"elsewhere://{path.name}")
    cfg = make_config(tmp_path, "train.max_iter=1")
    for part in ("train", "test"):
        cfg.dataloader[part].dataset.update(names="handled", json_file=None, image_root=None)
    trainer = Trainer(prepare_config(cfg))
    assert "AP" in trainer.train()["bbox"]


def test_a_matcher_without_any_weight_is_refused():
    with pytest.raises(UserError, match="all matching cost weights are zero"):
        HungarianMatcher(0.0, 0.0, 0.0)


@pytest.mark.parametrize("sampler", ["RandomSampler", 3])
def test_a_sampler_that_is_none_is_refused(tmp_path, sampler):
    cfg = make_config(tmp_path)
    cfg.dataloader.train.sampler = sampler
    with pytest.raises(UserError, match="dataloader.train.sampler is"):
        Trainer(prepare_config(cfg))


def test_class_names_in_one_text_are_refused():
    MetadataCatalog.get("one_text").thing_classes = "cat"
    with pytest.raises(UserError, match="thing_classes of data set one_text is one text, 'cat'"):
        dataset_num_classes("one_text")
    MetadataCatalog.remove("one_text")


def test_a_file_is_no_answer_to_whether_a_timm_backbone_is_pretrained():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="pretrained is true or false, got 'model.pth'"):
        TimmBackbone("resnet18", pretrained="model.pth")


def test_a_batch_without_an_image_shows_its_own_error(tmp_path):
    detector = make_detector()
    batch = [{"file_name": Path("a.png"), "height": 4, "width": 6}]
    with pytest.raises(KeyError, match="image"):
        detector(batch)
    path = write_bad_batch(
        tmp_path / "bad",
        {"iteration": 0, "reason": "no image"},
        [batch],
        random_state=torch.get_rng_state(),
    )
    assert read_bad_batch(path)["batches"] == [[{"file_name": "a.png", "height": 4, "width": 6}]]


def test_a_predicted_class_beyond_the_data_sets_is_an_error(tmp_path):
    cfg = prepare_config(make_config(tmp_path))
    cfg.model.num_classes = 5  # the data set has 3
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for stage in model.decoder.stages:
            stage.class_tower.out.bias[4] = 9.0
    with pytest.raises((AssertionError, ValueError, KeyError)):
        Trainer.test(cfg, model)


def test_the_limit_of_detections_takes_effect(tmp_path):
    """150 objects, all of them found, of which COCO's usual limit lets 100 count."""
    document = make_document(num_images=1, boxes_per_image=1, height=200, width=300)
    document["annotations"] = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 3,
            "bbox": [20.0 * (i % 15), 20.0 * (i // 15), 12.0, 12.0],
            "area": 144.0,
            "iscrowd": 0,
        }
        for i in range(150)
    ]
    recalls = {}
    for limit in (None, 150):
        cfg = make_config(tmp_path / str(limit), document=document)
        cfg.dataloader.evaluator.max_dets_per_image = limit
        recalls[limit] = Trainer.test(prepare_config(cfg), Oracle(150))["bbox"]["AP"]
    assert recalls[150] == pytest.approx(100.0)
    assert 60 < recalls[None] < 70  # precision is 1 up to a recall of two thirds


class Oracle(torch.nn.Module):
    """Finds the objects of the test above."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, batched_inputs):
        corner = torch.tensor([[20.0 * (i % 15), 20.0 * (i // 15)] for i in range(self.count)])
        found = Instances((200, 300))
        found.pred_boxes = Boxes(torch.cat([corner, corner + 12], 1))
        found.scores = torch.linspace(0.9, 0.5, self.count)
        found.pred_classes = torch.zeros(self.count, dtype=torch.long)
        return [{"instances": found} for _ in batched_inputs]


def test_a_loader_keeps_the_type_that_a_config_names(tmp_path):
    """The sampler of a config is an object, as in Detectron2."""
    cfg = make_config(tmp_path, "train.max_iter=1")
    cfg.dataloader.train.sampler = L(TrainingSampler)(size=4, seed=3)
    Trainer(prepare_config(cfg)).train()
