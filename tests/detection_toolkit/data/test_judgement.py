"""Data sets as the tools of others write them: repaired, or refused by name, on both routes."""

import codecs
import gc
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from coco_files import make_document, perfect_detections, write_dataset, write_image
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

from detection_toolkit.config import get_config
from detection_toolkit.data import dataset_names, get_detection_dataset, register_coco_json
from detection_toolkit.data.boxes import guess_layout
from detection_toolkit.data.documents import collector_paused
from detection_toolkit.data.findings import first_harm
from detection_toolkit.data.judgement import judge


def kinds(document, severity=None):
    found = judge(document).findings
    return {f.kind: f.count for f in found if severity in (None, f.severity)}


# What other tools write, and what of it is counted.


def bom(document):
    return codecs.BOM_UTF8 + json.dumps(document).encode()


def utf_16(document):
    return json.dumps(document, ensure_ascii=False).encode("utf-16")


def utf_16_without_mark(document):
    return json.dumps(document, ensure_ascii=False).encode("utf-16-be")


def signed_area(document):
    for annotation in document["annotations"]:
        annotation["area"] *= -1


def no_area(document):
    for annotation in document["annotations"]:
        del annotation["area"]


def areas_of_other_things(document):
    # In shares of the image, of another resolution, as text, and nothing.
    for annotation, area in zip(document["annotations"], [0.1, 12000, "750", None]):
        annotation["area"] = area


def ids_from_zero(document):
    for annotation in document["annotations"]:
        annotation["id"] -= 1


def ids_as_texts(document):
    for annotation in document["annotations"]:
        annotation["id"] = str(annotation["id"])


def whole_floats_for_ids(document):
    for key in ("images", "categories", "annotations"):
        for entry in document[key]:
            for name in ("id", "image_id", "category_id"):
                if name in entry:
                    entry[name] = float(entry[name])


def polygons_of_two_points(document):
    for annotation in document["annotations"]:
        annotation["segmentation"] = [[1, 2, 9, 9]]


def empty_masks(document):
    for annotation in document["annotations"]:
        annotation["segmentation"] = []


def odd_class_names(document):
    for category, name in zip(document["categories"], ["圆形", '<b>"&"</b>', "x%s{0}|a/b"]):
        category["name"] = name


REPAIRED = {
    bom: {"encoding": 1},
    utf_16: {"encoding": 1},
    utf_16_without_mark: {"encoding": 1},
    signed_area: {"area": 8},
    no_area: {"area": 8},
    areas_of_other_things: {"area": 4},
    ids_from_zero: {"renumbered": 1},
    ids_as_texts: {"renumbered": 8},
    whole_floats_for_ids: {"float_ids": 15},
    polygons_of_two_points: {"masks": 8},
    empty_masks: {},
    odd_class_names: {},
}


def write(folder, change):
    document = make_document()
    content = change(document) or json.dumps(document).encode()
    paths = write_dataset(folder)
    (folder / "annotations.json").write_bytes(content)
    return paths


def by_json(paths):
    config = {"json_file": paths[0], "image_root": paths[1]}
    return dataset_names(config)[0], get_detection_dataset(**config)


def by_name(paths):
    register_coco_instances("mine", {}, *paths)
    return dataset_names({"names": "mine"})[0], get_detection_dataset("mine")


@pytest.mark.parametrize("route", [by_json, by_name])
@pytest.mark.parametrize("change", REPAIRED)
def test_what_tools_write_is_used_alike_by_training_and_evaluation(tmp_path, caplog, change, route):
    _, expected = by_json(write_dataset(tmp_path / "sound"))
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        name, records = route(write(tmp_path / "other", change))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("detection_toolkit")]
    assert len(lines) == bool(REPAIRED[change])  # one line counts it
    for count in REPAIRED[change].values():
        assert f" {count} " in lines[0]

    for key in ("image_id", "height", "width"):
        assert [r[key] for r in records] == [r[key] for r in expected]
    objects = [[(a["category_id"], *a["bbox"]) for a in r["annotations"]] for r in records]
    assert objects == [[(a["category_id"], *a["bbox"]) for a in r["annotations"]] for r in expected]
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    evaluator.process(records, [perfect_detections(r) for r in records])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["APs"] == pytest.approx(100)  # of 750 pixels
    assert {k for k in metrics if "-" in k} == {
        f"AP-{c}" for c in MetadataCatalog.get(name).thing_classes
    }


