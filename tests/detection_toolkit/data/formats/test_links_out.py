"""Files of annotations that are found in a folder, and are links to files elsewhere."""

import json

import pytest
from format_files import make_splits, write_coco, write_yolo

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.formats import convert, open_source
from detection_toolkit.errors import UserError

FILES = [
    ("yolo", "data.yaml"),
    ("yolo", "classes.txt"),
    ("yolo", "obj.names"),
    ("voc", "labels.txt"),
    ("voc", "ImageSets/Main/train.txt"),
    ("csv", "train.csv"),
    ("csv", "classes.csv"),
    ("cvat", "annotations.xml"),
    ("labelme", "labels.txt"),
    ("coco", "annotations/instances_train.json"),
    ("label_studio", "export.json"),
]


def make(folder, format, name):
    """A data set that has a file."""
    write_coco(folder / "made", make_splits())
    place = folder / "in"
    if format == "label_studio":
        (folder / "made/images/train").rename(place)
        value = {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["cat"]}
        result = {"type": "rectanglelabels", "original_width": 96, "original_height": 64}
        task = {"annotations": [{"result": [{**result, "value": value}]}]}
        task["data"] = {"image": "train1.png"}
        (place / name).write_text(json.dumps([task]))
        return place
    convert(open_source(folder / "made"), place, to=format)
    if name in ("classes.txt", "obj.names"):
        (place / "data.yaml").unlink()
        (place / name).write_text("cat\ndog\nbird\n")
    return place


@pytest.mark.parametrize(("format", "name"), FILES)
def test_links_out_of_the_folder_are_not_read(tmp_path, format, name):
    folder = make(tmp_path, format, name)
    split = None if format == "label_studio" else "train"
    read = {"path": str(folder), "split": split, "format": format}
    expected = len(get_detection_dataset(**read))
    secret = tmp_path / "elsewhere" / name.rpartition("/")[2]
    secret.parent.mkdir()
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    message = rf"{secret.name} is a link out of the folder .*allow_outside=true"
    with pytest.raises(UserError, match=message) as raised:
        get_detection_dataset(**read, name="strange")
    assert "\n" not in str(raised.value)
    assert len(get_detection_dataset(**read, allow_outside=True, name="trusted")) == expected


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_that_are_named_or_lead_to_the_folder_itself_are_followed(tmp_path, target):
    folder = write_yolo(tmp_path / "in", make_splits())
    if target == "folder":
        path = tmp_path / "link"
        path.symlink_to(folder)
    else:
        path = folder / "mine.yaml"
        (folder / "data.yaml").rename(tmp_path / "data.yaml")
        path.symlink_to(tmp_path / "data.yaml")
    assert len(get_detection_dataset(path=str(path), split="train")) == 4
