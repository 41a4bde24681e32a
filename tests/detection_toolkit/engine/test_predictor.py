"""The predictor, held against Detectron2's DefaultPredictor and the detector itself."""

from __future__ import annotations

import inspect
import io
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from catalogues import no_trace  # noqa: F401  (a fixture)
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from format_files import make_splits, write_yolo
from PIL import Image
from small_runs import SMALL_MODEL
from tolerances import tolerance

from detection_toolkit.checkpoint.official import CheckpointMismatchError
from detection_toolkit.checkpoint.official_files import write_safetensors
from detection_toolkit.commands import view_labels
from detection_toolkit.commands.export import judge_by_ap
from detection_toolkit.config import apply_overrides, config_text, get_config
from detection_toolkit.data import SHAPES, UnreadableImageError, register_shapes, registration
from detection_toolkit.engine import TiledPredictor, Tiling, prepare_config
from detection_toolkit.engine import predictor as predictor_module
from detection_toolkit.engine.predictor import Predictor
from detection_toolkit.engine.runs import describe_run
from detection_toolkit.engine.shipped import is_shipped_config, shipped_config
from detection_toolkit.errors import UserError


@pytest.fixture(scope="module")
def predictor(weights) -> Predictor:
    return Predictor.from_config(shipped_config(), weights, ["train.device=cpu"])


def test_it_is_called_like_detectron2s(predictor):
    for method in ("__init__", "__call__"):
        ours, theirs = (
            inspect.signature(getattr(c, method)) for c in (Predictor, DefaultPredictor)
        )
        assert list(ours.parameters) == list(theirs.parameters)
    assert predictor.metadata is MetadataCatalog.get("shapes_val")
    assert not predictor.model.training
    assert predictor.input_format == "RGB"


def test_detections_are_those_of_the_detector_in_pixels_of_the_picture(predictor, picture):
    instances = predictor(picture)["instances"]
    assert instances.image_size == (90, 120)
    assert len(instances) > 0 and instances.scores.diff().le(0).all()
    boxes = instances.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, ::2].max() <= 120 and boxes[:, 1::2].max() <= 90

    mapper = predictor.cfg.dataloader.test.mapper
    resize = T.AugmentationList([predictor_module.instantiate(a) for a in mapper.augmentations])
    augmented = T.AugInput(np.ascontiguousarray(picture[:, :, ::-1]))
    resize(augmented)
    image = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        raw = predictor.model([{"image": image}])[0]["instances"]
    scale = torch.tensor([120 / image.shape[2], 90 / image.shape[1]] * 2)
    kept = (raw.pred_boxes.tensor * scale).clamp(min=0)
    assert len(raw) >= len(instances)  # boxes without area are dropped
    # Two passes in float32, some hundred roundings each; a score's slope is at most a quarter.
    scores, pixels = (tolerance(torch.float32, scale, operations=100) for scale in (4, 120))
    torch.testing.assert_close(raw.scores[: len(instances)], instances.scores, **scores)
    torch.testing.assert_close(kept[0], boxes[0], **pixels)


def test_resizing_follows_the_config(weights, picture):
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device = weights, "cpu"
    cfg.dataloader.test.mapper.augmentations = [
        {"_target_": T.ResizeShortestEdge, "short_edge_length": 45, "max_size": 64}
    ]
    small = Predictor(cfg)
    inputs = small.preprocess(picture)
    assert inputs["image"].shape == (3, 45, 60)
    assert (inputs["height"], inputs["width"]) == (90, 120)
    assert small(picture)["instances"].image_size == (90, 120)


def test_padding_belongs_to_the_picture_that_detections_are_scaled_to(weights, picture):
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device = weights, "cpu"
    cfg.dataloader.test.mapper.augmentations = [
        {"_target_": T.ResizeShortestEdge, "short_edge_length": 60, "max_size": 60},
        {"_target_": T.FixedSizeCrop, "crop_size": [60, 60], "pad_value": 114},
    ]
    padded = Predictor(cfg)
    inputs = padded.preprocess(picture)
    assert inputs["image"].shape == (3, 60, 60) and (inputs["image"][:, 45:] == 114).all()
    assert (inputs["height"], inputs["width"]) == pytest.approx((120, 120))
    boxes = padded(picture)["instances"].pred_boxes.tensor
    with torch.no_grad():
        raw = padded.model([{"image": inputs["image"]}])[0]["instances"].pred_boxes.tensor
    torch.testing.assert_close(
        boxes[0], raw[0] * 2, **tolerance(torch.float32, scale=120, operations=100)
    )


