"""What is said of data sets in no known format, in several, or in another than was said."""

import json
import shutil

import pytest
from coco_files import make_document
from format_files import make_splits, write_coco, write_roboflow_coco, write_yolo

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.formats import FORMATS, open_source
from detection_toolkit.errors import UserError


def test_each_format_is_told_from_the_others_by_what_is_there(tmp_path):
    write_yolo(tmp_path / "yolo", make_splits())
    write_coco(tmp_path / "coco", make_splits())
    write_roboflow_coco(tmp_path / "roboflow", make_splits())
    assert open_source(tmp_path / "yolo").format == "yolo"
    assert open_source(tmp_path / "coco").format == "coco"
    source = open_source(tmp_path / "roboflow")
    assert source.format == "coco" and source.splits == ("train", "val")
    assert source.evidence == "train/_annotations.coco.json begins as COCO's files do"


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="the folder is empty. Known are COCO JSON .coco., YOLO"):
        open_source(tmp_path)


def test_a_folder_with_other_things(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.docx", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "things").mkdir()
    message = r"no annotations in a known format; it has 2 files with \.jpg, .*folders things"
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)
    with pytest.raises(UserError, match="a file of no known format"):
        open_source(tmp_path / "c.docx")
    (tmp_path / "export.ZIP").touch()
    with pytest.raises(UserError, match=r"\.ZIP: it is an archive: unpack it, and name"):
        open_source(tmp_path / "export.ZIP")
    with pytest.raises(FileNotFoundError, match=r"data set .*nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere of .* does not exist"):
        open_source(tmp_path, image_root=tmp_path / "nowhere")


def test_two_formats_in_one_folder_and_the_one_that_is_named(tmp_path):
    write_yolo(tmp_path, make_splits())
    (tmp_path / "all.json").write_text(json.dumps(make_document()))
    message = r"2 formats: COCO JSON \(all\.json .*\) and YOLO \(data\.yaml names classes\)\. Name"
    with pytest.raises(UserError, match=f"{message} one: --format coco or yolo"):
        get_detection_dataset(path=str(tmp_path))
    assert len(get_detection_dataset(path=str(tmp_path), format="yolo", split="val")) == 2


def test_a_format_that_is_not_there(tmp_path):
    write_yolo(tmp_path, make_splits())
    message = "is not in the format Pascal VOC: it looks like YOLO: data.yaml names classes"
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, format="voc")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match="no format coco_json: did you mean coco"):
        open_source(tmp_path, format="coco_json")


def test_files_of_other_json_are_no_data_sets(tmp_path):
    for name, content in (
        ("package.json", {"name": "x"}),
        ("results.json", [{"image_id": 1, "bbox": [1, 2, 3, 4]}]),
        ("notes.json", {"categories": [], "info": {}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match="a file of no known format"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_users_errors_whatever_reads_them(tmp_path, name):
    """Of each format, a file that begins well and goes on badly."""
    beginnings = {
        "coco": ("a.json", '{"images": [{"id": 1}, 3, null], "annotations": 5}'),
        "yolo": ("data.yaml", "names: {0: a, 0: b}\ntrain: 5\nval: [x, [y]]"),
        "voc": ("a.xml", "<annotation><object><object/></object><size>5</size></annotation>"),
        "cvat": ("annotations.xml", "<annotations><image><box/></image><meta/></annotations>"),
        "label_studio": ("a.json", '[{"annotations": [{"result": [{"value": {}}]}]}, null]'),
        "labelme": ("a.json", '{"shapes": [null, {}, {"label": 5}], "imagePath": 3}'),
        "csv": ("a.csv", "filename,class,xmin,ymin,xmax,ymax\n,,,,,\n\0\n"),
    }
    file, text = beginnings[name]
    (tmp_path / file).write_text(text)
    with pytest.raises((UserError, FileNotFoundError)) as raised:
        get_detection_dataset(path=str(tmp_path), format=name)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", [".", "data.yaml"])
def test_other_formats_are_no_json_file(tmp_path, name):
    write_yolo(tmp_path, make_splits())
    with pytest.raises(UserError, match=r"json_file=.* is no COCO JSON: name it as path=, or by"):
        get_detection_dataset(json_file=str(tmp_path / name))
