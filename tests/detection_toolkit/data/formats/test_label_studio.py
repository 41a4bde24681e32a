"""Label Studio's JSON and JSON_MIN."""

import json

import pytest

from detection_toolkit.errors import UserError


def rectangle(label, x, y, width, height, rotation=0, **value):
    return {
        "id": "x",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 96,
        "original_height": 64,
        "image_rotation": 0,
        "value": {
            **{"x": x, "y": y, "width": width, "height": height, "rotation": rotation},
            "rectanglelabels": [label],
            **value,
        },
    }


def task(*results, number=1, image="/data/upload/1/0a1b2c3d-a.png", **annotation):
    return {
        "id": number,
        "annotations": [{"id": 1, "result": [*results], "was_cancelled": False, **annotation}],
        "predictions": [],
        "data": {"image": image},
    }


@pytest.fixture
def export(read):
    """Writes tasks, and the image of most of them."""
    read.image("images/a.png")

    def write(*tasks):
        read.write("export.json", json.dumps(tasks, indent=1))
        return read

    return write


def test_rectangles_in_percents(export):
    read = export(task(rectangle("cat", 25, 50, 50, 25), rectangle("dog", 0, 0, 100, 100)))
    expected = {"images/a.png": [("cat", 24, 32, 72, 48), ("dog", 0, 0, 96, 64)]}
    assert read() == read("export.json") == expected


@pytest.mark.parametrize(
    "image",
    [
        "/data/upload/1/0a1b2c3d-a.png",
        "/data/local-files/?d=pets/images/a.png",
        "s3://bucket/pets/a.png",
        "https://x.org/pets/a.png?token=1",
        "upload/0a1b2c3d-a.png",
        "a.png",
    ],
)
def test_images_are_found_by_the_addresses_of_tasks(export, image):
    assert list(export(task(rectangle("cat", 25, 50, 50, 25), image=image))()) == ["images/a.png"]


def test_a_rotated_rectangle_turns_about_its_corner(export):
    read = export(task(rectangle("cat", 50, 25, 25, 25, rotation=90)))
    # 24 wide and 16 high from (48, 16); what was its right side is now at the bottom.
    assert read() == {"images/a.png": [("cat", 32, 16, 48, 40)]}
    assert read.findings()["rotated"] == "export.json, task with id 1: cat, by 90 degrees"


def test_polygons_ellipses_and_tags_of_their_own(export, caplog):
    polygon = {"points": [[0, 0], [50, 0], [25, 50]], "polygonlabels": ["dog"]}
    ellipse = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25, "ellipselabels": ["dog"]}
    labels = {"x": 25, "y": 50, "width": 50, "height": 25, "labels": ["cat"]}
    brush = {"format": "rle", "rle": [1], "brushlabels": ["dog"]}
    results = [{"type": "x", "value": v} for v in (polygon, ellipse, labels, brush)]
    results.append({"type": "choices", "value": {"choices": ["good"]}})
    read = export(task(*results))
    boxes = [("dog", 0, 0, 48, 32), ("dog", 24, 16, 72, 48), ("cat", 24, 32, 72, 48)]
    assert read() == {"images/a.png": boxes}
    assert "1 shapes that have no box (left out)" in caplog.text


def test_json_min(read):
    read.image("a.png")
    shape = {**rectangle("cat", 25, 50, 50, 25)["value"], "original_width": 96}
    shape["original_height"] = 64
    entry = {"image": "/data/upload/1/0a1b2c3d-a.png", "id": 1, "label": [shape], "annotator": 1}
    read.write("export.json", json.dumps([entry]))
    assert read() == {"a.png": [("cat", 24, 32, 72, 48)]}


def test_of_several_annotators_the_one_who_is_right(export, caplog):
    entry = task(rectangle("cat", 25, 50, 50, 25))
    entry["annotations"] += [
        {"result": [rectangle("dog", 0, 0, 50, 50)], "was_cancelled": True},
        {"result": [rectangle("cow", 0, 0, 50, 50)], "ground_truth": True},
    ]
    assert export(entry)() == {"images/a.png": [("cow", 0, 0, 48, 32)]}
    assert "several people annotated (the first one is taken)" in caplog.text


def test_images_without_annotations_are_background(export):
    read = export(task(), task(rectangle("cat", 0, 0, 50, 50), number=2, image="b.png"))
    read.image("images/b.png")
    assert read() == {"images/a.png": [], "images/b.png": [("cat", 0, 0, 48, 32)]}


def test_images_are_held_out(export):
    tasks = [task(rectangle("cat", 0, 0, 50, 50), image=f"{i}.png") for i in range(5)]
    read = export(*tasks)
    for i in range(5):
        read.image(f"{i}.png")
    assert len(read(split="train")) == 4 and len(read(split="val")) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (task(rectangle("cat", "x", 0, 1, 1)), "task with id 1: has x 'x', which is no number"),
        (task(rectangle("cat", 0, 0, None, 1)), "task with id 1: has no width"),
        (task(rectangle("", 0, 0, 1, 1)), "has a rectangle without a label"),
        (task({"value": {"points": [1], "polygonlabels": ["a"]}}), "has points that are not pairs"),
        (task(image=""), "its data name no picture"),
        (task(image="gone.png"), r"gone\.png is not there, and nothing says its size"),
        ({"annotations": 3, "id": 4}, "task with id 4: has annotations that is no list"),
        ({"annotations": [3]}, "task 1: an annotation is no object with keys"),
        (5, "task 1: it is no object with keys"),
    ],
)
def test_what_is_wrong_is_named_by_its_task(export, entry, message):
    with pytest.raises(UserError, match=rf"export\.json, {message}|export\.json, .*{message}"):
        export(entry, task(rectangle("cat", 0, 0, 50, 50), number=2))()


def test_addresses_do_not_lead_out(export):
    read = export(task(rectangle("cat", 0, 0, 50, 50), image="../../../etc/secret.png"))
    with pytest.raises(UserError, match="leads upwards"):
        read()


def test_an_address_that_is_none_is_named(export):
    read = export(task(rectangle("cat", 0, 0, 50, 50), image="http://[x.jpg"))
    message = r"task with id 1: has the picture http://\[x\.jpg, which is no address"
    with pytest.raises(UserError, match=message):
        read()
