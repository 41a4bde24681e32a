import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import make_document, perfect_detections, write_dataset, xyxy
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from detection_toolkit.data import (
    check_same_classes,
    dataset_names,
    dataset_num_classes,
    get_detection_dataset,
    register_coco_json,
    register_data,
)
from detection_toolkit.data.files import missing_files


def load(document, tmp_path, **kwargs):
    json_file, image_root = write_dataset(tmp_path, document)
    return get_detection_dataset(json_file=json_file, image_root=image_root, **kwargs)


def evaluate_ground_truth(json_file, image_root, output):
    """COCO's metrics of the ground truth as the loader gives it, taken for detections."""
    config = {"json_file": json_file, "image_root": image_root}
    (name,) = dataset_names(config)
    records = get_detection_dataset(**config, filter_empty=False)
    evaluator = COCOEvaluator(name, output_dir=str(output))
    evaluator.reset()
    evaluator.process(records, [perfect_detections(r) for r in records])
    return evaluator.evaluate()


def test_a_json_becomes_a_data_set_with_class_names(tmp_path):
    json_file, image_root = write_dataset(tmp_path)
    config = {"names": "coco_2017_train", "json_file": json_file, "image_root": image_root}
    (name,) = dataset_names(config)  # the JSON takes the place of the name
    assert dataset_num_classes([name]) == dataset_num_classes(name) == 3
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog", "bird"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 90: 2}
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == json_file  # nothing to repair
    dicts = get_detection_dataset(**config)
    assert len(dicts) == 4
    assert {a["category_id"] for d in dicts for a in d["annotations"]} == {0, 1, 2}


def test_classes_are_sorted_by_their_ids_and_images_by_theirs(tmp_path):
    document = make_document(num_images=6)
    document["categories"].reverse()
    random.Random(0).shuffle(document["images"])
    random.Random(1).shuffle(document["annotations"])
    dicts = load(document, tmp_path)
    assert [d["image_id"] for d in dicts] == [1, 2, 3, 4, 5, 6]
    name = register_coco_json(str(tmp_path / "annotations.json"), str(tmp_path / "images"))
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "bird"]


def test_registering_again_is_no_error(tmp_path):
    paths = write_dataset(tmp_path)
    assert register_coco_json(*paths) == register_coco_json(*paths)
    assert register_coco_json(*paths, name="mine") == register_coco_json(*paths, name="mine")


def test_the_image_folder_defaults_to_that_of_the_json(tmp_path):
    json_file, image_root = write_dataset(tmp_path)
    document = json.loads((tmp_path / "annotations.json").read_text())
    beside = tmp_path / "images" / "annotations.json"
    beside.write_text(json.dumps(document))
    dicts = get_detection_dataset(json_file=str(beside))
    assert dicts[0]["file_name"] == str(tmp_path / "images" / "1.png")


def test_names_need_not_be_ascii(tmp_path):
    document = make_document()
    document["categories"][0]["name"] = "猫"
    document["images"][0]["file_name"] = "schön ☃.png"
    folder = tmp_path / "données è"
    dicts = load(document, folder)
    assert dicts[0]["file_name"] == str(folder / "images" / "schön ☃.png")
    name = register_coco_json(str(folder / "annotations.json"), str(folder / "images"))
    assert MetadataCatalog.get(name).thing_classes[0] == "猫"


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        register_coco_json(str(tmp_path / "nowhere.json"), str(tmp_path))


def test_a_missing_image_folder_is_named(tmp_path):
    json_file, _ = write_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="image folder .*pictures .*set image_root"):
        register_coco_json(json_file, str(tmp_path / "pictures"))


def test_a_wrong_image_folder_is_named_at_once(tmp_path):
    json_file, _ = write_dataset(tmp_path)
    message = r"annotations\.json: .*does not hold its images.*1\.png.*set image_root=.*images$"
    with pytest.raises(FileNotFoundError, match=message):
        register_coco_json(json_file, str(tmp_path))


def test_one_image_that_is_there_is_enough_for_the_right_folder(tmp_path):
    json_file, image_root = write_dataset(tmp_path, make_document(num_images=30))
    for number in range(1, 30):
        (tmp_path / "images" / f"{number}.png").unlink()
    assert len(get_detection_dataset(json_file=json_file, image_root=image_root)) == 30


