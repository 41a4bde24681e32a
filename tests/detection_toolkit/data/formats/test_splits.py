"""Splits of data sets, and images that are held out."""

import json
import logging

import pytest
from coco_files import make_document, write_dataset
from format_files import make_splits, write_yolo

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.findings import FindingCollector
from detection_toolkit.data.formats import divide, open_source, read_split
from detection_toolkit.data.formats.records import Part
from detection_toolkit.data.formats.splits import split_name
from detection_toolkit.errors import UserError


def names(dicts):
    return {d["file_name"].rpartition("/")[2] for d in dicts}


@pytest.fixture
def undivided(tmp_path):
    json_file, _ = write_dataset(tmp_path / "pets", make_document(num_images=10))
    return json_file


@pytest.mark.parametrize(
    ("called", "name"),
    [("valid", "val"), ("Validation", "val"), ("TRAIN", "train"), ("testing", "test"), ("a", None)],
)
def test_what_tools_call_splits(called, name):
    assert split_name(called) == name


def test_images_are_held_out_the_same_for_all_who_ask(undivided, caplog):
    with caplog.at_level(logging.INFO, "detection_toolkit"):
        train, val = (
            get_detection_dataset(path=undivided, split=split, val_share=0.3)
            for split in ("train", "val")
        )
    assert len(train) == 7 and len(val) == 3
    assert names(train) | names(val) == {f"{i}.png" for i in range(1, 11)}
    assert "no validation images: 3 of 10 are held out (val_share=0.3, split_seed=0)" in caplog.text
    assert caplog.text.count("held out") == 1
    # On every machine; another seed chooses others.
    assert names(val) == {"4.png", "5.png", "9.png"}
    other = get_detection_dataset(path=undivided, split="val", val_share=0.3, split_seed=1)
    assert len(other) == 3 and names(other) != names(val)


def test_an_image_that_is_added_moves_few_others(tmp_path):
    held_out = []
    for count in (20, 21):
        json_file, _ = write_dataset(tmp_path / str(count), make_document(num_images=count))
        held_out.append(names(get_detection_dataset(path=json_file, split="val")))
    assert len(held_out[0] & held_out[1]) >= len(held_out[0]) - 1


def test_train_and_test_without_val_hold_out_of_train(tmp_path):
    splits = make_splits(train=5, val=2)
    folder = write_yolo(tmp_path, {"train": splits["train"], "test": splits["val"]})
    source = open_source(folder)
    assert source.splits == ("train", "test")
    parts = {s: read_split(source, s).document["images"] for s in ("train", "val", "test")}
    assert {s: len(images) for s, images in parts.items()} == {"train": 4, "val": 1, "test": 2}
    assert len(source.read(None).document["images"]) == 7


@pytest.mark.parametrize(
    ("split", "share", "message"),
    [
        ("test", 0.2, "has no test images: it is not divided"),
        ("valid", 0.2, "split=valid: it is one of train, val, test"),
        ("val", 0.0, "shares of splits are above 0"),
        ("val", 1.0, "shares of splits are above 0"),
        ("val", -0.5, "shares of splits are above 0"),
    ],
)
def test_what_cannot_be_split(undivided, split, share, message):
    with pytest.raises(UserError, match=message):
        get_detection_dataset(path=undivided, split=split, val_share=share)


def test_a_split_that_is_not_there(tmp_path):
    folder = write_yolo(tmp_path, {"val": make_document()})
    with pytest.raises(UserError, match=r"has no train images: it has val \(data\.yaml names"):
        get_detection_dataset(path=str(folder), split="train")


def test_one_image_cannot_be_divided(tmp_path):
    json_file, _ = write_dataset(tmp_path, make_document(num_images=1))
    with pytest.raises(UserError, match="1 images cannot be divided into train, val"):
        get_detection_dataset(path=json_file, split="train")


def test_each_split_gets_an_image_and_none_is_in_two(undivided):
    part = open_source(undivided).read(None)
    parts = divide(part, {"train": 0.9, "val": 0.01, "test": 0.01}, seed=3)
    counts = [len(p.document["images"]) for p in parts.values()]
    assert counts == [8, 1, 1]
    ids = [i["id"] for p in parts.values() for i in p.document["images"]]
    assert sorted(ids) == sorted(i["id"] for i in part.document["images"])
    for p in parts.values():
        own = {i["id"] for i in p.document["images"]}
        assert {a["image_id"] for a in p.document["annotations"]} <= own
        assert p.document["categories"] == part.document["categories"]


def test_a_part_of_the_images_may_be_taken(undivided):
    part = open_source(undivided).read(None)
    (half,) = divide(part, {"sample": 0.5}, seed=0).values()
    assert len(half.document["images"]) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][3].pop("id"), r"4\.png.* has no 'id'"),
        (lambda d: d["images"].__setitem__(3, "x"), "image"),
        (lambda d: d["images"][3].update(id=[1]), "image"),
        (lambda d: d["annotations"].__setitem__(3, 5), "annotation"),
        (lambda d: d["annotations"][3].update(image_id=[1]), "annotation"),
        (lambda d: d.pop("images"), "not in COCO format: it has no list 'images'"),
        (lambda d: d.update(images={}), "not in COCO format: it has no list 'images'"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_entries_at_fault_are_named_also_where_images_are_held_out(
    tmp_path, change, message, split
):
    document = make_document(num_images=10)
    json_file, _ = write_dataset(tmp_path, document)
    change(document)
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        get_detection_dataset(path=json_file, split=split)


def test_a_document_that_is_a_list_cannot_be_divided(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    part = Part([], tmp_path, FindingCollector(), tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: not in COCO format"):
        divide(part, {"train": 0.5, "val": 0.5}, seed=0)
