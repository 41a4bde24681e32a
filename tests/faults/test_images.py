"""Every kind of picture has an outcome in training, in evaluation and in the demo."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from coco_files import make_document
from detectron2.data.transforms import AugInput, AugmentationList, ResizeShortestEdge
from fault_runs import ROOT, data_overrides, load_tool, run_forked, run_overrides
from patience import PATIENCE
from picture_cases import CASES, REFUSED, USED, gradient
from PIL import Image

from detection_toolkit.data import (
    DetectionMapper,
    SkipUnreadable,
    UnreadableImageError,
    get_detection_dataset,
    read_image,
)
from detection_toolkit.data.images import shown_size
from detection_toolkit.data.mapper import augment
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge


def ids(cases):
    return [ascii(case.name).strip("'") for case in cases]


def record_of(case, folder):
    case.write(folder / case.name)
    height, width = case.size
    box = {"bbox": [0, 0, width, height], "bbox_mode": 1, "category_id": 0}
    return {
        "file_name": str(folder / case.name),
        "height": height,
        "width": width,
        "image_id": 1,
        "annotations": [box],
    }


@pytest.mark.parametrize("case", USED, ids=ids(USED))
def test_a_picture_that_is_used_has_its_colours(tmp_path, case):
    record = record_of(case, tmp_path)
    expected = gradient(*case.size)[..., None].astype(int)
    for is_train in (True, False):
        image = DetectionMapper(is_train, augmentations=[])(record)["image"]
        assert image.shape == (3, *case.size)
        found = image.permute(1, 2, 0).numpy()
        # JPEG and palettes are not exact; white or black in the place of grey would be far off.
        assert np.abs(found - expected).mean() < 4
    assert read_image(record["file_name"], "BGR").shape == (*case.size, 3)


@pytest.mark.parametrize("case", REFUSED, ids=ids(REFUSED))
def test_a_picture_that_is_refused_is_named(tmp_path, case):
    record = record_of(case, tmp_path)
    for is_train in (True, False):
        with pytest.raises(UnreadableImageError, match=case.refused) as error:
            DetectionMapper(is_train, augmentations=[])(record)
        assert str(error.value).startswith(f"image {record['file_name']} ")
    assert SkipUnreadable(DetectionMapper(True, augmentations=[]), num_images=2)(record) is None


def test_a_message_is_one_line_whatever_the_name(tmp_path):
    path = tmp_path / "new\nline.png"
    with pytest.raises(UnreadableImageError) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    assert r"new\nline.png" in str(error.value)


def test_the_size_limit_can_be_moved(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 50)).save(path)
    assert read_image(path, max_pixels=5000).shape == (50, 100, 3)
    with pytest.raises(UnreadableImageError, match="100x50 pixels are more than the limit of 4999"):
        read_image(path, max_pixels=4999)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UnreadableImageError, match="limit"):
        DetectionMapper(False, augmentations=[], max_pixels=10)({"file_name": str(path)})
    assert before == Image.MAX_IMAGE_PIXELS


def test_threads_with_other_limits_do_not_move_each_others(tmp_path, monkeypatch):
    """The second begins before the first ends, and ends after it."""
    limits = {str(tmp_path / "first.png"): 5000, str(tmp_path / "second.png"): 10**9}
    for path in limits:
        Image.new("RGB", (100, 50)).save(path)
    first_reads, second_reads, first_has_ended = (threading.Event() for _ in range(3))
    seen = []

    def pause(image):
        if image.fp.name.endswith("first.png"):
            first_reads.set()
            assert second_reads.wait(PATIENCE)
        else:
            second_reads.set()
            assert first_has_ended.wait(PATIENCE)
            seen.append(Image.MAX_IMAGE_PIXELS)
        return image

    def read(path):
        return read_image(path, max_pixels=limits[path]).shape

    monkeypatch.setattr("detection_toolkit.data.images._apply_exif_orientation", pause)
    before = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, str(tmp_path / "first.png"))
        assert first_reads.wait(PATIENCE)
        second = pool.submit(read, str(tmp_path / "second.png"))
        assert first.result(PATIENCE) == (50, 100, 3)
        first_has_ended.set()
        assert second.result(PATIENCE) == (50, 100, 3)
    assert seen == [10**9]
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("resize", [ResizeShortestEdge, OpenCVResizeShortestEdge])
def test_a_picture_too_thin_to_be_resized_is_refused_like_an_unreadable_one(resize):
    resizing = AugmentationList([resize(800, 1333)])
    with pytest.raises(UnreadableImageError, match="image a.png of 20000x1 pixels is too thin"):
        augment(resizing, AugInput(np.zeros((1, 20000, 3), np.uint8)), "a.png")
    wide = AugInput(np.zeros((30, 20000, 3), np.uint8))
    augment(resizing, wide, "a.png")
    assert wide.image.shape == (2, 1333, 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """All of them in one folder, and a COCO-format JSON of them."""
    folder = tmp_path_factory.mktemp("pictures")
    document = make_document(num_images=len(CASES), boxes_per_image=1)
    for image, annotation, case in zip(document["images"], document["annotations"], CASES):
        case.write(folder / case.name)
        image.update(file_name=case.name, height=case.size[0], width=case.size[1])
        annotation["bbox"] = [0, 0, case.size[1], case.size[0]]
    return folder, document


def write_json(path, document, cases):
    names = {case.name for case in cases}
    kept = [image for image in document["images"] if image["file_name"] in names]
    kept_ids = {image["id"] for image in kept}
    annotations = [a for a in document["annotations"] if a["image_id"] in kept_ids]
    path.write_text(json.dumps({**document, "images": kept, "annotations": annotations}))
    return str(path)


def test_training_and_evaluation_use_them_all(tmp_path, pictures):
    """Unreadable ones are skipped in training; evaluation is of the readable ones."""
    folder, document = pictures
    everything = write_json(tmp_path / "all.json", document, CASES)
    readable = write_json(tmp_path / "readable.json", document, USED)
    target = "detectron2.data.transforms.ResizeShortestEdge"
    resize = f"{{_target_:{target},short_edge_length:48,max_size:800}}"
    overrides = [
        *run_overrides(tmp_path / "out", data_overrides(everything, str(folder))),
        "model.backbone.bottom_up.widths=[16,16,16,16]",
        f"dataloader.train.mapper.augmentations=[{resize}]",
        f"dataloader.test.mapper.augmentations=[{resize}]",
        f"dataloader.test.dataset.json_file={readable}",
        "dataloader.train.skip_unreadable=true",
        "train.max_iter=12",
        "dataloader.train.total_batch_size=3",
    ]
    log = tmp_path / "console.txt"
    assert run_forked(overrides, log=log) == 0, log.read_text()[-3000:]
    # More than one round over all pictures. The first that are skipped are named, later ones
    # counted at powers of two.
    skipped = re.findall(r"skipped unreadable image (.*) \(\d+ so far\)", log.read_text())
    assert {Path(name).name for name in skipped} < {case.name for case in REFUSED}
    assert 8 <= len(REFUSED) < 16
    assert "skipped 8 unreadable images so far" in log.read_text()
    (found,) = (tmp_path / "out").glob("inference/*/coco_instances_results.json")
    seen = {detection["image_id"] for detection in json.loads(found.read_text())}
    assert seen == {image["id"] for image in json.loads(Path(readable).read_text())["images"]}


def test_a_json_names_them_all(tmp_path, pictures):
    folder, document = pictures
    path = write_json(tmp_path / "all.json", document, CASES)
    dataset = get_detection_dataset(json_file=path, image_root=str(folder))
    assert len(dataset) == len(CASES)


def test_the_demo_draws_or_skips_them(tmp_path, pictures, capsys):
    folder, _ = pictures
    demo = load_tool("demo", ROOT / "demo")
    files = [case for case in CASES if (folder / case.name).is_file()]
    inputs = [str(folder / case.name) for case in files]
    assert demo.main(["--input", *inputs, "--output", str(tmp_path / "out")]) == 1
    drawn = {p.name for p in (tmp_path / "out").iterdir()}
    assert len(drawn) == len(USED)
    shown = capsys.readouterr().err
    skipped = [line for line in shown.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == len(files) - len(USED)
    for case in set(files) - set(USED):
        assert any(case.name in line and case.refused in line for line in skipped), case.name


def test_a_pipe_under_the_name_of_a_picture_is_not_waited_for(tmp_path):
    """Nobody writes into it, and to open it would never end."""
    path = tmp_path / "a.png"
    os.mkfifo(path)
    outcomes = []

    def read():
        with pytest.raises(UnreadableImageError, match=r"a\.png .*a pipe or a device"):
            read_image(path)
        outcomes.append(shown_size(path))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(PATIENCE)
    assert outcomes == [None]
