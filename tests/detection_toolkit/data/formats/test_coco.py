"""COCO JSON: a file, a folder with annotations/, and Roboflow's folders."""

import json

import pytest
from coco_files import make_document, write_dataset
from detectron2.data import MetadataCatalog
from format_files import make_splits, write_coco, write_images, write_roboflow_coco

from detection_toolkit.data import dataset_names, get_detection_dataset
from detection_toolkit.errors import UserError


@pytest.fixture
def splits():
    return make_splits()


def load(path, split=None, **kwargs):
    return get_detection_dataset(path=str(path), split=split, **kwargs)


def test_a_json_by_its_path_is_the_json(tmp_path):
    json_file, image_root = write_dataset(tmp_path)
    (name,) = dataset_names({"path": json_file})
    assert MetadataCatalog.get(name).json_file == json_file  # no copy
    assert load(json_file) == get_detection_dataset(json_file=json_file, image_root=image_root)


@pytest.mark.parametrize("images", ["images/{}2017", "{}2017", "images/{}", "{}", "images", "."])
def test_images_are_found_near_a_folder_of_annotations(tmp_path, splits, images):
    folder = write_coco(tmp_path, splits, images=images)
    (folder / "annotations/captions_train2017.json").write_text('{"images": [], "info": {}}')
    assert len(load(folder, "train")) == 4 and len(load(folder, "val")) == 2
    json_file = folder / "annotations" / "instances_val2017.json"
    assert len(load(json_file)) == 2
    everything = load(folder)
    assert len({d["file_name"] for d in everything}) == 6
    assert all(d["annotations"] for d in everything)


def test_the_undivided_export_of_cvat(tmp_path, splits):
    document = splits["train"]
    (tmp_path / "annotations").mkdir()
    json_file = tmp_path / "annotations" / "instances_default.json"
    json_file.write_text(json.dumps(document))
    write_images(tmp_path / "images" / "default", document["images"])
    assert len(load(tmp_path)) == len(load(json_file)) == 4


def test_roboflow_by_its_name_alone_and_without_the_group(tmp_path, splits):
    folder = write_roboflow_coco(tmp_path, splits)
    for split, count in (("train", 4), ("val", 2)):
        (name,) = dataset_names({"path": str(folder), "split": split})
        assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "bird"]
        assert len(load(folder, split)) == count
    assert len(load(folder)) == 6


def test_a_group_that_is_used_in_any_split_is_a_class(tmp_path, splits):
    splits["val"]["annotations"][0]["category_id"] = 0
    folder = write_roboflow_coco(tmp_path, splits)
    (name,) = dataset_names({"path": str(folder), "split": "train"})
    assert MetadataCatalog.get(name).thing_classes == ["animals", "cat", "dog", "bird"]


def test_masks_of_any_kind_stay(tmp_path, splits):
    counts = {"size": [64, 96], "counts": [0, 64 * 96]}
    splits["train"]["annotations"][0]["segmentation"] = counts
    folder = write_coco(tmp_path, splits)
    assert load(folder, "train")[0]["annotations"][0]["segmentation"]["size"] == [64, 96]


def test_several_files_of_a_split_are_named(tmp_path, splits):
    folder = write_coco(tmp_path, splits)
    other = folder / "annotations/instances_train2014.json"
    other.write_text(json.dumps(splits["train"]))
    with pytest.raises(UserError, match=r"several files of the split train: .*2014.*2017.*json_fi"):
        load(folder, "train")


def test_splits_of_other_categories_cannot_be_one(tmp_path, splits):
    splits["val"]["categories"].pop()
    with pytest.raises(UserError, match="other categories than the other splits"):
        load(write_coco(tmp_path, splits))


def test_what_is_wrong_with_entries_is_said_as_of_a_json(tmp_path):
    document = make_document()
    document["annotations"][1]["category_id"] = 4
    write_dataset(tmp_path, document)
    with pytest.raises(UserError, match="annotation 2 has category_id 4, which is not in 'cat"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd"])
def test_names_do_not_lead_out_either(tmp_path, name):
    document = make_document()
    write_dataset(tmp_path, document)
    document["images"][0]["file_name"] = name
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="allow_outside=true beside json_file or path"):
        load(tmp_path)
    with pytest.raises(UserError, match="allow_outside=true beside json_file or path"):
        load(tmp_path, "train")
