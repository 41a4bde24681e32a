"""Tables of boxes."""

import pytest
from coco_files import write_image

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.errors import UserError

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


def test_tensorflows_columns(read):
    read.image("a.png")
    read.image("b.png")
    lines = "b.png,96,64,dog,1,2,30,40\na.png,96,64,cat,10,20,30,40\nb.png,96,64,cat,5,6,7,8\n"
    read.write("boxes.csv", HEADER + lines)
    b = [("dog", 1, 2, 30, 40), ("cat", 5, 6, 7, 8)]
    assert read() == read("boxes.csv") == {"a.png": [("cat", 10, 20, 30, 40)], "b.png": b}


def test_retinanets_columns_and_classes(read):
    read.image("images/a.png")
    read.image("images/b.png")
    read.write("train.csv", "images/a.png,10,20,30,40,dog\n/home/x/images/b.png,,,,,\n")
    read.write("classes.csv", "dog,0\ncat,1\n")
    assert read() == {"images/a.png": [("dog", 10, 20, 30, 40)], "images/b.png": []}
    from detection_toolkit.data.formats import open_source

    document = open_source(read.folder).read(None).document
    assert [c["name"] for c in document["categories"]] == ["dog", "cat"]


@pytest.mark.parametrize(
    "text",
    [
        "image_path;label;x_min;y_min;x_max;y_max\na.png;cat;10;20;30;40\n",
        "\ufeffx1,y1,x2,y2,name,Class,confidence\n10,20,30,40,a.png,cat,1\n",
        'file_name,class,xmin,ymin,xmax,ymax\r\n"a.png","cat",10.0,20,30,4e1\r\n',
        "filename\tclass\txmin\tymin\txmax\tymax\na.png\tcat\t10\t20\t30\t40\n",
    ],
)
def test_other_names_orders_and_delimiters(read, text):
    read.image("a.png")
    read.write("boxes.csv", text)
    assert read() == {"a.png": [("cat", 10, 20, 30, 40)]}


def test_splits_are_tables_or_folders(read):
    for split, name in (("train", "a"), ("valid", "b")):
        read.image(f"{split}/{name}.png")
        line = f"{name}.png,96,64,{name},1,2,3,4\n"
        read.write(f"{split}/_annotations.csv", HEADER + line)
        read.write(f"tables/{split}_labels.csv", HEADER + line)
        read.image(f"tables/images/{name}.png")
    assert read(split="val") == {"valid/b.png": [("b", 1, 2, 3, 4)]}
    assert read("tables", split="train") == {"tables/images/a.png": [("a", 1, 2, 3, 4)]}


def test_images_elsewhere(read, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_image(root / "a.png")
    read.write("boxes.csv", "/data/a.png,10,20,30,40,dog\n")
    dicts = get_detection_dataset(path=str(read.folder), image_root=str(root))
    assert dicts[0]["file_name"] == str(root / "a.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png,96,64,cat,1,2,3", r"boxes\.csv, line 3 has 7 columns, and the first line 8"),
        ("a.png,96,64,cat,1,2,x,4", "line 3 has xmax 'x', which is no number"),
        ("a.png,96,64,cat,1,,3,4", "line 3 has no ymin"),
        ("a.png,96,64,,1,2,3,4", "line 3 has no class"),
        (",96,64,cat,1,2,3,4", "line 3 names no image"),
        ("a.png,9.5,64,cat,1,2,3,4", "line 3 has width 9.5, which is no number of pixels"),
        ("a.png,97,64,cat,1,2,3,4", r"line 3 has the size \(97, 64\), and \(96, 64\) before"),
        ("gone.png,,,cat,1,2,3,4", r"line 3: the image gone\.png is not there, and nothing says"),
        ("../x.png,96,64,cat,1,2,3,4", r"boxes\.csv, line 3 has file_name .*leads upwards"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(read, line, message):
    read.image("a.png")
    read.write("boxes.csv", f"{HEADER}a.png,96,64,cat,1,2,3,4\n{line}\n")
    with pytest.raises(UserError, match=message):
        read()


def test_boxes_in_another_layout_are_told_as_of_a_json(read):
    read.image("a.png")
    read.write("boxes.csv", HEADER + "a.png,96,64,cat,0.1,0.2,0.3,0.4\n" * 4)
    with pytest.raises(UserError, match=r"shares of the image.*boxes\.csv, line 2"):
        read()


@pytest.mark.parametrize(
    "names", [("a.csv", "b.csv"), ("train.csv", "train_2.csv"), ("val/a.csv", "val/b.csv")]
)
def test_several_tables_of_a_split_are_refused(read, names):
    read.image("a.png")
    for name in names:
        read.write(name, HEADER + "a.png,96,64,cat,1,2,3,4\n")
    with pytest.raises(UserError, match=r"several tables of the split .*: .*csv, .*csv\. Name one"):
        read()


def test_two_columns_of_one_meaning_are_refused(read):
    read.write("a.csv", "filename,path,class,xmin,ymin,xmax,ymax\na.png,b.png,cat,1,2,3,4\n")
    with pytest.raises(UserError, match=r"a\.csv has 2 columns that are its filename \(filename, "):
        read()


def test_a_table_of_classes_without_numbers_is_none(read):
    read.image("a.png")
    read.write("boxes.csv", HEADER + "a.png,96,64,dog,1,2,3,4\n")
    read.write("classes.csv", "cat,²\n")
    assert read() == {"a.png": [("dog", 1, 2, 3, 4)]}
