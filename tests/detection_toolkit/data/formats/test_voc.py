"""Pascal VOC: XML files beside ImageSets, as LabelImg and Roboflow have them, and of strangers."""

import pytest

from detection_toolkit.errors import UserError

OBJECT = (
    "  <object>\n    <name>{}</name>\n    <pose>Unspecified</pose>\n    <truncated>0</truncated>\n"
    "    <difficult>{}</difficult>\n    <bndbox>\n      <xmin>{}</xmin>\n      <ymin>{}</ymin>\n"
    "      <xmax>{}</xmax>\n      <ymax>{}</ymax>\n    </bndbox>\n  </object>\n"
)


def annotation(name, *objects, size="<size><width>96</width><height>64</height></size>", head=""):
    """An XML; objects are (class, difficult, xmin, ymin, xmax, ymax)."""
    written = "".join(OBJECT.format(*o) for o in objects)
    return (
        f'<?xml version="1.0"?>{head}\n<annotation>\n  <folder>x</folder>\n'
        f"  <filename>{name}</filename>\n  {size}\n  <segmented>0</segmented>\n{written}"
        "</annotation>\n"
    )


@pytest.fixture
def voc(read):
    for number, objects in (
        (1, [("cat", 0, 1, 1, 96, 64), ("dog", 1, 11, 21, 40, 50)]),
        (2, [("dog", 0, 5, 6, 30, 40)]),
        (3, []),
    ):
        read.image(f"JPEGImages/{number}.png")
        read.write(f"Annotations/{number}.xml", annotation(f"{number}.png", *objects))
    return read


def test_pixels_are_counted_from_one_and_the_last_one_belongs_to_the_box(voc):
    assert voc() == {
        "JPEGImages/1.png": [("cat", 0, 0, 96, 64), ("dog", 10, 20, 40, 50)],
        "JPEGImages/2.png": [("dog", 4, 5, 30, 40)],
        "JPEGImages/3.png": [],
    }


def test_difficult_objects_are_crowds(voc):
    from detection_toolkit.data import get_detection_dataset

    dicts = get_detection_dataset(path=str(voc.folder))
    assert [a["iscrowd"] for a in dicts[0]["annotations"]] == [0, 1]


def test_splits_are_in_image_sets(voc):
    voc.write("ImageSets/Main/train.txt", "2\n")
    voc.write("ImageSets/Main/val.txt", "1\n3\n")
    voc.write("ImageSets/Main/trainval.txt", "1\n2\n3\n")
    voc.write("ImageSets/Main/cat_train.txt", "2 -1\n")
    assert list(voc(split="train")) == ["JPEGImages/2.png"]
    assert list(voc(split="val")) == ["JPEGImages/1.png", "JPEGImages/3.png"]
    # Both have the classes of both.
    assert voc(split="train")["JPEGImages/2.png"][0][0] == "dog"


def test_names_in_sets_may_have_spaces(voc):
    for name in ("my dog", "my dog 1"):
        voc.image(f"JPEGImages/{name}.png")
        voc.write(f"Annotations/{name}.xml", annotation(f"{name}.png", ("cat", 0, 1, 1, 9, 9)))
    voc.write("ImageSets/Main/train.txt", "my dog\nmy dog 1 \n")
    voc.write("ImageSets/Main/val.txt", "1  1\n2 -1\n3\t0\n")
    assert sorted(voc(split="train")) == ["JPEGImages/my dog 1.png", "JPEGImages/my dog.png"]
    assert len(voc(split="val")) == 3


def test_sets_beside_folders_of_splits_are_not_needed(voc):
    for split, name in (("train", "a"), ("valid", "b")):
        voc.image(f"x/{split}/{name}.jpg")
        voc.write(f"x/{split}/{name}.xml", annotation(f"{name}.jpg", ("cat", 0, 1, 1, 9, 9)))
    voc.write("x/ImageSets/Main/train.txt", "a\n")
    assert list(voc("x", split="val")) == ["x/valid/b.jpg"]


def test_trainval_alone_are_all_images(voc):
    voc.write("ImageSets/Main/trainval.txt", "1\n2\n")
    assert len(voc(split="train", val_share=0.5)) == len(voc(split="val", val_share=0.5)) == 1


def test_tools_that_count_from_zero_are_recognised(voc):
    voc.write("Annotations/2.xml", annotation("2.png", ("dog", 0, 0, 6, 30, 40)))
    assert voc()["JPEGImages/2.png"] == [("dog", 0, 6, 30, 40)]
    assert voc()["JPEGImages/1.png"][1] == ("dog", 11, 21, 40, 50)
    assert "counted from 0" in voc.findings()["from_zero"]


