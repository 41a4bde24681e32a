"""``view data``: its pictures, its page, and what it says of wrong input."""

import base64
import json
import re

import numpy as np
import pytest
import torch
import visualize_data
from coco_files import make_document, write_dataset
from detectron2.data import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from format_files import make_splits, write_yolo
from PIL import Image
from small_runs import SMALL_MODEL, data_overrides

from detection_toolkit.visualization import contact_page
from detection_toolkit.visualization.contact_page import ContactPage
from detection_toolkit.visualization.report_charts import embed_picture
from detection_toolkit.visualization.training_images import draw_training_input


@pytest.fixture
def options(tmp_path):
    document = make_document(num_images=6)
    document["categories"][0]["name"] = "<i>cat"
    document["images"][0]["file_name"] = "<b>&.png"
    document["annotations"][0]["iscrowd"] = 1
    document["annotations"][0]["segmentation"] = {"size": [64, 96], "counts": [9, 64 * 96 - 9]}
    files = write_dataset(tmp_path / "data", document)
    batch = "dataloader.train.total_batch_size=2"
    return [*SMALL_MODEL, *data_overrides(*files), batch, "train.seed=2", "train.device=cpu"]


def call(folder, *arguments):
    return visualize_data.main(["--output", str(folder), *arguments])


def pictures_of(page):
    """Pictures that are within a page, as JPEGs."""
    text = page.read_text(encoding="utf-8")
    return [base64.b64decode(x) for x in re.findall(r"data:image/jpeg;base64,([^']+)'", text)]


def test_data_alone_are_drawn_as_the_config_for_them_has_it(tmp_path, capsys):
    write_yolo(tmp_path / "pets", make_splits())
    words = ["--data", str(tmp_path / "pets"), "--number", "2", "train.device=cpu"]
    assert call(tmp_path / "out", *words) == 0
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "stageinteractor_tiny_custom.py" in text


def test_a_picture_of_each_image_and_a_page_of_all(options, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(out, "--number", "5", "--start", "2", *options) == 0
    pictures = sorted(out.glob("*.png"))
    assert [int(path.name.split("_")[0]) for path in pictures] == [2, 3, 4, 5, 6]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (480, 320)  # five times 96x64
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 500
    text = (out / "index.html").read_text(encoding="utf-8")
    assert len(pictures_of(out / "index.html")) == 5
    assert text.count("<h2>Batch ") == 3 and "train.seed=2" in text
    assert "96x64; 2 objects" in text
    assert "://" not in text and not re.search(r"<script|src='(?!data:)", text)
    assert str(out / "index.html") in capsys.readouterr().out


def test_data_may_be_named_as_for_training(tmp_path):
    files = write_yolo(tmp_path / "pets", make_splits())
    options = [*SMALL_MODEL, "train.device=cpu", "--data", str(files / "data.yaml")]
    config = ["--config-file", "stageinteractor/stageinteractor_tiny_custom.py"]
    assert call(tmp_path / "out", "--number", "2", *config, *options) == 0
    assert len(list((tmp_path / "out").glob("*train*.png"))) == 2


def test_names_of_strangers_are_escaped_and_crowds_counted(options, tmp_path):
    assert call(tmp_path / "out", "--number", "6", *options) == 0
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;.png" in text and "<b>" not in text
    assert "1 object; 1 crowd (dashed) not trained on" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--number", "0"], "got start 0 and number 0"),
        (["--start", "-3"], "got start -3 and number 16"),
        (["--config-file", "no_such.py"], "no_such.py does not exist"),
        (["dataloader.train.total_batch_size=0"], "total_batch_size=0 cannot be shared"),
        (["train.no_such_key=1"], "no_such_key"),
        (["dataloader.train.dataset.json_file=gone.json"], "gone.json"),
    ],
)
def test_wrong_input_is_one_line(options, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        call(tmp_path / "out", *options, *arguments)
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_named(options, tmp_path):
    for path in (tmp_path / "data" / "images").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"\.png cannot be read.*skip_unreadable"):
        call(tmp_path / "out", *options)


