"""Masks by run lengths: those that nothing can decode are left out, and their objects used."""

import json

import numpy as np
import pytest
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from pycocotools import mask as coco_masks

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.repairs import _compressed_pixels


def compressed(mask):
    return coco_masks.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


@pytest.mark.parametrize("seed", range(8))
def test_the_runs_of_a_mask_fill_it(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 400, 2)
    mask = random.random((height, width)) < random.choice([0.0, 0.01, 0.5, 0.99, 1.0])
    assert _compressed_pixels(compressed(mask)) == height * width
    large = np.zeros((5000, 4000), np.uint8)
    large[seed:4000, 100:3000] = 1
    assert _compressed_pixels(compressed(large)) == large.size


@pytest.mark.parametrize(
    "text", ["", "P", "é", "\ud800", " ", "0\0", "_" * 20 + "0", "0" * 7 + "P", "@", "O", "\x7f"]
)
def test_what_are_no_runs_is_known(text):
    found = _compressed_pixels(text)
    assert found is None or found < 0 or found != 64 * 96


def document_with(mask):
    document = make_document()
    image = document["images"][0]
    for annotation in document["annotations"]:
        if annotation["image_id"] == image["id"]:
            annotation["segmentation"] = mask(image["height"], image["width"])
    return document


SOUND = {
    "list": lambda h, w: {"size": [h, w], "counts": [5, h * w - 5]},
    "compressed": lambda h, w: {"size": [h, w], "counts": compressed(np.eye(h, w))},
}
IMPOSSIBLE = {
    "too few": lambda h, w: {"size": [h, w], "counts": [5, 3]},
    "too many": lambda h, w: {"size": [h, w], "counts": [5, h * w]},
    "negative": lambda h, w: {"size": [h, w], "counts": [-5, h * w + 5]},
    "beyond 32 bits": lambda h, w: {"size": [2**20, 2**20], "counts": [2**40]},
    "beyond 64 bits": lambda h, w: {"size": [2**70, 1], "counts": [2**70]},
    "of another image": lambda h, w: {"size": [h + 1, w], "counts": [(h + 1) * w]},
    "without end": lambda h, w: {"size": [h, w], "counts": "P"},
    "of another size": lambda h, w: {"size": [h, w], "counts": compressed(np.eye(h + 1, w))},
    "no letters": lambda h, w: {"size": [h, w], "counts": "\x01\x02"},
    "empty text": lambda h, w: {"size": [h, w], "counts": ""},
    "true": lambda h, w: {"size": [h, w], "counts": [True, h * w - 1]},
    "texts": lambda h, w: {"size": [h, w], "counts": ["5", "3"]},
    "nested": lambda h, w: {"size": [h, w], "counts": [[5], [3]]},
    "no size": lambda h, w: {"counts": [h * w]},
    "negative size": lambda h, w: {"size": [-h, -w], "counts": [h * w]},
}


def load(folder, mask):
    json_file, root = write_dataset(folder)
    (folder / "annotations.json").write_text(json.dumps(document_with(mask)))
    return get_detection_dataset(json_file=json_file, image_root=root)


@pytest.mark.parametrize("kind", SOUND)
def test_sound_masks_are_kept(tmp_path, kind):
    record = load(tmp_path, SOUND[kind])[0]
    assert all("segmentation" in a for a in record["annotations"])


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_masks_are_left_out_and_end_nothing(tmp_path, kind):
    records = load(tmp_path, IMPOSSIBLE[kind])
    assert records[0]["annotations"]
    assert all("segmentation" not in a for a in records[0]["annotations"])
    DatasetMapper(True, augmentations=[], image_format="RGB", use_instance_mask=True)(records[0])


@pytest.mark.parametrize("name", ["http://a.org/x.png", "s3://a/x.png", "file:///etc/x.png"])
def test_an_address_is_no_file_of_the_folder(tmp_path, name):
    json_file, root = write_dataset(tmp_path)
    document = make_document()
    document["images"][0]["file_name"] = name
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="image 1 .* is an address"):
        get_detection_dataset(json_file=json_file, image_root=root)


def test_a_missing_file_with_an_address_in_its_name_is_missing(tmp_path):
    json_file, root = write_dataset(tmp_path)
    document = make_document()
    document["images"][0]["file_name"] = "sub/http://a.org/x.png"
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    cfg = get_config("stageinteractor/shapes_tiny.py")
    place = "dataloader.train.dataset"
    apply_overrides(cfg, [f"{place}.json_file='{json_file}'", f"{place}.image_root='{root}'"])
    with pytest.raises((OSError, ValueError), match="http://a.org/x.png"):
        instantiate(cfg.dataloader.train)