def test_missing_files_are_found_in_all_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/b/2.png", "here.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    there = [str(tmp_path / "a/1.png"), str(tmp_path / "a/../a/b/2.png"), "here.png", "s3://x/y"]
    absent = [str(tmp_path / "a/2.png"), str(tmp_path / "c/1.png"), "gone.png"]
    assert missing_files([*there, *absent]) == absent
    # A disk that takes another spelling for the same.
    monkeypatch.setattr("os.listdir", lambda folder: ["HERE.PNG"])
    assert missing_files(["here.png"]) == []


def test_class_names_of_a_set_registered_without_them_are_read_from_its_json(tmp_path):
    document = make_document()
    document["categories"].reverse()
    json_file, image_root = write_dataset(tmp_path, document)
    register_coco_instances("without_names", {}, json_file, image_root)
    try:
        assert dataset_num_classes("without_names") is None
        assert dataset_names({"names": "without_names"}, with_files=False) == ["without_names"]
        assert MetadataCatalog.get("without_names").thing_classes == ["cat", "dog", "bird"]
        assert len(get_detection_dataset("without_names")) == 4  # Detectron2 agrees
    finally:
        DatasetCatalog.remove("without_names")
        MetadataCatalog.remove("without_names")


def test_names_alone_need_no_files():
    dataset = {"names": "coco_2014_train"}
    assert dataset_names(dataset, with_files=False) == ["coco_2014_train"]
    assert dataset_num_classes("coco_2014_train") == 80


def test_an_unknown_name_is_named_with_similar_ones():
    with pytest.raises(KeyError, match="no data set is registered as 'shapes_vall'.*shapes_val"):
        get_detection_dataset("shapes_vall")


def test_an_image_folder_without_a_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_root=.* is given without json_file"):
        get_detection_dataset("shapes_val", image_root=str(tmp_path))


def test_no_data_set_at_all_is_refused():
    with pytest.raises(ValueError, match="needs names, or json_file and image_root"):
        dataset_names({"names": None, "json_file": None})


def test_coco_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="instances_train2014.*DETECTRON2_DATASETS"):
        get_detection_dataset("coco_2014_train")


@pytest.mark.parametrize("content", [b"{ not json", b'{"images": "\xff"}', b""])
def test_a_file_that_is_not_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json cannot be read as JSON"):
        register_coco_json(str(path))


def test_a_json_that_is_no_object(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json: not in COCO format: its top level"):
        register_coco_json(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("images"), "no list 'images'"),
        (lambda d: d.update(images=[]), "no list 'images', or an empty one"),
        (lambda d: d.pop("categories"), "no list 'categories'"),
        (lambda d: d.update(categories=[]), "no list 'categories', or an empty one"),
        (lambda d: d.update(annotations={}), "it has no list 'annotations'"),
        (lambda d: d["images"][1].pop("width"), "image .* has no 'width'"),
        (lambda d: d["images"][1].update(width=0), "image 2 has width 0"),
        (lambda d: d["images"][1].update(height="64"), "image 2 has height '64'"),
        (lambda d: d["images"][1].update(file_name=2), "image 2 has file_name 2"),
        (lambda d: d["images"][1].update(id=1), "image id 1 occurs more than once"),
        (lambda d: d["images"][1].update(id="2"), "some image ids are numbers and others"),
        (lambda d: d["images"][1].update(id=[2]), "image id .* neither a whole number nor a text"),
        (lambda d: d["images"].append("x.png"), "image 'x.png' is not an object"),
        (lambda d: d["categories"][2].update(id=3), "category id 3 occurs more than once"),
        (lambda d: d["categories"][2].update(name=3), "category 90 has a name that is not a text"),
        (
            lambda d: d["categories"][2].update(name="cat"),
            "categories 3 and 90 are both named 'cat': rename one",
        ),
        (lambda d: d["categories"][2].pop("name"), "category .* has no 'name'"),
        (lambda d: d["annotations"][1].update(id=1), "annotation id 1 occurs more than once"),
        (lambda d: d["annotations"][4].update(category_id=5), "annotation 5 has category_id 5"),
        (lambda d: d["annotations"][4].update(category_id=[3]), "annotation 5 has category_id"),
        (lambda d: d["annotations"][4].update(image_id=99), "annotation 5 has image_id 99"),
        (lambda d: d["annotations"][2].update(bbox=[1, 2, 3]), r"annotation 3 has bbox \[1, 2, 3"),
        (lambda d: d["annotations"][2].update(bbox=[1, 2, 3, "4"]), "annotation 3 has bbox"),
        (lambda d: d["annotations"][2].update(bbox=None), "annotation 3 has bbox None"),
        (lambda d: d["annotations"][2].pop("bbox"), "annotation .* has no 'bbox'"),
        (lambda d: d["annotations"][2].update(ignore=1), "annotation 3 has 'ignore' set"),
    ],
)
def test_what_is_not_coco_format_is_named(tmp_path, change, message):
    json_file, image_root = write_dataset(tmp_path)
    document = make_document()
    change(document)
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"annotations\.json.*{message}"):
        register_coco_json(json_file, image_root)


