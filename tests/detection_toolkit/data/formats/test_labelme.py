"""labelme's JSON files."""

import json

import pytest

from detection_toolkit.errors import UserError


def content(image, *shapes, **keys):
    return json.dumps(
        {
            "version": "5.5.0",
            "flags": {},
            "shapes": [
                {
                    "label": label,
                    "points": points,
                    "group_id": None,
                    "shape_type": kind,
                    "flags": {},
                }
                for label, kind, points in shapes
            ],
            "imagePath": image,
            "imageData": None,
            "imageHeight": 64,
            "imageWidth": 96,
            **keys,
        },
        indent=2,
    )


def test_shapes_beside_their_image(read, caplog):
    read.image("a.png")
    shapes = [
        ("cat", "rectangle", [[40.5, 50], [10, 20]]),
        ("dog", "polygon", [[1, 2], [30, 4], [20, 40]]),
        ("dog", "circle", [[50, 30], [53, 34]]),
        ("dog", "line", [[50, 30], [53, 34]]),
        ("__ignore__", "rectangle", [[1, 1], [5, 5]]),
    ]
    read.write("a.json", content("a.png", *shapes))
    boxes = [("cat", 10, 20, 40.5, 50), ("dog", 1, 2, 30, 40), ("dog", 45, 25, 55, 35)]
    assert read() == read("a.json") == {"a.png": boxes}
    assert "1 shapes that have no box (left out)" in caplog.text


@pytest.mark.parametrize("image", ["../images/a.png", "..\\images\\a.png", "C:\\x\\images\\a.png"])
def test_images_in_another_folder(read, image):
    read.image("images/a.png")
    read.write("annotations/a.json", content(image, ("cat", "rectangle", [[1, 2], [3, 4]])))
    assert read() == {"images/a.png": [("cat", 1, 2, 3, 4)]}


def test_splits_and_a_table_of_classes(read):
    for split, label in (("train", "dog"), ("val", "cat")):
        read.image(f"{split}/{label}.png")
        shape = (label, "rectangle", [[1, 2], [3, 4]])
        read.write(f"{split}/{label}.json", content(f"{label}.png", shape))
    read.write("labels.txt", "__ignore__\n_background_\ndog\ncat\nbird\n")
    from detection_toolkit.data.formats import open_source

    document = open_source(read.folder).read("train").document
    assert [c["name"] for c in document["categories"]] == ["dog", "cat", "bird"]
    assert read(split="val") == {"val/cat.png": [("cat", 1, 2, 3, 4)]}


def test_a_size_that_is_not_said_is_that_of_the_image(read):
    read.image("a.png", 40, 50)
    shape = ("cat", "rectangle", [[1, 2], [3, 4]])
    read.write("a.json", content("a.png", shape, imageHeight=None, imageWidth=None))
    assert read() == {"a.png": [("cat", 1, 2, 3, 4)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (content("a.png", ("", "rectangle", [[1, 2], [3, 4]])), r"a\.json, shape 1: has no label"),
        (
            content("a.png", ("a", "rectangle", [[1, 2]])),
            "shape 1: a rectangle has 2 points",
        ),
        (content("a.png", ("a", "polygon", [[1, 2], [3]])), "has points that are not pairs"),
        (content("a.png", ("a", "polygon", [[1, 2], ["x", 1], [2, 2]])), "has x 'x', which is no"),
        (content("a.png", ("a", "circle", [[1, 2]])), "a circle has 2 points, not 1"),
        (content(None), r"a\.json has no imagePath"),
        (content("a.png", imageHeight=-1), r"a\.json has Height -1, which is no number of pixels"),
        (content("a.png", shapes={}), r"a\.json has shapes that is no list"),
        ('{"shapes": [', "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_shape(read, text, message):
    read.image("a.png")
    read.write("a.json", text)
    with pytest.raises(UserError, match=message):
        read()


def test_images_do_not_lead_out(read):
    read.image("b.png")
    shape = ("cat", "rectangle", [[1, 2], [3, 4]])
    read.write("a.json", content("../../secret.png", shape))
    read.write("b.json", content("b.png", shape))
    with pytest.raises(UserError, match=r"a\.json has file_name .*leads upwards"):
        read()
    (read.folder / "a.json").unlink()
    (read.folder / "a.json").symlink_to("/etc/hostname")
    assert list(read()) == ["b.png"]  # no file of labelme
