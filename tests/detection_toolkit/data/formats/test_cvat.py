"""CVAT for images 1.1."""

import pytest
from coco_files import xyxy

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.errors import UserError

META = (
    "<meta>\n<{0}>\n<labels>\n<label><name>dog</name><color>#fa3253</color><type>any</type>"
    "<attributes></attributes></label>\n<label><name>cat</name></label>\n"
    "<label><name>tail</name><parent>dog</parent></label>\n</labels>\n</{0}>\n</meta>\n"
)
SHAPES = (
    '<box label="cat" source="manual" occluded="0" xtl="10.50" ytl="20.00" xbr="40.00" ybr="50.25" '
    'z_order="0">\n<attribute name="a">1</attribute></box>\n'
    '<polygon label="dog" source="manual" points="1.00,2.00;30.00,4.00;20.00,40.00"></polygon>\n'
)


def write(read, shapes=SHAPES, *, owner="task", name="a.png", subset="", size=True):
    sides = ' width="96" height="64"' if size else ""
    image = f'<image id="0" name="{name}"{subset}{sides}>\n{shapes}</image>\n'
    text = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
    return read.write("annotations.xml", f"{text}{META.format(owner)}{image}</annotations>\n")


@pytest.mark.parametrize("owner", ["task", "project", "job"])
@pytest.mark.parametrize("path", [".", "annotations.xml"])
def test_boxes_and_polygons(read, owner, path):
    read.image("images/a.png")
    write(read, owner=owner)
    assert read(path) == {"images/a.png": [("cat", 10.5, 20, 40, 50.25), ("dog", 1, 2, 30, 40)]}
    (record,) = get_detection_dataset(path=str(read.folder / path))
    assert record["annotations"][1]["segmentation"] == [[1, 2, 30, 4, 20, 40]]
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]  # in the order of labels


def test_other_shapes_become_boxes_or_are_left_out(read, caplog):
    read.image("a.png")
    write(
        read,
        '<ellipse label="cat" cx="50" cy="30" rx="10" ry="5"/>'
        '<mask label="dog" rle="1, 2" left="3" top="4" width="10" height="20"/>'
        '<polyline label="cat" points="1,1;2,2"/><points label="cat" points="1,1"/>'
        '<cuboid label="cat" xtl1="1"/><tag label="cat"></tag>',
    )
    assert read() == {"a.png": [("cat", 40, 25, 60, 35), ("dog", 3, 4, 13, 24)]}
    assert "3 shapes that have no box (left out)" in caplog.text


def test_a_rotated_box_becomes_the_upright_one_around_it(read):
    read.image("a.png")
    write(read, '<box label="cat" xtl="30" ytl="20" xbr="50" ybr="30" rotation="90.00"/>')
    assert read() == {"a.png": [("cat", 35, 15, 45, 35)]}  # about its centre
    assert "by 90 degrees" in read.findings()["rotated"]


def test_subsets_are_splits(read):
    images = "".join(
        f'<image id="{i}" name="{i}.png" subset="{s}" width="96" height="64"></image>'
        for i, s in enumerate(["Train", "Train", "Validation"])
    )
    for name in ("images/Train/0.png", "images/Train/1.png", "images/Validation/2.png"):
        read.image(name)
    read.write("annotations.xml", f"<annotations>{META.format('project')}{images}</annotations>")
    assert list(read(split="train")) == ["images/Train/0.png", "images/Train/1.png"]
    assert list(read(split="val")) == ["images/Validation/2.png"]


def test_images_elsewhere(read, tmp_path_factory):
    from coco_files import write_image

    root = tmp_path_factory.mktemp("images")
    write_image(root / "a.png")
    write(read, size=False)
    (record,) = get_detection_dataset(path=str(read.folder), image_root=str(root))
    assert record["file_name"] == str(root / "a.png") and len(record["annotations"]) == 2
    assert xyxy(record["annotations"][0]) == [10.5, 20, 40, 50.25]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            '<box label="cat" xtl="x" ytl="1" xbr="2" ybr="2"/>',
            r"annotations\.xml, line 14: box has",
        ),
        ('<box xtl="1" ytl="1" xbr="2" ybr="2"/>', "line 14: box has no label"),
        ('<box label="cat" xtl="1" xbr="2" ybr="2"/>', "line 14: box has no ytl"),
        ('<polygon label="cat" points="1;2"/>', "polygon has points that are not pairs"),
        ('<box label="cow" xtl="1" ytl="1" xbr="2" ybr="2"/>', "class cow is not among the na"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(read, shapes, message):
    read.image("a.png")
    write(read, shapes)
    with pytest.raises(UserError, match=message):
        read()


def test_videos_and_other_files_are_refused(read):
    read.write("annotations.xml", '<annotations><track id="0"></track></annotations>')
    with pytest.raises(UserError, match="is CVAT for video, with tracks: export it as CVAT for im"):
        read()


def test_images_do_not_lead_out(read):
    write(read, name="../../secret.png")
    with pytest.raises(UserError, match=r"annotations\.xml, line 13 has file_name .*leads upwards"):
        read()
    write(read, subset=' subset="../.."')
    with pytest.raises(FileNotFoundError, match="does not hold its images"):
        read()


def test_entities_are_not_expanded(read):
    path = write(read)
    text = path.read_text().replace("<annotations>", '<!DOCTYPE a [<!ENTITY a "b">]><annotations>')
    path.write_text(text)
    with pytest.raises(UserError, match=r"line 2: it defines entities"):
        read()
