"""YOLO folders as Ultralytics, Roboflow, Label Studio and CVAT write them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_files import make_document, write_image, xyxy
from detectron2.data import MetadataCatalog
from format_files import make_splits, write_images, write_yolo

from detection_toolkit.data import dataset_names, get_detection_dataset, register_data
from detection_toolkit.data.formats import open_source
from detection_toolkit.errors import UserError


def boxes(dicts):
    return [
        (os.path.basename(d["file_name"]), a["category_id"], *xyxy(a))
        for d in dicts
        for a in d["annotations"]
    ]


def expected(document):
    numbers = {c["id"]: i for i, c in enumerate(document["categories"])}
    names = {i["id"]: i["file_name"] for i in document["images"]}
    found = []
    for a in document["annotations"]:
        x, y, w, h = a["bbox"]
        found.append((names[a["image_id"]], numbers[a["category_id"]], x, y, x + w, y + h))
    return found


@pytest.fixture
def splits():
    return make_splits()


@pytest.fixture
def folder(tmp_path, splits):
    return write_yolo(tmp_path / "pets", splits)


def refuses(path, message, **kwargs):
    with pytest.raises(UserError, match=message) as raised:
        get_detection_dataset(path=str(path), **{"split": "train", **kwargs})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("named", ["data.yaml", "."])
def test_a_folder_and_its_yaml_are_the_same(folder, splits, named):
    for split in ("train", "val"):
        node = {"path": str(folder / named), "split": split}
        dicts = get_detection_dataset(**node)
        assert boxes(dicts) == expected(splits[split])  # to the last digit
        (name,) = dataset_names(node)
        assert name.startswith(f"pets_{split}")
        assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "bird"]
        assert [(d["height"], d["width"]) for d in dicts] == [(64, 96)] * len(dicts)


def test_all_images_without_a_split(folder, splits):
    dicts = get_detection_dataset(path=str(folder))
    assert boxes(dicts) == [*expected(splits["train"]), *expected(splits["val"])]


def test_registering_again_is_no_error(folder):
    names = {register_data(str(folder / "data.yaml"), split="train") for _ in range(2)}
    assert len(names) == 1


def test_a_class_may_be_called_no(tmp_path, splits):
    names = ["no", "1", "null"]
    for document in splits.values():
        for category, name in zip(document["categories"], names):
            category["name"] = name
    folder = write_yolo(tmp_path, splits)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [no, 1, null]")
    node = {"path": str(folder), "split": "train"}
    assert MetadataCatalog.get(dataset_names(node)[0]).thing_classes == names


def test_roboflow_leads_upwards_from_a_folder_that_is_not_there(tmp_path, splits):
    for split, document in splits.items():
        flat = write_yolo(tmp_path / "flat", {split: document})
        place = tmp_path / "rf" / {"val": "valid"}.get(split, split)
        place.mkdir(parents=True)
        shutil.move(flat / "images" / split, place / "images")
        shutil.move(flat / "labels" / split, place / "labels")
    text = "train: ../train/images\nval: ../valid/images\nnc: 3\nnames: ['cat', 'dog', 'bird']\n"
    (tmp_path / "rf" / "data.yaml").write_text(text)
    for split in ("train", "val"):
        dicts = get_detection_dataset(path=str(tmp_path / "rf" / "data.yaml"), split=split)
        assert boxes(dicts) == expected(splits[split])


def test_test_images_are_named_whether_there_are_any_or_not(folder):
    from detection_toolkit.data.formats import open_source

    with (folder / "data.yaml").open("a") as file:
        file.write("test: ../test/images\n")
    assert open_source(folder).splits == ("train", "val")
    assert len(get_detection_dataset(path=str(folder))) == 6


def test_one_split_needs_no_other(folder):
    shutil.rmtree(folder / "images/train")
    assert len(get_detection_dataset(path=str(folder), split="val")) == 2
    refuses(folder, "train is images/train, and there is no ")


def test_a_folder_of_images_that_is_the_root_has_labels_beside(tmp_path):
    document = make_document()
    made = write_yolo(tmp_path / "made", {"train": document})
    folder = tmp_path / "images"
    shutil.copytree(made / "images/train", folder)
    shutil.copytree(made / "labels/train", folder, dirs_exist_ok=True)
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")
    assert boxes(get_detection_dataset(path=str(folder))) == expected(document)


def test_lists_of_images(folder, splits):
    root = folder / "images"
    lines = [
        "./images/train/train1.png",
        "images/train/train2.png",
        "",
        str(root / "train/train3.png"),
    ]
    (folder / "train.txt").write_text("\n".join(lines))
    text = "train: [train.txt, images/val]\nval: images/val\nnames: {0: cat, 1: dog, 2: bird}\n"
    (folder / "data.yaml").write_text(text)
    dicts = get_detection_dataset(path=str(folder), split="train")
    names = [os.path.basename(d["file_name"]) for d in dicts]
    assert names == ["train1.png", "train2.png", "train3.png", "val1.png", "val2.png"]
    assert all(d["annotations"] for d in dicts)


def test_labels_of_the_other_list_have_their_images(tmp_path, splits, caplog):
    """And folders above the data set may be called as they like."""
    folder = write_yolo(tmp_path / "labels" / "pets", splits)
    for split in splits:
        lines = [f"images/all/{image.name}" for image in (folder / "images" / split).iterdir()]
        (folder / f"{split}.txt").write_text("\n".join(lines))
        for kind in ("images", "labels"):
            shutil.copytree(folder / kind / split, folder / kind / "all", dirs_exist_ok=True)
    text = "train: train.txt\nval: val.txt\nnames: [cat, dog, bird]\n"
    (folder / "data.yaml").write_text(text)
    for split in splits:
        dicts = get_detection_dataset(path=str(folder), split=split)
        assert sorted(boxes(dicts)) == sorted(expected(splits[split]))
    flat = folder / "flat"
    shutil.copytree(folder / "images/all", flat)
    shutil.copytree(folder / "labels/all", flat, dirs_exist_ok=True)
    (flat / "notes.txt").write_text("texts beside images may be anything")
    (flat / "classes.txt").write_text("cat\ndog\nbird\n")
    assert len(get_detection_dataset(path=str(flat))) == 6
    assert "images that are not there" not in caplog.text


@pytest.mark.parametrize("path", ["somewhere/else", "/no/such/folder", ".", "~nobody/x"])
def test_the_path_of_another_computer_is_not_needed(tmp_path, splits, path):
    folder = write_yolo(tmp_path, splits, table={"path": path})
    assert len(get_detection_dataset(path=str(folder), split="train")) == 4


def test_polygons_become_boxes_and_stay_as_masks(folder):
    line = "2 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.75\n"
    (folder / "labels/train/train1.txt").write_text(line)
    dicts = get_detection_dataset(path=str(folder), split="train")
    (annotation,) = dicts[0]["annotations"]
    assert xyxy(annotation) == [24, 16, 72, 48] and annotation["category_id"] == 2
    assert annotation["segmentation"] == [[24, 16, 72, 16, 72, 32, 24, 48]]


def test_keypoints_are_left_out(tmp_path, splits):
    folder = write_yolo(tmp_path, splits, table={"kpt_shape": [2, 3]})
    path = folder / "labels/train/train1.txt"
    path.write_text("1 0.5 0.5 0.25 0.25 0.4 0.4 2 0.6 0.6 1\n")
    dicts = get_detection_dataset(path=str(folder), split="train")
    assert xyxy(dicts[0]["annotations"][0]) == [36, 24, 60, 40]


def test_an_image_without_labels_is_background_and_labels_without_an_image_are_left_out(
    folder, caplog
):
    (folder / "labels/train/train1.txt").unlink()
    (folder / "images/train/train2.png").unlink()
    dicts = get_detection_dataset(path=str(folder), split="train", filter_empty=False)
    assert [len(d["annotations"]) for d in dicts] == [0, 2, 2]
    assert "1 labels of images that are not there (left out)" in caplog.text


def test_sizes_are_those_of_the_image_as_it_is_shown(folder):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture = Image.fromarray(np.zeros((96, 64, 3), dtype=np.uint8))
    picture.save(folder / "images/train/train1.png", exif=exif)
    dicts = get_detection_dataset(path=str(folder), split="train")
    assert (dicts[0]["height"], dicts[0]["width"]) == (64, 96)


def test_label_studio_and_cvat_name_classes_in_a_text(tmp_path):
    document = make_document()
    made = write_yolo(tmp_path / "made", {"train": document})
    for names, images, labels in (
        ("classes.txt", "images", "labels"),
        ("obj.names", "obj_train_data", "obj_train_data"),
    ):
        folder = tmp_path / names.replace(".", "_")
        shutil.copytree(made / "images/train", folder / images)
        shutil.copytree(made / "labels/train", folder / labels, dirs_exist_ok=True)
        (folder / names).write_text("cat\ndog\nbird\n")
        assert boxes(get_detection_dataset(path=str(folder))) == expected(document)


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 .5 .5 .2", r"train/train1\.txt, line 2 has 4 columns; YOLO has 5"),
        ("0 .5 .5 .2 .2 .9", "line 2 has 6 columns; YOLO has 5"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "line 2 has 8 columns"),
        ("3 .5 .5 .2 .2", "line 2 has class 3; there are the classes 0 to 2"),
        ("-1 .5 .5 .2 .2", "line 2 has class -1"),
        ("cat .5 .5 .2 .2", "line 2 has 'cat .5 .5 .2 .2', which is no numbers"),
        ("0 nan .5 .2 .2", "line 2 has numbers that are not finite"),
        ("0 48 32 30 20", "line 2 has 48; YOLO's numbers are shares"),
    ],
)
def test_lines_at_fault_are_named(folder, text, message):
    path = folder / "labels/train/train1.txt"
    path.write_text(f"0 .5 .5 .25 .25\n{text}\n{text}\n")
    refuses(folder, rf"{message}.*1 more like it")


def test_repairs_name_file_and_line(folder, caplog):
    from detection_toolkit.data.formats import open_source
    from detection_toolkit.data.judgement import judge

    path = folder / "labels/train/train1.txt"
    path.write_text("0 .5 .5 .25 .25\n0 .5 .5 0 .25\n")
    part = open_source(folder).read("train")
    findings = judge(part.document, str(part.image_root), found=part.found).findings
    (finding,) = [f for f in findings if f.kind == "degenerate"]
    assert finding.examples[0].startswith("labels/train/train1.txt, line 2: [48.0, 24.0, 0.0, 16")
    assert len(get_detection_dataset(path=str(folder), split="train")[0]["annotations"]) == 1
    assert "1 boxes without area (dropped)" in caplog.text


def test_a_label_that_is_no_text(folder):
    (folder / "labels/train/train1.txt").write_bytes(b"\xff\xfe\x00\x01")
    refuses(folder, r"train1\.txt is no text in UTF-8")


def test_images_without_any_label(folder):
    shutil.rmtree(folder / "labels")
    message = (
        r"none of the 4 images of train has labels: those of images/train/train1\.png would be"
    )
    refuses(folder, rf"{message} in labels/train/train1\.txt")


def test_an_image_that_is_none(folder):
    (folder / "images/train/train1.png").write_text("no picture")
    refuses(folder, r"train1\.png cannot be read")


def test_a_list_that_names_an_image_that_is_not_there(folder):
    (folder / "data.yaml").write_text("train: a.txt\nval: images/val\nnames: [a, b, c]")
    (folder / "a.txt").write_text("images/train/train1.png\nimages/train/gone.png\n")
    refuses(folder, r"gone\.png does not exist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\nnames: [a, b\n", "cannot be read as YAML"),
        ("train: images/train\nnames: [a, b]\nnc: 3\n", "nc is 3, and there are 2 names"),
        ("train: images/train\nnames: {1: a, 2: b}\n", "names has the keys 1, 2, and not 0 to 1"),
        ("train: images/train\nnames: a\n", "names is no list of names"),
        ("train: images/train\nnames: [[a], b]\n", "names is no list of names"),
        ("train: images/train\nnc: many\n", "has no names of classes"),
        ("train: images/train\nnc: ²\n", "has no names of classes"),
        ("train: images/train\nnc: 9999999999\n", "has no names of classes"),
        ("train: images/trian\nnames: [a]\n", "train is images/trian, and there is no .*trian"),
        ("train: {a: b}\nnames: [a]\n", "train is neither a path nor a list of paths"),
        ("train: images/train\nnames: !!python/name:os.system ''\n", "names is no list of names"),
    ],
)
def test_a_yaml_at_fault_is_named(folder, text, message):
    (folder / "data.yaml").write_text(text)
    refuses(folder / "data.yaml", rf"data\.yaml.*{message}", format="yolo")


def test_labels_without_names_of_classes(folder):
    (folder / "data.yaml").unlink()
    refuses(
        folder, r"labels/train/train1\.txt is there.*nothing that names the classes: write a data"
    )


# -- files of strangers ---------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path, splits):
    """Images with labels beside the folder of the data set."""
    return write_yolo(tmp_path / "secret", splits)


@pytest.mark.parametrize("entry", ["../secret/images/train", "{}/images/train"])
def test_a_yaml_does_not_lead_out_of_its_folder(folder, secret, entry):
    text = f"train: {entry.format(secret)}\nval: images/val\nnames: [cat, dog, bird]\n"
    (folder / "data.yaml").write_text(text)
    refuses(
        folder,
        r"train is .*, which leads out of the folder .*, which it may if you name the file itself "
        r".*--data .*data\.yaml\. .*set dataloader\.train\.dataset\.allow_outside=true",
    )
    dicts = get_detection_dataset(path=str(folder), split="train", allow_outside=True)
    assert len(dicts) == 4


@pytest.mark.parametrize("path", ["../secret", "{}", "{}/../secret"])
def test_the_path_of_a_yaml_does_not_lead_out_but_may_be_named(folder, secret, path):
    text = f"path: {path.format(secret)}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n"
    alone = folder.parent / "alone"
    alone.mkdir()
    (alone / "data.yaml").write_text(text)
    refuses(alone, "its path .* leads out of the folder of the file.*image_root=")
    dicts = get_detection_dataset(path=str(alone), split="train", image_root=str(secret))
    assert len(dicts) == 4


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("project/my.yaml", "../secret"),
        ("project/my.yaml", "{}"),
        ("project/configs/my.yaml", "../secret"),  # as from the project's folder
        ("project/my.yaml", "{}/."),
        ("my.yaml", "secret"),
        ("my.yaml", "{}"),
    ],
)
def test_a_yaml_that_is_named_itself_leads_to_its_images(
    tmp_path, secret, splits, place, path, caplog
):
    table = tmp_path / place
    table.parent.mkdir(parents=True, exist_ok=True)
    entries = "train: images/train\nval: images/val\ntest:\nnc: 3\nnames: [cat, dog, bird]\n"
    table.write_text(f"path: {path.format(secret)}  # of the data\n{entries}")
    with caplog.at_level("INFO"):
        for split in ("train", "val"):
            dicts = get_detection_dataset(path=str(table), split=split)
            assert boxes(dicts) == expected(splits[split])
    if table.parent != tmp_path:  # the folder is told
        assert str(secret) in open_source(table).evidence
        assert f"my.yaml leads to the images of {secret}" in caplog.text


@pytest.mark.parametrize("base", ["datasets", "../datasets"])
def test_the_path_of_a_yaml_is_looked_for_where_ultralytics_keeps_its_data(tmp_path, splits, base):
    folder = tmp_path / "project"
    folder.mkdir()
    write_yolo(folder / base / "pets8", splits)
    entries = "train: images/train\nval: images/val\n"
    (folder / "my.yaml").write_text(f"path: pets8\n{entries}names: [a, b, c]\n")
    assert len(get_detection_dataset(path=str(folder / "my.yaml"), split="train")) == 4


def test_a_yaml_that_is_named_itself_may_name_its_images_in_full(tmp_path, secret, splits):
    (tmp_path / "project").mkdir()
    table = tmp_path / "project" / "my.yaml"
    entries = f"train: {secret}/images/train\nval: {secret}/images/val\n"
    table.write_text(f"{entries}names: [cat, dog, bird]\n")
    for split in ("train", "val"):
        assert boxes(get_detection_dataset(path=str(table), split=split)) == expected(splits[split])


def test_a_yaml_that_is_named_itself_leads_to_no_images_without_labels(tmp_path, secret):
    (tmp_path / "alone").mkdir()
    table = tmp_path / "alone" / "my.yaml"
    entries = "train: images/train\nval: images/val\nnames: [a, b, c]\n"
    table.write_text(f"path: {secret}\n{entries}")
    table.with_name("full.yaml").write_text(f"train: {secret}/images/train\nnames: [a, b, c]\n")
    shutil.rmtree(secret / "labels" / "val")
    refuses(
        table, "leads out of the folder .*have no labels there.*[.] Name the folder: image_root"
    )
    assert open_source(table.with_name("full.yaml")).splits == ("train",)
    shutil.rmtree(secret / "labels")
    refuses(table.with_name("full.yaml"), "train is .*, which leads out of the folder")


def test_a_yaml_that_is_named_itself_leads_to_labelled_test_images_alone(tmp_path, secret, splits):
    (tmp_path / "alone").mkdir()
    table = tmp_path / "alone" / "my.yaml"
    entries = "train: images/train\ntest: images/val\nnames: [a, b, c]\n"
    table.write_text(f"path: {secret}\n{entries}")
    assert open_source(table).splits == ("train", "test")
    shutil.rmtree(secret / "labels" / "val")
    assert open_source(table).splits == ("train",)


def test_a_yaml_does_not_lead_from_outside_to_elsewhere(tmp_path, folder, secret):
    (tmp_path / "alone").mkdir()
    table = tmp_path / "alone" / "my.yaml"
    table.write_text(f"path: {secret}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    image = secret / "images/train/train1.png"
    image.unlink()
    image.symlink_to(folder / "images/train/train1.png")
    refuses(table, r"links to files outside.*train1\.png")


@pytest.fixture
def photos(tmp_path, splits):
    """Pictures without labels."""
    folder = tmp_path / "photos"
    write_images(folder, splits["train"]["images"])
    return folder


def write_table(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "my.yaml"
    path.write_text(f"{text}\nnames: [cat, dog, bird]\n")
    return path


@pytest.mark.parametrize("path", ["/", "..", "../.."])
@pytest.mark.parametrize("others", ["photos", "secret"])
def test_a_list_does_not_vouch_for_images_elsewhere_by_its_own(
    tmp_path, folder, secret, photos, path, others
):
    place = photos if others == "photos" else secret / "images" / "train"
    images = [*(folder / "images").rglob("*.png"), *list(place.glob("*.png"))[:3]]
    (folder / "train.txt").write_text("".join(f"{image}\n" for image in images))
    base = (folder / path).resolve()
    table = write_table(folder, f"path: {path}\ntrain: {(folder / 'train.txt').relative_to(base)}")
    refuses(table, "its path .* leads out of the folder")
    shutil.move(table, folder / "configs.yaml")
    elsewhere = write_table(tmp_path / "configs", f"train: {folder / 'train.txt'}")
    if others == "photos":  # those with labels may be named from elsewhere
        refuses(elsewhere, "train is .*, which leads out of the folder")


@pytest.mark.parametrize("share", ["all", "link"])
def test_images_that_are_listed_need_labels_in_each_of_their_folders(
    tmp_path, secret, photos, share
):
    images = list((secret / "images").rglob("*.png"))
    listed = [photos / "train1.png"]
    if share == "link":
        listed = [secret / "images" / "train" / "train1.png"]
        listed[0].unlink()
        listed[0].symlink_to(photos / "train1.png")
    (secret / "a.txt").write_text("".join(f"{image}\n" for image in {*images, *listed}))
    table = write_table(tmp_path / "alone", f"train: {secret}/a.txt")
    refuses(table, "train is .*, which leads out of the folder .*have no labels there")


@pytest.mark.parametrize("entry", ["images", "images/", "images/train1.png"])
@pytest.mark.parametrize("path", ["..", "."])
def test_labels_beside_a_link_say_nothing_of_the_images_that_it_leads_to(
    tmp_path, photos, splits, path, entry
):
    stranger = tmp_path / "stranger"
    (stranger / "labels").mkdir(parents=True)
    for image in photos.glob("*.png"):
        (stranger / "labels" / f"{image.stem}.txt").write_text("0 .5 .5 .2 .2\n")
    (stranger / "images").symlink_to(photos)
    start = "stranger/" if path == ".." else ""
    refuses(
        write_table(stranger, f"path: {path}\ntrain: {start}{entry}"), "leads out of the folder"
    )


def test_a_link_to_images_with_labels_is_followed(tmp_path, secret, splits):
    table = write_table(tmp_path / "mine", "train: images/train\nval: images/val")
    (table.parent / "images").symlink_to(secret / "images")
    assert boxes(get_detection_dataset(path=str(table), split="val")) == expected(splits["val"])
    refuses(
        table.parent, "leads out of the folder .*if you name the file itself .*--data .*my.yaml"
    )


@pytest.mark.parametrize("lies", ["cfg", "deep/cfg"])
def test_a_yaml_may_lie_in_a_folder_of_the_data_set(folder, splits, lies):
    up = "/".join([".."] * len(lies.split("/")))
    table = write_table(folder / lies, f"path: {up}\ntrain: images/train\nval: images/val")
    assert boxes(get_detection_dataset(path=str(table), split="train")) == expected(splits["train"])


@pytest.mark.parametrize("beside", [False, True])
def test_a_list_elsewhere_may_have_images_without_labels(tmp_path, secret, splits, beside):
    images, labels = secret / "images" / "train", secret / "labels" / "train"
    if beside:  # as Darknet has them
        images = shutil.move(images, secret / "obj")
        for label in labels.glob("*.txt"):
            shutil.move(label, images)
        labels = images
    names = sorted(image.name for image in Path(images).glob("*.png"))
    text = "".join(f"./{Path(images).relative_to(secret)}/{name}\n" for name in names)
    (secret / "train.txt").write_text(text)
    table = write_table(tmp_path / "mine", "path: ../secret\ntrain: train.txt")
    read = {"path": str(table), "split": None, "filter_empty": False}
    assert boxes(get_detection_dataset(**read)) == expected(splits["train"])
    label = labels / "train1.txt"
    label.unlink()
    assert len(get_detection_dataset(**read)) == len(names)


def test_labels_without_a_last_newline_and_of_backgrounds_are_known(tmp_path, splits):
    folder = tmp_path / "data"
    for number in range(30):
        write_image(folder / "images" / "train" / f"{number:02}.png")
        label = folder / "labels" / "train" / f"{number:02}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 .5 .5 .2 .2" if number > 25 else "")
    table = write_table(tmp_path / "mine", "path: ../data\ntrain: images/train")
    assert len(boxes(get_detection_dataset(path=str(table), split=None))) == 4


def test_captions_are_no_labels(tmp_path, photos):
    for image in photos.glob("*.png"):
        image.with_suffix(".txt").write_text("a cat on a mat\n")
    (photos / "train1.txt").write_text("0 .5 .5 .2 .2\n")
    table = write_table(tmp_path / "mine", f"train: {photos}")
    refuses(table, "train is .*, which leads out of the folder .*have no labels there")


@pytest.mark.parametrize("entry", ["images/train", "train.txt"])
def test_a_folder_elsewhere_is_listed_and_not_asked_for_each_file(tmp_path, monkeypatch, entry):
    folder, count = tmp_path / "data", 60
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    labels.mkdir(parents=True)
    write_image(images / "0.png")
    for number in range(count):
        if number:
            os.link(images / "0.png", images / f"{number}.png")
        (labels / f"{number}.txt").write_text("0 .5 .5 .2 .2\n")
    (folder / "train.txt").write_text("".join(f"images/train/{n}.png\n" for n in range(count)))
    table = write_table(tmp_path / "mine", f"path: ../data\ntrain: {entry}")
    listed, asked, is_file, scandir = [], [], Path.is_file, os.scandir
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or is_file(path))
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    for _ in range(2):
        assert open_source(table).image_root == folder
    assert listed.count(str(labels)) == 1
    assert not any(path.suffix == ".png" for path in asked)
    assert len(asked) < count * 2  # of a few labels, to see what is in them


def test_where_the_path_is_nowhere_the_message_says_what_to_do(folder):
    (folder / "data.yaml").write_text("path: elsewhere\ntrain: images/x\nnames: [a, b, c]\n")
    refuses(folder / "data.yaml", "images/x, as path is elsewhere. --image-root names another")


@pytest.mark.parametrize("base", ["/content/pets-4", "C:\\\\data\\\\pets-4", "D:/pets"])
@pytest.mark.parametrize("named", ["data.yaml", "."])
def test_full_paths_of_another_computer_are_found_in_the_folder(folder, splits, base, named):
    slash = "\\\\" if "\\" in base else "/"
    entries = "".join(f'{s}: "{base}{slash}images{slash}{s}"\n' for s in ("train", "val"))
    (folder / "data.yaml").write_text(f"{entries}names: [cat, dog, bird]\n")
    for split in ("train", "val"):
        dicts = get_detection_dataset(path=str(folder / named), split=split)
        assert boxes(dicts) == expected(splits[split])


def test_the_end_of_a_full_path_must_name_a_split(folder):
    entries = "train: /content/pets/train/images\nval: /content/pets/val/images\n"
    (folder / "data.yaml").write_text(f"{entries}names: [cat, dog, bird]\n")
    refuses(folder, "train is /content/pets/train/images, and there is no")  # there is images/


def test_what_a_yaml_would_download_is_not(folder):
    text = "path: coco8\ntrain: images/x\ndownload: https://example.com/a.zip\nnames: [a]\n"
    (folder / "coco8.yaml").write_text(text)
    refuses(folder / "coco8.yaml", "as path is coco8, and download is not followed: unpack it")


def test_a_yaml_that_cannot_be_read_is_named_whatever_its_name(folder):
    (folder / "pets.yaml").write_text("train:\timages\n\tval: x\nnames: [a\n")
    refuses(folder / "pets.yaml", "pets.yaml cannot be read as YAML: .*line 1")


@pytest.mark.parametrize("begin", ["data/", "/old/place/", "C:\\\\pets\\\\", "./"])
def test_lists_of_cvat_and_of_another_computer_are_found(folder, splits, begin):
    images = sorted((folder / "images" / "train").glob("*.png"))
    text = "".join(f"{begin}{path.relative_to(folder)}\n" for path in images)
    (folder / "train.txt").write_text(text)
    (folder / "data.yaml").write_text("path: .\ntrain: train.txt\nnames: [cat, dog, bird]\n")
    found = get_detection_dataset(path=str(folder), split=None, format="yolo")
    assert boxes(found) == expected(splits["train"])


@pytest.mark.parametrize("is_relative", [False, True])
def test_lists_may_name_images_of_their_folder_in_full(folder, splits, monkeypatch, is_relative):
    images = sorted((folder / "images" / "train").glob("*.png"))
    (folder / "a.txt").write_text("".join(f"{path}\n" for path in images))
    (folder / "data.yaml").write_text("train: a.txt\nval: images/val\nnames: [cat, dog, bird]\n")
    monkeypatch.chdir(folder.parent)
    path = folder.name if is_relative else str(folder)
    assert boxes(get_detection_dataset(path=path, split="train")) == expected(splits["train"])


def test_where_the_path_leads_out_and_the_images_are_here_they_are_used(folder, secret):
    text = f"path: {secret}\ntrain: images/train\nval: images/val\nnames: [cat, dog, bird]\n"
    (folder / "data.yaml").write_text(text)
    dicts = get_detection_dataset(path=str(folder), split="train")
    assert all(d["file_name"].startswith(str(folder)) for d in dicts)


@pytest.mark.parametrize(
    "line", ["../secret/images/train/train1.png", "{}/images/train/train1.png"]
)
def test_a_list_does_not_lead_out_either(folder, secret, line):
    (folder / "data.yaml").write_text("train: a.txt\nval: images/val\nnames: [a, b, c]")
    (folder / "a.txt").write_text(line.format(secret))
    refuses(
        folder,
        r"a\.txt, line 1 has file_name .*train1\.png', which (leads upw|is abs).*allow_outside",
    )
    assert get_detection_dataset(path=str(folder), split="train", allow_outside=True)


def test_links_out_of_the_folder_are_refused(folder, secret, tmp_path):
    image = folder / "images/train/train1.png"
    image.unlink()
    image.symlink_to(secret / "images/train/train1.png")
    refuses(folder, r"links to files outside.*train1\.png")
    image.unlink()
    write_image(image)
    label = folder / "labels/train/train1.txt"
    label.unlink()
    (tmp_path / "passwords").write_text("root:x:0\n")
    label.symlink_to(tmp_path / "passwords")
    refuses(folder, r"train1\.txt is a link out of the folder")
    (folder / "data.yaml").write_text("train: a.txt\nval: images/val\nnames: [a, b, c]")
    (folder / "a.txt").symlink_to(tmp_path / "passwords")
    refuses(folder, "which leads out of the folder")


def test_aliases_that_multiply_are_no_names(folder):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (folder / "data.yaml").write_text("\n".join([*lines, "names: *i", "train: images/train"]))
    refuses(folder, "names is no list of names")


def test_strange_letters_are_not_printed(folder):
    (folder / "labels/train/train1.txt").write_text("\x1b[2J .5 .5 .2 .2\n")
    with pytest.raises(UserError) as raised:
        get_detection_dataset(path=str(folder), split="train")
    assert str(raised.value).isprintable()


def test_images_may_have_any_names(tmp_path, splits):
    document = splits["train"]
    document["images"][0]["file_name"] = "schön ☃.png"
    folder = write_yolo(tmp_path / "données è", {"train": document, "val": splits["val"]})
    write_images(folder / "images" / "train", document["images"])
    names = {os.path.basename(d["file_name"]) for d in get_detection_dataset(path=str(folder))}
    assert "schön ☃.png" in names