def test_the_help_of_the_group_names_it(capsys):
    with pytest.raises(SystemExit):
        visualize_data.main(["--help"])
    assert "--start POSITION" in capsys.readouterr().out


def an_input(image_format="RGB"):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0 if image_format == "RGB" else 2] = 200
    instances = Instances((40, 60))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30]]))
    instances.gt_classes = torch.tensor([0])
    return {"image": image, "instances": instances}


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_colours_padding_and_masks_are_where_they_belong(image_format):
    view = an_input(image_format)
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[0, 12:28, 12:20] = True
    metadata = Metadata(thing_classes=["cat"], thing_colors=[(0, 0, 255)])
    options = {"image_format": image_format, "padding": (10, 20, 30), "scale": 1.0}
    plain = draw_training_input(view, (64, 64), metadata, **options)
    assert plain.shape == (64, 64, 3)
    assert (plain[:40, 36:60] == (200, 0, 0)).all()
    expected = (10, 20, 30) if image_format == "RGB" else (30, 20, 10)
    assert (plain[:, 62:] == expected).all() and (plain[60:] == expected).all()
    view["instances"].gt_masks = BitMasks(mask)
    masked = draw_training_input(view, (64, 64), metadata, **options)
    assert np.abs(masked[14:20, 14:18].astype(int) - (130, 0, 89)).max() <= 2
    assert (masked[14:20, 23:27] == (200, 0, 0)).all()


def test_crowds_are_dashed():
    view = an_input()
    crowds = torch.tensor([[5.0, 5, 55, 35]])
    plain = draw_training_input(view, (40, 60), scale=8.0)
    drawn = draw_training_input(view, (40, 60), scale=8.0, crowds=crowds)
    row = (drawn[40, 60:420] != plain[40, 60:420]).any(-1)  # of the crowd's upper edge
    assert 0.2 < row.mean() < 0.9


def test_a_page_is_of_a_bounded_size_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_page, "_MOST_BYTES", 60_000)
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    page = ContactPage("<title>", 9, "a & b")
    for number in range(9):
        page.add(noise, f"number {number}", "below")
    path = tmp_path / "page.html"
    page.write(path)
    found = pictures_of(path)
    assert len(found) == 6 and sum(map(len, found)) <= 60_000
    text = path.read_text()
    assert "3 more pictures are in the folder of this page" in text
    assert "&lt;title&gt;" in text and "a &amp; b" in text and path.stat().st_size < 90_000


def test_a_picture_is_made_small_enough():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    for most in (50_000, 5_000, 1_000):
        content = base64.b64decode(embed_picture(noise, most_bytes=most).partition(",")[2])
        assert most / 4 < len(content) <= most
    assert len(embed_picture(noise)) > 60_000


@pytest.mark.slow
def test_labels_of_several_images_have_a_page_and_of_one_none(tmp_path):
    """Through the command that shares its beginning and end with ``view stages``."""
    import visualize_assignment
    from detectron2.config import instantiate

    from detection_toolkit.config import apply_overrides, get_config

    files = write_dataset(tmp_path / "data", num_images=3)
    opts = [*SMALL_MODEL, *data_overrides(*files), "train.device=cpu", "model.num_classes=3"]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), opts)
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "model.pth")
    arguments = [f"train.init_checkpoint='{tmp_path / 'model.pth'}'", *opts[:-1]]
    for count in (1, 3):
        out = tmp_path / str(count)
        assert (
            visualize_assignment.main(
                ["--num-images", str(count), "--output", str(out), *arguments]
            )
            == 0
        )
        assert len(list(out.glob("*.png"))) == count
        assert (out / "index.html").exists() == (count > 1)
    assert len(pictures_of(tmp_path / "3" / "index.html")) == 3
    # One that cannot be read is named, and the others are drawn.
    (tmp_path / "data" / "images" / "2.png").write_bytes(b"damaged")
    again = tmp_path / "again"
    assert visualize_assignment.main(["--output", str(again), *arguments]) == 1
    assert sorted(path.stem for path in again.glob("*.json")) == ["1_assignment", "3_assignment"]
    assert json.loads((again / "1_assignment.json").read_text())["image_id"] == 1