FAULTY_BOXES = [
    [10, 10, 20, 20],  # nothing wrong
    [10, 10, 0, 20],
    [10, 10, 20, -3],
    [200, 10, 20, 20],
    [-5, 10, 20, 20],
    [10, 10, float("nan"), 20],
    [80, 50, 20, 20],
    [10, float("inf"), 10, 20],
]
COUNTS = [
    "2 boxes without area (dropped)",
    "1 boxes outside of their image (dropped)",
    "2 boxes reaching out of their image (clipped)",
    "2 boxes that are not finite (dropped)",
]
GOOD_BOXES = [[10, 10, 30, 30], [0, 10, 15, 30], [80, 50, 96, 64]]


def test_faulty_boxes_of_a_json_are_dropped_or_clipped_and_counted_in_one_line(tmp_path, caplog):
    document = make_document(num_images=1, boxes_per_image=len(FAULTY_BOXES))
    for annotation, box in zip(document["annotations"], FAULTY_BOXES):
        annotation["bbox"] = box
    json_file, _ = write_dataset(tmp_path, document)
    content = (tmp_path / "annotations.json").read_bytes()
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        (image,) = load(document, tmp_path)
    assert [xyxy(a) for a in image["annotations"]] == GOOD_BOXES
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("detection_toolkit")]
    assert message.startswith(f"{json_file}: ")
    for count in COUNTS:
        assert count in message
    assert (tmp_path / "annotations.json").read_bytes() == content


def test_faulty_boxes_of_a_registered_data_set_likewise(caplog):
    boxes = [np.array([x, y, x + w, y + h]) for x, y, w, h in FAULTY_BOXES]
    annotations = [{"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for b in boxes]
    records = [{"file_name": "a.png", "height": 64, "width": 96, "annotations": annotations}]
    DatasetCatalog.register("own_loader", lambda: records)
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        (image,) = get_detection_dataset("own_loader")
    assert [xyxy(a) for a in image["annotations"]] == GOOD_BOXES
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("detection_toolkit")]
    assert message.startswith("own_loader: ")
    for count in COUNTS:
        assert count in message
    assert len(records[0]["annotations"]) == len(FAULTY_BOXES)  # whose they are, they stay
    assert records[0]["annotations"][4]["bbox"].tolist() == [-5, 10, 15, 30]


def test_rounding_at_the_border_is_not_worth_a_word(tmp_path, caplog):
    document = make_document(num_images=1, boxes_per_image=1)
    document["annotations"][0].update(bbox=[-0.004, 10, 20, 20], area=400)
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        (image,) = load(document, tmp_path)
    assert len(image["annotations"]) == 1
    assert not [r for r in caplog.records if r.name.startswith("detection_toolkit")]


def test_an_object_without_a_usable_polygon_is_kept(tmp_path):
    document = make_document(num_images=1)
    document["annotations"][0]["segmentation"] = [[4, 6, 34, 31]]  # two corners
    document["annotations"][1]["segmentation"] = [[14, 11, 44, 11, 44, 36]]
    (image,) = load(document, tmp_path)
    assert ["segmentation" in a for a in image["annotations"]] == [False, True]


def test_images_without_objects_are_kept_on_request(tmp_path):
    document = make_document(num_images=3)
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 2]
    assert [d["image_id"] for d in load(document, tmp_path)] == [1, 3]
    kept = load(document, tmp_path, filter_empty=False)
    assert [d["image_id"] for d in kept] == [1, 2, 3]
    assert kept[1]["annotations"] == []