def test_channel_order_follows_the_config(predictor, weights, picture):
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device = weights, "cpu"
    cfg.dataloader.test.mapper.image_format = "BGR"
    bgr = Predictor(cfg).preprocess(picture)["image"]
    assert torch.equal(bgr.flip(0), predictor.preprocess(picture)["image"])
    cfg.dataloader.test.mapper.image_format = "L"
    with pytest.raises(ValueError, match="RGB or BGR, it is 'L'"):
        Predictor(cfg)


def test_the_config_given_is_left_as_it_was(weights):
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device = weights, "cpu"
    predictor = Predictor(cfg)
    predictor.cfg.train.device = "elsewhere"
    assert cfg.train.device == "cpu"


@pytest.mark.parametrize(
    "image", [None, np.zeros((4, 4)), np.zeros((0, 4, 3)), np.zeros((4, 4, 4))]
)
def test_what_is_no_picture_is_refused(predictor, image):
    with pytest.raises(ValueError, match="expected a BGR picture"):
        predictor(image)


def test_class_names_need_no_files(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device, cfg.train.allow_partial = "", "cpu", True
    register_shapes("never_drawn", SHAPES["shapes_val"])
    cfg.dataloader.test.dataset.names = "never_drawn"
    predictor = Predictor(cfg)
    assert predictor.metadata.thing_classes == MetadataCatalog.get("shapes_val").thing_classes
    assert not any(tmp_path.iterdir())
    cfg.dataloader.test.dataset.names = "coco_2014_minival"
    predictor = Predictor(cfg)
    assert len(predictor.metadata.thing_classes) == predictor.cfg.model.num_classes == 80
    assert "no class names" not in caplog.text
    cfg.dataloader.test.dataset.names = "nowhere"
    assert Predictor(cfg).metadata.get("thing_classes") is None
    assert "detections will have no class names: no data set is registered" in caplog.text


def forget():
    """What the run has registered."""
    for name in ("pets_train", "pets_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


@pytest.fixture
def run_on_a_folder(tmp_path, no_trace):  # noqa: F811
    """A run's folder without its training: (data, run), and the names that it was made with."""
    data = write_yolo(tmp_path / "pets", make_splits())
    cfg = get_config("stageinteractor/shapes_tiny.py")
    for part, split in (("train", "train"), ("test", "val")):
        cfg.dataloader[part].dataset.update({"path": str(data), "split": split})
    cfg = prepare_config(apply_overrides(cfg, [*SMALL_MODEL, "train.device=cpu"]))
    run = tmp_path / "run"
    run.mkdir()
    told = {"run": describe_run(cfg)}
    torch.save({"model": instantiate(cfg.model).state_dict(), **told}, run / "model_final.pth")
    (run / "last_checkpoint").write_text("model_final.pth")
    (run / "config.yaml").write_text(config_text(cfg))
    return data, run, told["run"]["classes"]


@pytest.mark.parametrize("images", ["there", "gone", "damaged"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_run_on_a_folder_detects_without_it(
    run_on_a_folder, picture, monkeypatch, images, ending
):
    data, run, classes = run_on_a_folder
    if ending == "safetensors":
        pytest.importorskip("safetensors")
        content = torch.load(run / "model_final.pth", weights_only=True)
        write_safetensors(run / "model.safetensors", content["model"], run=content["run"])
        for name in ("model_final.pth", "last_checkpoint"):
            (run / name).unlink()
    if images == "gone":
        shutil.rmtree(data)
    elif images == "damaged":
        next((data / "images" / "val").iterdir()).write_bytes(b"no picture")
    monkeypatch.setattr(registration, "open_source", None)  # nothing of it is read
    forget()
    predictor = Predictor.from_run(run)
    assert predictor.metadata.thing_classes == classes and len(classes) == 3
    assert len(predictor(picture)["instances"]) <= 100


def test_without_names_in_the_checkpoint_a_folder_gives_them_if_it_can(run_on_a_folder, caplog):
    data, run, classes = run_on_a_folder
    weights = torch.load(run / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": weights}, run / "model_final.pth")
    assert Predictor.from_run(run).metadata.thing_classes == classes
    forget()
    next((data / "labels" / "val").iterdir()).write_text("0 nonsense")
    predictor = Predictor.from_run(run)
    assert predictor.metadata.get("thing_classes") is None
    assert "detections will have no class names: " in caplog.text


def test_data_whose_classes_have_changed_since_are_no_measure(run_on_a_folder, monkeypatch):
    data, run, classes = run_on_a_folder
    forget()
    table = yaml.safe_load((data / "data.yaml").read_text())
    table["names"] = dict(enumerate(reversed(classes)))
    (data / "data.yaml").write_text(yaml.safe_dump(table))
    predictor = Predictor.from_run(run)
    with pytest.raises(UserError, match="classes of the detector and the test set differ"):
        judge_by_ap(predictor, None, 0.5)
    monkeypatch.setattr(view_labels, "open_detector", lambda args: predictor)
    with pytest.raises(UserError, match="classes of the detector and the training set differ"):
        view_labels.run(None)


def test_missing_weights_are_named():
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        Predictor.from_config(shipped_config(), "nowhere.pth", ["train.device=cpu"])


def test_no_weights_are_refused_unless_they_need_not_be_there(caplog):
    cfg = get_config(shipped_config())
    cfg.train.init_checkpoint, cfg.train.device = "", "cpu"
    with pytest.raises(CheckpointMismatchError, match="no weights: .*--weights.*--allow-partial"):
        Predictor(cfg)
    cfg.train.allow_partial = True
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        Predictor(cfg)
    assert "Name a checkpoint with --weights FILE" in caplog.text


def test_weights_of_another_number_of_classes_are_refused(weights):
    fewer = ["train.device=cpu", "dataloader.test.dataset.names=nowhere", "model.num_classes=2"]
    with pytest.raises(CheckpointMismatchError) as error:
        Predictor.from_config(shipped_config(), weights, fewer)
    message = str(error.value)
    assert f"checkpoint {weights} is not of this config" in message and "\n" not in message
    assert "(6x" in message and "2x" in message and "--allow-partial" in message
    Predictor.from_config(shipped_config(), weights, [*fewer, "train.allow_partial=true"])


def test_wrapped_weights_are_those_of_the_model(weights, picture, predictor, tmp_path):
    plain = torch.load(weights, weights_only=True)["model"]
    lightning = {f"model._orig_mod.{name}": value for name, value in plain.items()}
    lightning["criterion.weight"] = torch.ones(2)  # which the detector does not have
    torch.save({"state_dict": lightning, "epoch": 3}, tmp_path / "wrapped.pth")
    found = Predictor.from_config(
        shipped_config(), str(tmp_path / "wrapped.pth"), ["train.device=cpu"]
    )(picture)["instances"]
    expected = predictor(picture)["instances"]
    assert torch.equal(found.scores, expected.scores)


def test_the_shipped_checkpoint_is_used_for_its_config_alone(
    monkeypatch, weights, tmp_path, caplog
):
    monkeypatch.setattr(predictor_module, "shipped_checkpoint", lambda: weights)
    shipped = Predictor.from_config(shipped_config(), overrides=["train.device=cpu"])
    assert shipped.cfg.train.init_checkpoint == weights
    assert is_shipped_config("/any/where/configs/stageinteractor/shapes_tiny.py")
    assert not is_shipped_config("stageinteractor/stageinteractor_r50_100q_1x.py")
    named = Predictor.from_config(
        shipped_config(), overrides=["train.device=cpu", f"train.init_checkpoint={weights}"]
    )
    assert named.cfg.train.init_checkpoint == weights


def test_without_the_shipped_checkpoint_the_error_says_how_to_make_it(monkeypatch, tmp_path):
    from detection_toolkit.engine import shipped

    package = tmp_path / "projects" / "detection_toolkit" / "engine" / "shipped.py"
    monkeypatch.setattr(shipped, "__file__", str(package))
    with pytest.raises(FileNotFoundError, match=r"no shipped\.json in .*/checkpoints"):
        shipped.shipped_checkpoint()
    assert not is_shipped_config("stageinteractor/shapes_tiny.py")
    for folder in ("checkpoints", "projects/detection_toolkit/checkpoints"):  # checkout, wheel
        table, file = tmp_path / folder / "shipped.json", tmp_path / folder / "weights.pth"
        table.parent.mkdir(parents=True)
        names = {"config": "method/small.py", "weights": "weights.pth"}
        table.write_text(json.dumps({**names, "config_for_own_data": "method/own.py"}))
        assert shipped.shipped_config() == "method/small.py"
        assert shipped.config_for_own_data() == "method/own.py"
        with pytest.raises(FileNotFoundError, match="make shapes-checkpoint"):
            shipped.shipped_checkpoint()
        file.write_bytes(b"weights")
        assert shipped.shipped_checkpoint() == str(file)
        file.unlink()
        table.unlink()


def test_of_a_checkpoint_only_what_it_tells_stays_in_memory(weights, tmp_path):
    told = {"run": {"classes": ["a"] * 6}, "iteration": 7}
    content = torch.load(weights, weights_only=True)
    torch.save({**content, **told, "optimizer": {"state": {}}}, tmp_path / "model.pth")
    predictor = Predictor.from_config(
        shipped_config(), tmp_path / "model.pth", ["train.device=cpu"]
    )
    assert predictor.loaded == {**told, "averaged": False}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_many_pictures_give_what_each_gives(predictor, picture, tmp_path, batch_size):
    """Arrays and files, of several sizes, from a generator that is asked for a batch at a time."""
    images = [picture, picture[:60], picture[:, ::-1], picture[10:80, 5:75], picture[::-1]]
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), images[1])
    asked = []

    def make():
        for i, image in enumerate(images):
            asked.append(i)
            yield str(file) if i == 1 else image

    results = predictor.predict(make(), batch_size=batch_size)
    first = next(results)
    assert len(asked) == min(batch_size, len(images))
    found = [first, *results]
    assert len(found) == len(images)
    for instances, image in zip(found, images):
        expected = predictor(np.ascontiguousarray(image))["instances"]
        assert instances.image_size == expected.image_size == image.shape[:2]
        limits = tolerance(torch.float32, 1.0, 1000)
        torch.testing.assert_close(instances.scores, expected.scores, **limits)


def test_one_picture_may_be_a_file_or_of_pillow(predictor, picture, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(picture)[:, :, ::-1]))
    turned.getexif()[0x0112] = 6  # a quarter to the right
    alone = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png"), turned]
    expected = predictor(picture)["instances"]
    for given in (picture, *alone):
        (of_one,) = predictor.predict(given)
        (in_tiles,) = TiledPredictor(predictor, Tiling(640, 640)).predict(given)
        for found in (predictor(given)["instances"], of_one, in_tiles):
            assert torch.equal(found.scores, expected.scores)
            assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_many_pictures_are_none_at_all_or_a_batch_at_least(predictor, tmp_path):
    assert list(predictor.predict([])) == []
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        list(predictor.predict([], batch_size=0))
    with pytest.raises(UnreadableImageError, match="no.png"):
        list(predictor.predict([tmp_path / "no.png"]))


def test_a_picture_of_pillow_that_is_cut_off_is_named_as_a_file_is(predictor, picture, tmp_path):
    path = tmp_path / "cut.png"
    cv2.imwrite(str(path), picture)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with Image.open(path) as opened:
        for given in (path, opened):
            with pytest.raises(UnreadableImageError, match="cut.png cannot be read .OSError"):
                predictor(given)
    with pytest.raises(UnreadableImageError, match="of Pillow cannot be read"):
        predictor(Image.open(io.BytesIO(path.read_bytes())))