def test_roboflow_has_xml_beside_images_by_split(read):
    for split, name in (("train", "a"), ("valid", "b")):
        read.image(f"{split}/{name}.jpg")
        read.write(f"{split}/{name}.xml", annotation(f"{name}.jpg", ("cat", 0, 1, 1, 10, 10)))
    assert read(split="train") == {"train/a.jpg": [("cat", 0, 0, 10, 10)]}
    assert read(split="val") == {"valid/b.jpg": [("cat", 0, 0, 10, 10)]}


@pytest.mark.parametrize("written", ["C:\\data\\pets\\1.png", "/home/x/1.png", "1", "0001.jpeg"])
def test_the_image_is_found_whatever_the_tool_left_as_its_name(voc, written):
    voc.write("Annotations/1.xml", annotation(written, ("cat", 0, 1, 1, 9, 9)))
    assert voc()["JPEGImages/1.png"] == [("cat", 0, 0, 9, 9)]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_is_not_said_is_that_of_the_image(voc, size):
    voc.write("Annotations/1.xml", annotation("1.png", ("cat", 0, 1, 1, 96, 64), size=size))
    assert voc()["JPEGImages/1.png"] == [("cat", 0, 0, 96, 64)]


def test_classes_of_a_table_keep_its_order_and_need_no_object(voc):
    voc.write("labelmap.txt", "# label:color:parts:actions\nbackground:0,0,0::\ndog:::\ncat:::\nb:")
    from detection_toolkit.data.formats import open_source

    document = open_source(voc.folder).read(None).document
    assert [c["name"] for c in document["categories"]] == ["dog", "cat", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (annotation("1.png", ("", 0, 1, 1, 9, 9)), r"1\.xml, line 7: object has no name"),
        (
            annotation("1.png", ("a", 0, "x", 1, 9, 9)),
            r"line 7: object has xmin 'x', which is no",
        ),
        (annotation("1.png", ("a", 0, "", 1, 9, 9)), r"line 7: object has no xmin"),
        (annotation("1.png", ("a", 0, "nan", 1, 9, 9)), r"has xmin 'nan', which is no number"),
        (
            annotation("1.png").replace("<seg", "<object><name>a</name></object><seg"),
            "a has no bnd",
        ),
        (annotation("1.png", size="<size><width>9.5</width></size>"), "has width 9.5, which is no"),
        ("<annotation>", r"1\.xml cannot be read as XML: no element found"),
        ('<?xml version="1.0" encoding="x"?><annotation>', r"1\.xml cannot be read as XML"),
        ("<annotation><filename>" + "<a>" * 100_000, "cannot be read as XML"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(voc, text, message):
    voc.write("Annotations/1.xml", text)
    with pytest.raises(UserError, match=message) as raised:
        voc()
    assert "\n" not in str(raised.value)


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))


@pytest.mark.parametrize(
    "doctype",
    [
        f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]>',
        '<!DOCTYPE a [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a [<!ENTITY % l9 SYSTEM "http://x.org/a.dtd"> %l9;]>',
        '<!DOCTYPE a SYSTEM "http://x.org/a.dtd">',
    ],
)
def test_entities_are_not_expanded(voc, doctype):
    voc.write("Annotations/1.xml", annotation("1.png", ("&l9;", 0, 1, 1, 9, 9), head=doctype))
    with pytest.raises(UserError, match="defines entities|cannot be read as XML|has no name"):
        voc()


def test_repairs_name_the_file_and_the_line(voc):
    voc.write("Annotations/2.xml", annotation("2.png", ("dog", 0, 90, 6, 120, 40)))
    assert voc.findings()["clipped"].startswith("Annotations/2.xml, line 7: [89.0, 5.0, 31.0, 35.0")


def test_names_in_sets_need_their_files(voc):
    voc.write("ImageSets/Main/train.txt", "1\n9\n")
    voc.write("ImageSets/Main/val.txt", "2\n")
    with pytest.raises(UserError, match=r"names 9 for train, and there is no Annotations/9\.xml"):
        voc(split="train")
    voc.write("ImageSets/Main/train.txt", "1\n2\n")
    with pytest.raises(UserError, match="has 2 in train and in val"):
        voc(split="train")


def test_images_of_strangers_do_not_lead_out(voc, tmp_path_factory):
    secret = tmp_path_factory.mktemp("secret") / "x.png"
    from coco_files import write_image

    write_image(secret)
    voc.write("Annotations/4.xml", annotation(f"../../../{secret}", ("a", 0, 1, 1, 9, 9)))
    with pytest.raises(UserError, match=r"Annotations/4\.xml has file_name .*leads upwards"):
        voc()
    (voc.folder / "Annotations/4.xml").unlink()
    (voc.folder / "Annotations/4.xml").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"4\.xml is a link out of the folder"):
        voc()