def test_an_image_that_loses_its_last_box_counts_as_empty(tmp_path):
    document = make_document(num_images=2, boxes_per_image=1)
    document["annotations"][0]["bbox"] = [500, 500, 10, 10]
    assert [d["image_id"] for d in load(document, tmp_path)] == [2]


def test_an_image_with_crowds_only_counts_as_empty(tmp_path):
    document = make_document(num_images=2, boxes_per_image=1)
    document["annotations"][0]["iscrowd"] = 1
    assert [d["image_id"] for d in load(document, tmp_path)] == [2]


def test_no_image_with_objects_is_an_error(tmp_path):
    document = make_document(num_images=2, boxes_per_image=0)
    with pytest.raises(ValueError, match="none of the 2 images has an object"):
        load(document, tmp_path)


def test_a_registered_data_set_without_images_is_an_error():
    DatasetCatalog.register("nothing", lambda: [])
    with pytest.raises(ValueError, match="data set nothing cannot be used: .*empty"):
        get_detection_dataset("nothing")


def test_several_data_sets_follow_each_other_and_must_agree_in_their_classes(tmp_path):
    one = register_coco_json(*write_dataset(tmp_path / "one", num_images=2))
    two = register_coco_json(*write_dataset(tmp_path / "two", num_images=3))
    assert [d["image_id"] for d in get_detection_dataset([two, one])] == [1, 2, 3, 1, 2]
    document = make_document()
    document["categories"][1]["name"] = "wolf"
    other = register_coco_json(*write_dataset(tmp_path / "other", document))
    with pytest.raises(ValueError, match=f"only {one} has 'dog'; only {other} has 'wolf'"):
        get_detection_dataset([one, other])


def test_classes_that_differ_are_named():
    check_same_classes(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="of x and y differ: only x has 'b'; only y has 'c'"):
        check_same_classes(["a", "b"], ["a", "c"], "x", "y")
    with pytest.raises(ValueError, match="only the test set has 'c'"):
        check_same_classes(["a", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="class 0 is 'a' there and 'b' here"):
        check_same_classes(["a", "b"], ["b", "a"])
    with pytest.raises(ValueError, match="they have 1 and 2 classes"):
        check_same_classes(["a"], ["a", "a"])


def test_the_number_of_classes_is_unknown_where_nothing_says_it():
    DatasetCatalog.register("nameless", lambda: [])
    assert dataset_num_classes("nameless") is None
    assert dataset_num_classes(["coco_2017_train", "coco_2017_val"]) == 80


def test_a_name_cannot_stand_for_two_data_sets(tmp_path):
    json_file, image_root = write_dataset(tmp_path / "one")
    register_coco_json(json_file, image_root, name="same_name")
    other_json, other_root = write_dataset(tmp_path / "two")
    with pytest.raises(ValueError, match="'same_name' is taken already, by .*one"):
        register_coco_json(other_json, other_root, name="same_name")
    with pytest.raises(ValueError, match="'same_name' is taken already, by .*one"):
        register_coco_json(json_file, other_root, name="same_name")
    register_data(json_file, name="same_data")
    with pytest.raises(ValueError, match=r"'same_data' is taken already, by .*one/\S*\.json$"):
        register_data(other_json, name="same_data")
    with pytest.raises(ValueError, match="'coco_2017_val' is taken already"):
        register_coco_json(json_file, image_root, name="coco_2017_val")


def untouched(document):
    pass


def with_faulty_boxes(document):
    for annotation, box in zip(document["annotations"], FAULTY_BOXES):
        annotation["bbox"] = box


def without_optional_fields(document):
    del document["info"]
    for annotation in document["annotations"]:
        del annotation["area"], annotation["iscrowd"]


def with_ids_from_zero(document):
    for entries, key in [("images", "image_id"), ("categories", "category_id")]:
        new = {entry["id"]: i for i, entry in enumerate(document[entries])}
        for entry in document[entries]:
            entry["id"] = new[entry["id"]]
        for annotation in document["annotations"]:
            annotation[key] = new[annotation[key]]
    for annotation in document["annotations"]:
        annotation["id"] -= 1


def with_texts_for_ids(document):
    for image in document["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in document["annotations"]:
        annotation["id"] = f"object {annotation['id']}"
        annotation["image_id"] = f"image {annotation['image_id']}"


def with_a_crowd(document):
    document["annotations"][0]["iscrowd"] = 1


def with_an_empty_image(document):
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 2]


@pytest.mark.parametrize(
    "change",
    [
        untouched,
        with_faulty_boxes,
        without_optional_fields,
        with_ids_from_zero,
        with_texts_for_ids,
        with_a_crowd,
        with_an_empty_image,
    ],
)
def test_ground_truth_scored_against_itself_has_ap_100(tmp_path, change):
    # Through the mapping of the gappy category ids 3, 7, 90 to 0, 1, 2 and back.
    document = make_document(num_images=6)
    change(document)
    json_file, image_root = write_dataset(tmp_path, document)
    results = evaluate_ground_truth(json_file, image_root, tmp_path / "out")
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    assert {k for k in results["bbox"] if "-" in k} == {"AP-cat", "AP-dog", "AP-bird"}
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in written} == {c["id"] for c in document["categories"]}


