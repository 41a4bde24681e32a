"""Data sets written in every format, read again, divided, and sampled."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from coco_files import make_document, write_dataset
from format_files import make_splits, write_coco, write_images, write_yolo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection_toolkit.commands import main
from detection_toolkit.data.formats import FORMATS, WRITERS, convert, open_source
from detection_toolkit.errors import UserError

# Of a coordinate, in pixels.
ROUNDING = {
    "coco": 0.0,
    "yolo": 0.011,
    "csv": 0.011,
    "cvat": 0.011,
    "labelme": 0.011,
    "voc": 1.5,
}  # VOC's boxes have a pixel at least
NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Z")),
    min_size=1,
    max_size=8,
)


def content(part):
    """{name of an image without folders: (width, height, [(class, x0, y0, x1, y1), ...])}"""
    document = part.document
    names = {c["id"]: c["name"] for c in document["categories"]}
    found = {}
    for image in document["images"]:
        boxes = []
        for a in document["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]
                boxes.append((names[a["category_id"]], x, y, x + w, y + h))
        name = image["file_name"].rpartition("/")[2]
        found[name] = (image["width"], image["height"], boxes)
    return found


def assert_same(found, expected, rounding):
    assert found.keys() == expected.keys()
    for name, (width, height, boxes) in found.items():
        other_width, other_height, other_boxes = expected[name]
        assert (width, height) == (other_width, other_height)
        assert [b[0] for b in boxes] == [b[0] for b in other_boxes]
        for box, other in zip(boxes, other_boxes):
            assert box[1:] == pytest.approx(other[1:], abs=rounding + 1e-9)


@st.composite
def documents(draw):
    """With hundredths of pixels, images of several sizes, and names of any letters."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique_by=str.casefold))
    images, annotations = [], []
    for number in range(1, draw(st.integers(1, 3)) + 1):
        width, height = draw(st.integers(4, 60)), draw(st.integers(4, 60))
        name = f"{number}.png"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for _ in range(draw(st.integers(0, 3))):
            x0, x1 = sorted(draw(st.lists(hundredths(width), min_size=2, max_size=2, unique=True)))
            y0, y1 = sorted(draw(st.lists(hundredths(height), min_size=2, max_size=2, unique=True)))
            box = [round(v / 100, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": draw(st.integers(1, len(names))),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": n} for i, n in enumerate(names, 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def hundredths(side):
    return st.integers(0, 100 * side)


@pytest.mark.parametrize("to", WRITERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=documents())
def test_there_and_back_is_the_same(to, document):
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_images(folder / "in/images", document["images"])
        (folder / "in/all.json").write_text(json.dumps(document))
        source = open_source(folder / "in")
        convert(source, folder / "other", to=to, images="link")
        other = open_source(folder / "other")
        assert other.format == to
        there = other.read(None)
        assert_same(content(there), content(source.read(None)), ROUNDING[to])
        names = [c["name"] for c in there.document["categories"]]
        assert names == [c["name"] for c in document["categories"]]
        convert(other, folder / "back", to="coco", images="link")
        back = open_source(folder / "back").read(None)
        assert_same(content(back), content(source.read(None)), ROUNDING[to])


@pytest.mark.parametrize("to", WRITERS)
def test_whole_pixels_are_kept_to_the_last_digit_by_every_format(tmp_path, to):
    """And splits stay as they are."""
    write_coco(tmp_path / "in", make_splits())
    source = open_source(tmp_path / "in")
    done = convert(source, tmp_path / "out", to=to)
    assert done.images == {"train": 4, "val": 2} and (done.boxes, done.classes) == (12, 3)
    other = open_source(tmp_path / "out")
    assert other.splits == ("train", "val")
    for split in other.splits:
        assert content(other.read(split)) == content(source.read(split))


def test_each_format_that_is_read_is_written_but_one():
    assert set(FORMATS) - set(WRITERS) == {"label_studio"}


def test_coco_keeps_all_that_annotations_have(tmp_path):
    document = make_document()
    document["annotations"][0] |= {"segmentation": [[1, 2, 3, 4, 5, 6]], "mine": 1}
    document["annotations"][1]["iscrowd"] = 1
    write_dataset(tmp_path / "in", document)
    convert(open_source(tmp_path / "in"), tmp_path / "out", to="coco")
    written = json.loads((tmp_path / "out/annotations/instances.json").read_text())
    for key in ("annotations", "categories", "images"):
        assert written[key] == document[key]


@pytest.mark.parametrize("to", WRITERS)
def test_crowds_and_masks_are_kept_or_counted(tmp_path, to):
    document = make_document()
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    document["annotations"][1]["iscrowd"] = 1
    write_dataset(tmp_path / "in", document)
    done = convert(open_source(tmp_path / "in"), tmp_path / "out", to=to)
    annotations = open_source(tmp_path / "out").read(None).document["annotations"]
    crowds = [a["iscrowd"] for a in annotations]
    assert (sum(crowds), done.crowds_left_out) == ((1, 0) if to in ("coco", "voc") else (0, 1))
    assert len(crowds) == done.boxes == 8 - done.crowds_left_out
    assert done.masks_left_out == (to != "coco")


@pytest.mark.parametrize("to", WRITERS)
def test_images_of_one_name_keep_their_own_labels(tmp_path, to):
    document = make_document(num_images=4, boxes_per_image=1)
    for image, name in zip(document["images"], ("a/x.png", "b/x.png", "b/x.jpg", "b/X.png")):
        image["file_name"] = name
    write_dataset(tmp_path / "in", document)
    source = open_source(tmp_path / "in")
    convert(source, tmp_path / "out", to=to)
    labels = []
    for part in (source.read(None), open_source(tmp_path / "out").read(None)):
        names = {c["id"]: c["name"] for c in part.document["categories"]}
        files = {i["id"]: i["file_name"] for i in part.document["images"]}
        labels.append(
            {
                (part.image_root / files[a["image_id"]]).read_bytes(): names[a["category_id"]]
                for a in part.document["annotations"]
            }
        )
    assert labels[0] == labels[1] and len(labels[0]) == 4


def test_folders_called_images_do_not_hide_labels(tmp_path):
    """Splits of Roboflow, read as one, have images below a folder of each."""
    splits = make_splits()
    for split, document in splits.items():
        flat = write_yolo(tmp_path / "flat", {split: document})
        place = tmp_path / "in" / split
        place.mkdir(parents=True)
        (flat / "images" / split).rename(place / "images")
        (flat / "labels" / split).rename(place / "labels")
    text = "train: train/images\nval: val/images\nnames: [cat, dog, bird]\n"
    (tmp_path / "in/data.yaml").write_text(text)
    source = open_source(tmp_path / "in")
    shares = {"train": 0.5, "val": 0.5}
    done = convert(source, tmp_path / "out", to="yolo", shares=shares)
    assert done.boxes == 12
    assert content(open_source(tmp_path / "out").read(None)) == content(source.read(None))


@pytest.mark.parametrize("folders", ["images/{}", "labels/{}", "Images/{}/images"])
def test_folders_of_coco_called_images_do_not_hide_labels(tmp_path, folders):
    document = make_document(num_images=4, boxes_per_image=1)
    for number, image in enumerate(document["images"]):
        image["file_name"] = f"{folders.format(number % 2)}/{image['file_name']}"
    document["images"][0]["file_name"] = "x.png"
    write_dataset(tmp_path / "in", document)
    source = open_source(tmp_path / "in")
    convert(source, tmp_path / "out", to="yolo")
    assert content(open_source(tmp_path / "out").read(None)) == content(source.read(None))


# -- the command ----------------------------------------------------------------------------------


def call(*words):
    try:
        return main(["convert", "data", *map(str, words)])
    except SystemExit as ended:
        return ended.code


def test_the_command_divides_and_samples(tmp_path, capsys):
    write_dataset(tmp_path / "in", make_document(num_images=10))
    for name in ("a", "b"):
        split = ("--split", "train=0.8,val=0.2", "--seed", "1")
        assert call(tmp_path / "in", tmp_path / name, "--to", "yolo", *split) == 0
    shown = capsys.readouterr().out
    assert "COCO JSON (annotations.json begins as COCO's files do)" in shown
    assert "8 train images, 2 val images with 20 boxes of 3 classes as YOLO" in shown
    assert f"--data {tmp_path / 'b'}" in shown
    texts = [sorted(p.name for p in (tmp_path / n / "labels/val").iterdir()) for n in ("a", "b")]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert call(tmp_path / "a", tmp_path / "c", "--to", "voc", "--sample", 2) == 0
    assert len(list((tmp_path / "c/JPEGImages").iterdir())) == 4


def test_images_are_copied_linked_or_referred_to(tmp_path, capsys):
    write_dataset(tmp_path / "in", make_document(num_images=2))
    image = tmp_path / "in/images/1.png"
    for images in ("copy", "link", "reference"):
        done = call(tmp_path / "in", tmp_path / images, "--to", "coco", "--images", images)
        assert done == 0
    assert (tmp_path / "copy/images/1.png").read_bytes() == image.read_bytes()
    assert not os.path.samefile(tmp_path / "copy/images/1.png", image)
    assert os.path.samefile(tmp_path / "link/images/1.png", image)
    assert not (tmp_path / "reference/images").exists()
    words = capsys.readouterr().out.split()[-4:]
    assert words == ["--data", str(tmp_path / "reference"), "--image-root", str(image.parent)]
    part = open_source(tmp_path / "reference", image_root=image.parent).read(None)
    assert len(part.document["images"]) == 2


def test_what_is_there_is_kept(tmp_path, capsys):
    write_dataset(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert call(tmp_path / "in", tmp_path / "out", "--to", "csv") == 0  # an empty folder
    text = (tmp_path / "out/boxes.csv").read_text()
    message = call(tmp_path / "in", tmp_path / "out", "--to", "yolo")
    assert message.endswith(
        "out is there already: choose another folder, or rename it by --move-aside"
    )
    assert (tmp_path / "out/boxes.csv").read_text() == text
    assert call(tmp_path / "in", tmp_path / "out", "--to", "yolo", "--move-aside") == 0
    assert (tmp_path / "out.1/boxes.csv").read_text() == text
    assert (tmp_path / "out/data.yaml").is_file()
    assert "is now in" in capsys.readouterr().out
    message = call(tmp_path / "in", tmp_path / "in", "--to", "yolo", "--move-aside")
    assert "which is not moved aside" in message and (tmp_path / "in/images").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "train=0.8,vla=0.2"], "--split train=0.8,vla=0.2: write shares of train, val"),
        (["--split", "train=x"], "write shares of"),
        (["--split", "train=0.8,val=0.4"], "at most 1 in sum, not train=0.8, val=0.4"),
        (["--sample", "0"], "a sample has one image at least, not 0"),
        (["--images", "reference"], "images of yolo lie beside its annotations: choose copy or l"),
        (["--format", "voc"], "is not in the format Pascal VOC: it looks like COCO JSON"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(tmp_path, words, message):
    write_dataset(tmp_path / "in")
    text = call(tmp_path / "in", tmp_path / "out", "--to", "yolo", *words)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    write_dataset(tmp_path / "in")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = call(tmp_path / "in", ".", "--to", "yolo")
    assert message == "error: . is the current folder: choose one in it"
    (tmp_path / "here/mine").touch()
    message = call(tmp_path / "in", ".", "--to", "yolo", "--move-aside")
    assert message == "error: . is the current folder, which is not moved aside"
    assert (tmp_path / "here/mine").is_file()


def test_a_missing_image_and_harm_leave_nothing(tmp_path):
    write_dataset(tmp_path / "in")
    (tmp_path / "in/images/2.png").unlink()
    assert "2.png does not exist" in call(tmp_path / "in", tmp_path / "out", "--to", "yolo")
    document = make_document()
    document["annotations"][0]["category_id"] = 4
    (tmp_path / "in/annotations.json").write_text(json.dumps(document))
    assert "which is not in 'categories'" in call(tmp_path / "in", tmp_path / "out", "--to", "yolo")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", ["voc", "csv", "cvat", "labelme"])
@pytest.mark.parametrize("name", ["a\nb", " a", "\x00", ""])
def test_names_that_a_format_cannot_hold_are_refused(tmp_path, to, name):
    document = make_document()
    document["categories"][0]["name"] = name
    write_dataset(tmp_path / "in", document)
    with pytest.raises(UserError, match="cannot be written as .*: rename it") as raised:
        convert(open_source(tmp_path / "in"), tmp_path / "out", to=to)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1cb.png", "a .png"])
def test_images_whose_names_voc_cannot_hold_are_refused(tmp_path, name):
    document = make_document()
    document["images"][0]["file_name"] = name
    write_dataset(tmp_path / "in", document)
    with pytest.raises(UserError, match="cannot be written as Pascal VOC: rename it"):
        convert(open_source(tmp_path / "in"), tmp_path / "out", to="voc")
    assert not (tmp_path / "out").exists()


def test_images_of_strangers_are_not_copied(tmp_path):
    folder = write_yolo(tmp_path / "in", make_splits())
    image = folder / "images/train/train1.png"
    image.unlink()
    image.symlink_to("/etc/hostname")
    text = call(folder, tmp_path / "out", "--to", "coco")
    assert "links to files outside of the image folder" in text
    assert not (tmp_path / "out").exists()