def test_areas_that_masks_explain_are_kept():
    document = make_document()
    document["annotations"][0].update(area=0.2, segmentation=[[1, 2, 9, 2, 9, 9]])
    document["annotations"][1]["area"] = 20  # of a mask that was taken out
    assert kinds(document) == {}
    assert judge(document).repaired is None


def test_the_collector_is_on_again_after_reading(tmp_path):
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
    by_json(write_dataset(tmp_path))
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()  # whose it is, it stays
    finally:
        gc.enable()


def test_a_document_is_not_changed():
    document = make_document()
    signed_area(document)
    ids_from_zero(document)
    document["annotations"][1]["bbox"] = [80, 5, 30, 9]
    before = json.dumps(document)
    repaired = judge(document).repaired
    assert json.dumps(document) == before
    assert [a["id"] for a in repaired["annotations"]] == list(range(1, 9))
    assert repaired["annotations"][1]["area"] == 16 * 9
    assert judge(repaired).findings == []  # and what is repaired stays so


# Boxes in other layouts.


def scene(seed=0, count=40, height=64, width=96):
    """(N, 4) x, y, width, height of boxes all over images of one size; (N, 2) their sizes."""
    generator = np.random.default_rng(seed)
    sizes = np.tile([float(width), float(height)], (count, 1))
    sides = generator.uniform(0.1, 0.5, (count, 2)) * sizes
    return np.concatenate([generator.uniform(0, 1, (count, 2)) * (sizes - sides), sides], 1), sizes