def test_an_object_that_is_not_found_costs_ap(tmp_path):
    # The counterpart of the test above: the score does depend on the detections.
    json_file, image_root = write_dataset(tmp_path, num_images=6)
    (name,) = dataset_names({"json_file": json_file, "image_root": image_root})
    records = get_detection_dataset(name)
    found = [perfect_detections(r) for r in records]
    found[0]["instances"] = found[0]["instances"][:1]
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(records, found)
    assert evaluator.evaluate()["bbox"]["AP"] < 95


def test_a_test_set_without_annotations_gives_a_submission_only(tmp_path):
    document = make_document()
    del document["annotations"]
    json_file, image_root = write_dataset(tmp_path, document)
    config = {"json_file": json_file, "image_root": image_root}
    (name,) = dataset_names(config)
    records = get_detection_dataset(**config, filter_empty=False)
    assert [d["image_id"] for d in records] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="none of the 4 images has an object"):
        get_detection_dataset(**config)

    instances = Instances((64, 96))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2, 11, 22]]))
    instances.pred_classes = torch.tensor([2])
    instances.scores = torch.tensor([0.5])
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(records[:1], [{"instances": instances}])
    assert not evaluator.evaluate()
    submission = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert submission == [
        {"image_id": 1, "category_id": 90, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.5}
    ]


def test_a_completed_copy_goes_elsewhere_when_the_home_folder_cannot_be_written(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # no folder can be made in a file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    document = make_document()
    without_optional_fields(document)
    json_file, image_root = write_dataset(tmp_path / "set", document)
    results = evaluate_ground_truth(json_file, image_root, tmp_path / "out")
    assert results["bbox"]["AP"] == pytest.approx(100.0)
    (copy,) = tmp_path.glob("detection_toolkit-annotations-*/*")
    assert copy.suffix == ".json"


def test_a_data_set_has_the_name_of_its_file_unless_another_has_it(tmp_path):
    json_file, image_root = write_dataset(tmp_path / "one")
    named = Path(json_file).rename(tmp_path / "wheel_nuts.json")
    assert register_coco_json(str(named), image_root) == "wheel_nuts"
    assert register_coco_json(str(named), image_root) == "wheel_nuts"
    json_file, image_root = write_dataset(tmp_path / "two")
    other = Path(json_file).rename(tmp_path / "two" / "wheel_nuts.json")
    name = register_coco_json(str(other), image_root)
    assert name.startswith("wheel_nuts_") and name == register_coco_json(str(other), image_root)
    assert register_coco_json(str(named), str(tmp_path / "one" / "images")) == "wheel_nuts"
