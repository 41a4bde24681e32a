"""tools/check_dataset.py finds what it says it finds, and nothing in a good data set."""

import json

import cv2
import numpy as np
import pytest
from coco_files import make_document, write_dataset, write_image
from fault_runs import load_tool
from format_files import make_splits, write_yolo
from picture_cases import part_of, rotated
from PIL import Image

from detection_toolkit.data.inspection import compare_splits, inspect_dataset
from detection_toolkit.visualization.datasets import TILE, draw_samples, worst_images

tool = load_tool("check_dataset")


def write(folder, change=None, **kwargs):
    document = make_document(**kwargs)
    paths = write_dataset(folder, document)
    if change is not None:
        change(document)
        (folder / "annotations.json").write_text(json.dumps(document))
    return paths


def test_a_good_data_set_has_no_findings(tmp_path, capsys):
    paths = write(tmp_path)
    output = tmp_path / "report"
    assert tool.main([*paths, "--num-queries", "5", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "4 images, 8 boxes of 3 classes, at most 2 objects in an image" in shown.out
    assert "nothing is wrong" in shown.out
    assert shown.out.rstrip().endswith("Ready to train.")
    assert "4/4" in shown.err  # the progress bar
    assert json.loads((output / "report.json").read_text())["findings"] == {}
    assert not (output / "worst.png").exists()
    assert Image.open(output / "samples.png").width > 3 * TILE


def annotation(document, **changes):
    document["annotations"][2].update(changes)


def image(document, **changes):
    document["images"][1].update(changes)


HARMFUL = {
    "format": lambda d: d["images"][1].pop("width"),
    "image_id": lambda d: image(d, id=1),
    "category_id": lambda d: d["categories"][1].update(id=3),
    "annotation_id": lambda d: annotation(d, id=1),
    "unknown_image": lambda d: annotation(d, image_id=99),
    "unknown_category": lambda d: annotation(d, category_id=99),
    "outside_root": lambda d: image(d, file_name="../2.png"),
    "no_annotations": lambda d: d["annotations"].clear(),
    "no_objects": lambda d: [a.update(bbox=[500, 5, 10, 9]) for a in d["annotations"]],
    "all_crowd": lambda d: [a.update(iscrowd=1) for a in d["annotations"]],
    "file_name": lambda d: image(d, file_name="a\0.png"),
    "folder": lambda d: [i.update(file_name=f"x{i['file_name']}") for i in d["images"]],
    "missing": lambda d: image(d, file_name="5.png"),
    "size": lambda d: image(d, width=97),
}
REPAIRED = {
    "degenerate": lambda d: annotation(d, bbox=[5, 5, 0, 9]),
    "not_finite": lambda d: annotation(d, bbox=[5, 5, float("nan"), 9]),
    "outside": lambda d: annotation(d, bbox=[500, 5, 10, 9]),
    "clipped": lambda d: annotation(d, bbox=[80, 5, 30, 9]),
    "area": lambda d: annotation(d, area=-750),
    "float_ids": lambda d: annotation(d, id=3.0),
    "renumbered": lambda d: annotation(d, id=0),
    "masks": lambda d: annotation(d, segmentation=[[1, 2, 3, 4]]),
}
NOTES = {
    "same_file": lambda d: image(d, file_name="1.png"),
    "tiny": lambda d: annotation(d, bbox=[8, 5, 3, 9]),
    "giant": lambda d: annotation(d, bbox=[0, 0, 96, 64]),
    "repeated": lambda d: annotation(d, **{k: d["annotations"][3][k] for k in KEYS}),
    "empty": lambda d: d.update(annotations=d["annotations"][2:]),
    "unused": lambda d: d["categories"].append({"id": 100, "name": "fish"}),
    "one_class": lambda d: (
        d.update(categories=d["categories"][:1]),
        [a.update(category_id=3) for a in d["annotations"]],
    ),
}
KEYS = ("bbox", "category_id")


@pytest.mark.parametrize("kind", HARMFUL)
def test_what_stops_training_is_found(tmp_path, kind, capsys):
    paths = write(tmp_path, HARMFUL[kind])
    output = tmp_path / "report"
    assert tool.main([*paths, "--output", str(output)]) == 1
    found = json.loads((output / "report.json").read_text())["findings"]
    assert found[kind]["severity"] == "harm"
    assert found[kind]["count"] >= 1
    shown = capsys.readouterr().out
    assert "HARM" in shown
    assert shown.splitlines()[-1].startswith("To fix first: ")


@pytest.mark.parametrize("kind", [*REPAIRED, *NOTES])
def test_what_training_puts_up_with_is_said(tmp_path, kind):
    report = inspect_dataset(*write(tmp_path, {**REPAIRED, **NOTES}[kind]))
    assert report.finding(kind).severity == ("repaired" if kind in REPAIRED else "note")
    assert not report.is_harmful, [f.message for f in report.findings if f.severity == "harm"]
    assert report.verdict.startswith("Ready to train")


def test_what_is_wrong_with_files_is_found(tmp_path):
    json_file, root = write(tmp_path, num_images=5)
    folder = tmp_path / "images"
    part_of(0.6)(folder / "1.png")
    Image.new("RGB", (64, 48)).save(folder / "2.png")
    rotated(folder / "3.png")  # stored as 48x64, shown as 64x48
    document = make_document(num_images=5)
    document["images"][1].update(width=64, height=48)
    document["images"][2].update(width=48, height=64)
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    report = inspect_dataset(json_file, root)
    assert report.finding("unreadable").images == (1,)
    assert report.finding("exif_size").images == (3,)
    document["images"][2].update(width=64, height=48)
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    report = inspect_dataset(json_file, root)
    assert report.finding("exif").images == (3,)
    assert report.finding("exif_size") is None
    assert report.finding("unreadable").count == 1


def test_links_out_of_the_folder_are_found(tmp_path):
    json_file, root = write(tmp_path)
    (tmp_path / "secret.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "images" / "2.png").symlink_to(tmp_path / "secret.png")
    assert inspect_dataset(json_file, root).finding("links").images == (2,)
    assert inspect_dataset(json_file, root, allow_outside=True).findings == []


def test_two_folders_are_no_json_and_its_images(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main([str(tmp_path), str(tmp_path)])
    assert ended.value.code == 2
    assert "is a folder: give it alone, or a COCO JSON and its IMAGES" in capsys.readouterr().err


def test_the_worst_images_are_drawn(tmp_path, capsys):
    def spoil(document):
        annotation(document, bbox=[80, 5, 30, 9], area=270)
        document["annotations"][4].update(bbox=[8, 5, float("nan"), 9])

    json_file, root = write(tmp_path, spoil)
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    output = tmp_path / "report"
    args = [json_file, root, "--num-queries", "1", "--output", str(output), "--num-pictures", "3"]
    assert tool.main(args) == 1
    assert "1 images that cannot be read" in capsys.readouterr().out
    picture = Image.open(output / "worst.png")
    assert picture.width > 3 * TILE
    report = inspect_dataset(json_file, root, num_queries=1)
    chosen = worst_images(report, 3)
    # Harmful ones first, and each image once.
    assert [i for i, _ in chosen] == [4, 1, 3]
    assert chosen[0][1] == "images that cannot be read"


@pytest.mark.parametrize("content", ["{", "[" * 100000, "[]", "{}", '{"images": {}}', "null"])
def test_no_json_is_beyond_it(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    try:
        assert tool.main([str(path), str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    except SystemExit as end:
        assert "a.json cannot be read as JSON" in str(end.code)


def test_two_splits_are_compared(tmp_path, capsys):
    paths = write(tmp_path / "train")
    document = make_document(num_images=3)
    document["categories"][1]["name"] = "wolf"
    test_paths = write_dataset(tmp_path / "test", document)
    for number in (1, 2):
        write_image(tmp_path / "test" / "images" / f"{number}.png", seed=50 + number)
    output = tmp_path / "report"
    assert tool.main([*paths, "--test", *test_paths, "--output", str(output)]) == 1
    shown = capsys.readouterr().out
    assert "only the test set has 'wolf'" in shown.splitlines()[-1]
    assert "Training set: Ready to train." in shown
    for name in ("report.json", "samples.png", "test_report.json", "test_samples.png"):
        assert (output / name).is_file()
    reports = inspect_dataset(*paths), inspect_dataset(*test_paths)
    classes, shared = compare_splits(*reports)
    assert (classes.kind, classes.severity) == ("classes", "harm")
    assert (shared.kind, shared.severity, shared.images) == ("shared_images", "note", (3,))
    assert shared.examples == ("3.png is 3.png of the training set",)


@pytest.mark.parametrize("num_images, columns", [(1, 1), (16, 4), (40, 4)])
def test_sixteen_images_of_each_split_are_drawn_with_their_boxes(tmp_path, num_images, columns):
    paths = write_dataset(tmp_path, num_images=num_images)
    output = tmp_path / "report"
    assert tool.main([*paths, "--test", paths[0], "--output", str(output)]) == 0
    for name in ("samples.png", "test_samples.png"):
        assert round(Image.open(output / name).width / TILE) == columns
    report = inspect_dataset(*paths)
    drawn = draw_samples(report)
    for image in report.images.values():
        image["annotations"] = []
    bare = draw_samples(report)
    assert drawn.shape == bare.shape
    changed = (drawn != bare).any(2)
    shown = min(num_images, 16)
    rows = -(-shown // columns)
    tiles = [t for row in np.array_split(changed, rows) for t in np.array_split(row, columns, 1)]
    assert all(tile.any() for tile in tiles[:shown])


def test_images_are_drawn_also_where_no_annotation_is_sound(tmp_path):
    document = make_document(num_images=3)
    for annotation in document["annotations"]:
        annotation["bbox"] = None
    paths = write_dataset(tmp_path, document)
    output = tmp_path / "report"
    assert tool.main([*paths, "--output", str(output)]) == 1
    assert (output / "samples.png").is_file()


def test_a_table_of_one_class_is_a_note(tmp_path, capsys):
    document = make_document()
    document["categories"] = document["categories"][:1]
    for annotation in document["annotations"]:
        annotation["category_id"] = document["categories"][0]["id"]
    paths = write_dataset(tmp_path, document)
    assert tool.main([*paths, "--output", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "tables of a single category" in shown and shown.endswith("Ready to train.\n")


def test_copies_of_other_formats_and_sizes_are_found_among_splits(tmp_path):
    document = make_document(num_images=4)
    paths = write_dataset(tmp_path / "train", document)
    for image in document["images"]:
        image["file_name"] = image["file_name"].replace("png", "jpg")
    test_paths = write_dataset(tmp_path / "test", document)
    folders = tmp_path / "train" / "images", tmp_path / "test" / "images"
    rng = np.random.default_rng(0)
    for number in range(1, 5):  # photographs are smoother than noise
        smooth = cv2.resize(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8), (96, 64))
        cv2.imwrite(str(folders[0] / f"{number}.png"), smooth)
        other = cv2.resize(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8), (96, 64))
        copy = {1: smooth, 2: cv2.resize(smooth, (48, 32)), 3: other, 4: other // 64}[number]
        cv2.imwrite(str(folders[1] / f"{number}.jpg"), copy, [cv2.IMWRITE_JPEG_QUALITY, 80])
    cv2.imwrite(str(folders[0] / "4.png"), smooth // 64 * 0)  # two dark ones are not the same
    reports = inspect_dataset(*paths), inspect_dataset(*test_paths)
    (shared,) = compare_splits(*reports)
    assert (shared.kind, shared.images) == ("shared_images", (1, 2))
    assert shared.examples[0] == "1.jpg looks as 1.png of the training set"


def test_splits_that_share_nothing_are_ready(tmp_path, capsys):
    paths = write(tmp_path / "train")
    json_file, root = write_dataset(tmp_path / "test", num_images=2)
    for number in (1, 2):
        write_image(tmp_path / "test" / "images" / f"{number}.png", seed=50 + number)
    output = str(tmp_path / "report")
    assert tool.main([*paths, "--test", json_file, root, "--output", output]) == 0
    assert capsys.readouterr().out.endswith("Ready to train.\nTest set: Ready to train.\n")


def test_images_that_would_be_held_out_are_checked_too(tmp_path, capsys):
    """Without validation images, training holds some out."""
    splits = make_splits(train=10, val=2)
    folder = write_yolo(tmp_path / "in", {"train": splits["train"], "test": splits["val"]})
    output = ["--output", str(tmp_path / "output")]
    assert tool.main(["--data", str(folder), *output]) == 0
    shown = capsys.readouterr().out
    assert [f"{n} images, " in shown for n in (8, 2)] == [True, True]
    assert all(title in shown for title in ("Training set", "Validation set", "Test set"))
    for image in (folder / "images/train").iterdir():
        good = image.read_bytes()
        image.write_bytes(good[: len(good) // 2])
        assert tool.main(["--data", str(folder), *output]) == 1
        image.write_bytes(good)
