"""The images that ``view data`` shows are those that a run gets, with their sources."""

import itertools
import json

import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.data.transforms import FixedSizeCrop
from detectron2.utils.env import seed_all_rng
from small_runs import make_config

from detection_toolkit.commands import train as train_command
from detection_toolkit.config import apply_overrides, config_text, get_config
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.training_images import TrainingImages
from detection_toolkit.errors import UserError


def small_config(folder, *overrides, kind="plain", document=None):
    cfg = make_config(folder, "train.seed=5", num_images=7)
    if document is not None:
        write_dataset(folder / "data", document)
    if kind != "plain":
        name = {"pairs": "shapes_weak_strong", "jitter": "shapes_lsj"}[kind]
        cfg.dataloader.train.mapper = get_config(f"common/data/{name}.py").dataloader.train.mapper
    return prepare_config(apply_overrides(cfg, list(overrides)))


def crowded():
    """A document with a crowd in image 2, and images of two shapes."""
    document = make_document(num_images=7)
    for image in document["images"][::3]:
        image["height"], image["width"] = 96, 64
    crowd = document["annotations"][3]
    crowd["iscrowd"] = 1
    crowd["segmentation"] = {"size": [64, 96], "counts": [100, 300, 64 * 96 - 400]}
    return document


def batches_of_a_run(cfg, count):
    """As ``train_net.py`` seeds and builds it."""
    seed_all_rng(cfg.train.seed)
    trainer = Trainer(cfg)
    return trainer, list(itertools.islice(trainer.data_loader, count))


def assert_same(view, other):
    assert view["file_name"] == other["file_name"] and torch.equal(view["image"], other["image"])
    assert torch.equal(view["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
    assert torch.equal(view["instances"].gt_classes, other["instances"].gt_classes)


@pytest.mark.parametrize("kind", ["plain", "pairs", "jitter"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_they_are_what_the_loader_of_a_trainer_yields(tmp_path, kind, workers):
    cfg = small_config(tmp_path, kind=kind, document=crowded())
    cfg.dataloader.train.num_workers = workers
    trainer, batches = batches_of_a_run(cfg, 6)
    images = list(TrainingImages(cfg).since(0, 12))
    assert [image.number for image in images] == list(range(12))
    for nth, batch in enumerate(batches):
        mine = [image for image in images if image.batch == nth]
        views = [view for several in zip(*[image.views for image in mine]) for view in several]
        assert len(views) == len(batch)
        for view, other in zip(views, batch):
            assert_same(view, other)
        padded = tuple(trainer.model.preprocess_image(batch).tensor.shape[-2:])
        assert {image.padded_size for image in mine} == {padded}


def test_a_later_place_shows_the_same_images(tmp_path):
    stream = TrainingImages(small_config(tmp_path))
    everything = list(stream.since(0, 11))
    stream = TrainingImages(small_config(tmp_path))
    for image, other in zip(stream.since(5, 4), everything[5:9]):
        assert (image.number, image.batch, image.draw) == (other.number, other.batch, other.draw)
        assert_same(image.views[0], other.views[0])


def test_a_run_by_the_command_has_the_same_seed_of_the_order(tmp_path):
    overrides = ["train.max_iter=1", "train.seed=5"]
    cfg = make_config(tmp_path, *overrides, num_images=7)
    flat = tmp_path / "flat.yaml"
    flat.write_text(config_text(cfg))
    train_command.main(["--config-file", str(flat)])
    state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    seen = TrainingImages(prepare_config(cfg))
    assert state["trainer"]["stream"]["seed"] == seen.loader.stream.seed


@pytest.mark.parametrize("kind", ["plain", "pairs", "jitter"])
def test_objects_are_those_of_their_annotations(tmp_path, kind):
    cfg = small_config(tmp_path, kind=kind, document=crowded())
    document = json.loads((tmp_path / "data" / "annotations.json").read_text())
    by_id = {a["id"]: a for a in document["annotations"]}
    place = {3: 0, 7: 1, 90: 2}  # of the categories
    told, foreign = 0, 0
    for image in TrainingImages(cfg).since(0, 20):
        for view, sources in zip(image.views, image.objects):
            assert sources is not None and len(sources) == len(view["instances"])
            for source, label in zip(sources, view["instances"].gt_classes.tolist()):
                annotation = by_id[source.annotation["id"]]
                assert place[annotation["category_id"]] == label and not annotation["iscrowd"]
                assert annotation["image_id"] == source.record["image_id"]
                told += 1
                foreign += source.record["image_id"] != view["image_id"]
    assert told > 20 and (foreign > 0) == (kind == "jitter")


def test_crowds_are_where_the_image_has_them(tmp_path):
    cfg = small_config(tmp_path, document=crowded())
    found = []
    for image in TrainingImages(cfg).since(0, 20):
        (crowds,) = image.crowds
        assert len(crowds) == (image.views[0]["image_id"] == 2)
        found += crowds.tolist()
    assert found
    for box in found:  # mirrored or not
        assert np.allclose(box, [14, 11, 44, 36]) or np.allclose(box, [52, 11, 82, 36])


def test_of_a_mapper_that_goes_by_classes_no_source_is_told(tmp_path):
    cfg = small_config(tmp_path)
    stream = TrainingImages(cfg)
    mapper = stream.loader.dataset._mapper

    def without_cats(record):
        view = mapper(record)
        view["instances"] = view["instances"][view["instances"].gt_classes != 0]
        return view

    stream.loader.dataset._mapper = without_cats
    # The very first object has the number 0, as cats have.
    images = [image for image in stream.since(0, 16) if image.draw.index]
    has_cats = [any(a["category_id"] == 0 for a in records_of(stream, image)) for image in images]
    assert [image.objects[0] is None for image in images] == has_cats
    assert True in has_cats and False in has_cats


def records_of(stream, image):
    return stream.loader.dataset.records[image.draw.index]["annotations"]


def test_a_seed_left_to_chance_is_named(tmp_path, caplog):
    cfg = small_config(tmp_path, "train.seed=-1")
    stream = TrainingImages(cfg)
    assert stream.seed >= 0 and f"train.seed={stream.seed}" in caplog.text
    cfg.train.seed = stream.seed
    assert TrainingImages(cfg).loader.stream.seed == stream.loader.stream.seed


@pytest.mark.parametrize(("start", "count"), [(-1, 4), (0, 0)])
def test_a_negative_place_is_refused(tmp_path, start, count):
    stream = TrainingImages(small_config(tmp_path))
    with pytest.raises(UserError, match=f"got start {start} and number {count}"):
        next(stream.since(start, count))


def test_another_loader_is_named(tmp_path):
    cfg = small_config(tmp_path)
    node = cfg.dataloader.train
    cfg.dataloader.train = L(build_detection_train_loader)(
        dataset=node.dataset, mapper=node.mapper, total_batch_size=2
    )
    with pytest.raises(UserError, match="build_train_loader"):
        TrainingImages(cfg)


def test_a_batch_of_one_size_is_not_padded_beyond_the_model(tmp_path):
    cfg = small_config(tmp_path)
    cfg.dataloader.train.mapper.augmentations = [L(FixedSizeCrop)(crop_size=(64, 64))]
    stream = TrainingImages(cfg)
    assert {image.padded_size for image in stream.since(0, 4)} == {(64, 64)}