def corners(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


LAYOUTS = {
    "corners": lambda boxes, sizes: corners(boxes),
    "swapped": lambda boxes, sizes: boxes[:, [1, 0, 3, 2]],
    "swapped_corners": lambda boxes, sizes: corners(boxes)[:, [1, 0, 3, 2]],
    "centres": lambda boxes, sizes: np.concatenate(
        [boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1
    ),
    "normalised": lambda boxes, sizes: boxes / np.tile(sizes, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_other_layouts_are_recognised(layout, seed):
    boxes, sizes = scene(seed)
    assert guess_layout(LAYOUTS[layout](boxes, sizes), sizes) == layout


def test_rounded_corners_are_recognised():
    boxes, sizes = scene()
    assert guess_layout(np.round(corners(boxes)), sizes) == "corners"


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_boxes_are_not_accused(seed):
    boxes, sizes = scene(seed)
    assert guess_layout(boxes, sizes) is None
    # Some reach out, even far.
    sloppy = boxes.copy()
    sloppy[:15, 2:] *= 2
    assert guess_layout(sloppy, sizes) is None
    # Large boxes at the left and above, all wider than they are far from the border, a few
    # pixels too large.
    large = np.concatenate([boxes[:, :2] * 0.1, sizes], 1)
    assert guess_layout(large, sizes) is None
    # Corners and sizes cannot be told apart by few.
    assert guess_layout(np.array([[30.0, 20, 70, 50]]), sizes[:1]) is None
    assert guess_layout(boxes[:0], sizes[:0]) is None


def with_boxes(boxes):
    document = make_document(num_images=len(boxes) // 4, boxes_per_image=4)
    for annotation, box in zip(document["annotations"], boxes):
        annotation.update(bbox=list(map(float, box)), area=abs(float(box[2] * box[3])))
    return document


def refused(tmp_path, document, message):
    """On both routes, where the checker finds harm."""
    paths = write_dataset(tmp_path, document)
    assert first_harm(judge(document).findings) is not None
    with pytest.raises(ValueError, match=message):
        register_coco_json(*paths)
    register_coco_instances("mine", {}, *paths)
    with pytest.raises(ValueError, match=f"data set mine: .*{message}"):
        dataset_names({"names": "mine"})


@pytest.mark.parametrize("layout, message", [
    ("corners", "look like x1, y1, x2, y2"),
    ("swapped", "look like y, x, height, width"),
    ("swapped_corners", "look like y1, x1, y2, x2"),
    ("centres", "look like centre x, centre y"),
    ("normalised", "look like shares of the image"),
])  # fmt: skip
def test_other_layouts_are_refused(tmp_path, layout, message):
    refused(tmp_path, with_boxes(LAYOUTS[layout](*scene())), message)


def test_boxes_that_all_are_whole_images_are_refused(tmp_path):
    boxes = np.tile([0, 0, 96, 64], (12, 1))
    refused(tmp_path, with_boxes(boxes), "12 of its 12 boxes cover their whole image")
    boxes[0] = [5, 5, 30, 30]
    assert kinds(with_boxes(boxes), "harm") == {}
    assert kinds(with_boxes(boxes), "note")["giant"] == 11


def test_crowds_alone_are_refused(tmp_path):
    document = make_document()
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    refused(tmp_path, document, "all 8 annotations have iscrowd 1")


def test_boxes_that_all_are_of_no_use_are_refused(tmp_path):
    document = with_boxes(np.tile([200, 5, 10, 10], (8, 1)))
    refused(tmp_path, document, "none of its 2 images has an object of use")


def test_a_registered_set_is_evaluated_as_written_where_boxes_only_reach_out(tmp_path):
    """COCO's numbers are those of the document; training clips."""
    document = make_document()
    document["annotations"][0]["bbox"] = [60, 10, 40, 20]  # of an image 96 pixels wide
    document["annotations"][0]["area"] = 800
    paths = write_dataset(tmp_path, document)
    _, records = by_name(paths)
    (box,) = [a["bbox"] for record in records for a in record["annotations"] if a["bbox"][0] == 60]
    assert box == [60, 10, 96, 30]
    assert MetadataCatalog.get("mine").json_file == paths[0]
    dataset_names({"names": "mine"})
    assert get_detection_dataset("mine") == records  # asked once more


def test_boxes_stay_as_written_for_evaluation_where_something_else_is_repaired(tmp_path):
    document = make_document()
    document["annotations"][0].update(bbox=[60, 10, 40, 20], area=-1)
    document["annotations"][1].update(bbox=[70, 10, 40, 20], area=800)
    paths = write_dataset(tmp_path, document)
    _, records = by_name(paths)
    boxes = [a["bbox"] for record in records for a in record["annotations"]]
    assert [60, 10, 96, 30] in boxes and [70, 10, 96, 30] in boxes
    evaluated = json.loads(Path(MetadataCatalog.get("mine").json_file).read_text())
    assert evaluated["annotations"][:2] == [
        {**document["annotations"][0], "area": 800.0},
        document["annotations"][1],
    ]
    assert get_detection_dataset("mine") == records  # asked once more


# File names of another system.


def test_windows_names_are_read(tmp_path, caplog):
    document = make_document()
    for image in document["images"]:
        image["file_name"] = rf"images\{image['file_name']}"
    write_dataset(tmp_path)
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    paths = str(tmp_path / "annotations.json"), str(tmp_path)
    with caplog.at_level(logging.WARNING, logger="detection_toolkit"):
        _, records = by_json(paths)
    assert records[0]["file_name"] == str(tmp_path / "images" / "1.png")
    assert "4 file names with \\ between folders" in caplog.text
    assert by_name(paths)[1] == records
    # With the folder that they begin with for the image folder, the advice is the right one.
    with pytest.raises(FileNotFoundError, match=f"set image_root={tmp_path}$"):
        register_coco_json(paths[0], str(tmp_path / "images"))


@pytest.mark.parametrize("name", ["BÉ.PNG", "be\u0301.png", "bé.png "])
def test_a_file_whose_name_is_spelled_in_another_way_is_named(tmp_path, name):
    json_file, root = write_dataset(tmp_path, num_images=1)
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "bé.png")
    document = make_document(1)
    document["images"][0]["file_name"] = name
    Path(json_file).write_text(json.dumps(document))
    with pytest.raises(FileNotFoundError, match="There is bé.png: case, accents and spaces must"):
        register_coco_json(json_file, root)


def test_ids_of_another_kind_are_named(tmp_path):
    document = make_document()
    for annotation in document["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    refused(tmp_path / "images", document, "image_id '1', which is not in 'images': there it is 1")


def test_categories_of_another_kind_are_named(tmp_path):
    document = make_document()
    for annotation in document["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
    refused(tmp_path, document, "category_id '7', which is not in 'categories': there it is 7")


@pytest.mark.parametrize("encoding", ["cp1252", "shift-jis"])
def test_other_encodings_than_unicode_are_named_with_the_cure(tmp_path, encoding):
    json_file, root = write_dataset(tmp_path)
    name = "étoile" if encoding == "cp1252" else "円形"
    text = json.dumps({**make_document(), "info": name}, ensure_ascii=False)
    Path(json_file).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="it is no text in Unicode .*as UTF-8"):
        register_coco_json(json_file, root)


def test_a_backslash_may_be_a_letter(tmp_path):
    document = make_document()
    document["images"][0]["file_name"] = r"a\1.png"
    paths = write_dataset(tmp_path, document)
    assert by_json(paths)[1][0]["file_name"].endswith(r"a\1.png")


@pytest.mark.parametrize("name", [r"..\1.png", r"C:\data\1.png", r"a\..\..\1.png"])
def test_windows_names_do_not_lead_out(tmp_path, name):
    json_file, root = write_dataset(tmp_path)
    write_image(tmp_path / "1.png")
    document = make_document()
    document["images"][0]["file_name"] = name
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="image 1 has file_name .*outside of the image folder"):
        register_coco_json(json_file, root)


# Config files that register data sets.

CONFIG = """
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

register_coco_instances("mine", {{}}, {0!r}, {1!r})
DatasetCatalog.register("other", lambda: load_coco_json({0!r}, {1!r}))
answer = dict(value={2})
"""


@pytest.mark.parametrize("change", [lambda document: None, no_area])
def test_a_config_that_registers_a_data_set_may_be_executed_again(tmp_path, change):
    paths = write(tmp_path, change)
    config = tmp_path / "config.py"
    for answer in (1, 2, 3):
        config.write_text(CONFIG.format(*paths, answer))
        assert get_config(str(config)).answer.value == answer
        assert dataset_names({"names": "mine"}) == ["mine"]
        assert len(get_detection_dataset("mine")) == 4
    # Outside of a config, and for something else, a name is taken.
    with pytest.raises(AssertionError, match="already registered"):
        register_coco_instances("mine", {}, *paths)
    other = write_dataset(tmp_path / "other")
    config.write_text(CONFIG.format(*other, 4))
    with pytest.raises(ValueError, match="'mine' is registered already, for something else"):
        get_config(str(config))
    with pytest.raises(AssertionError, match="already registered"):
        DatasetCatalog.register("mine", lambda: [])


def test_a_loader_of_ones_own_is_cleaned_and_evaluated_on_the_repaired_json(tmp_path):
    document = make_document()
    no_area(document)
    document["annotations"][0]["bbox"] = [80, 5, 30, 9]
    json_file, root = write_dataset(tmp_path, document)
    records = [
        {"file_name": f"{root}/1.png", "image_id": 1, "height": 64, "width": 96, "annotations": [
            {"bbox": [80, 5, 110, 14], "bbox_mode": 0, "category_id": 1}
        ]}
    ]  # fmt: skip
    DatasetCatalog.register("own", lambda: records)
    MetadataCatalog.get("own").set(json_file=json_file, image_root=root, evaluator_type="coco")
    (record,) = get_detection_dataset("own")
    assert record["annotations"][0]["bbox"] == [80, 5, 96, 14]
    evaluated = json.loads(open(MetadataCatalog.get("own").json_file).read())
    assert evaluated["annotations"][0]["bbox"] == [80, 5, 30, 9]  # as written
    assert evaluated["annotations"][0]["area"] == 30 * 9
