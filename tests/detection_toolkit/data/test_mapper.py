import errno

import numpy as np
import pytest
from coco_files import make_document, write_dataset
from detectron2.data.transforms import CropTransform, RandomFlip, ResizeShortestEdge
from PIL import Image

from detection_toolkit.data import (
    DetectionMapper,
    SkipUnreadable,
    UnreadableImageError,
    get_detection_dataset,
)
from detection_toolkit.data.mapper import ImageSizeError
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge


def make_mapper(is_train=True, augmentations=(), **kwargs):
    return DetectionMapper(is_train, augmentations=augmentations, **kwargs)


def make_dataset(tmp_path, document=None, **kwargs):
    json_file, image_root = write_dataset(tmp_path, document, **kwargs)
    return get_detection_dataset(json_file=json_file, image_root=image_root, filter_empty=False)


def test_a_training_image_carries_boxes_and_classes(tmp_path):
    record = make_dataset(tmp_path)[0]
    before = repr(record)
    sample = make_mapper()(record)
    assert sample["image"].shape == (3, 64, 96)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[4, 6, 34, 31], [14, 11, 44, 36]]
    assert sample["instances"].gt_classes.tolist() == [1, 2]
    assert (sample["height"], sample["width"], sample["image_id"]) == (64, 96, 1)
    assert repr(record) == before


def test_a_test_image_carries_its_original_size_and_no_annotations(tmp_path):
    mapper = make_mapper(is_train=False, augmentations=[ResizeShortestEdge(32)])
    sample = mapper(make_dataset(tmp_path)[0])
    assert sample["image"].shape == (3, 32, 48)
    assert (sample["height"], sample["width"]) == (64, 96)
    assert "annotations" not in sample and "instances" not in sample


def test_flipping_flips_the_boxes(tmp_path):
    sample = make_mapper(augmentations=[RandomFlip(prob=1.0)])(make_dataset(tmp_path)[0])
    assert sample["instances"].gt_boxes.tensor[0].tolist() == [96 - 34, 6, 96 - 4, 31]


@pytest.mark.parametrize("resize", [ResizeShortestEdge, OpenCVResizeShortestEdge])
def test_resizing_resizes_the_boxes(tmp_path, resize):
    sample = make_mapper(augmentations=[resize(128)])(make_dataset(tmp_path)[0])
    assert sample["image"].shape == (3, 128, 192)
    assert sample["instances"].gt_boxes.tensor[0].tolist() == [8, 12, 68, 62]


def test_an_image_that_loses_its_last_box_to_an_augmentation_is_kept(tmp_path):
    record = make_dataset(tmp_path)[0]
    sample = make_mapper(augmentations=[CropTransform(60, 40, 20, 20)])(record)
    assert sample["image"].shape == (3, 20, 20)
    assert len(sample["instances"]) == 0
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)


def test_crowds_are_not_trained_on(tmp_path):
    document = make_document(num_images=1)
    document["annotations"][0]["iscrowd"] = 1
    (record,) = make_dataset(tmp_path, document)
    assert len(record["annotations"]) == 2
    assert make_mapper()(record)["instances"].gt_boxes.tensor.tolist() == [[14, 11, 44, 36]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    record = make_dataset(tmp_path, num_images=1)[0]
    extension = "tif" if mode == "CMYK" else "png"
    record["file_name"] = str(tmp_path / f"picture.{extension}")
    gradient = np.tile(np.arange(96, dtype=np.uint8) * 2, (64, 1))
    picture = Image.fromarray(gradient).convert("RGB")
    picture = picture.quantize() if mode == "P" else picture.convert(mode)
    assert picture.mode == mode
    picture.save(record["file_name"])
    image = make_mapper()(record)["image"].numpy()
    assert image.shape == (3, 64, 96) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - gradient).max() <= 2


def test_bgr_has_the_channels_turned_around(tmp_path):
    record = make_dataset(tmp_path)[0]
    rgb = make_mapper()(record)["image"]
    bgr = make_mapper(image_format="BGR")(record)["image"]
    assert (rgb.flip(0) == bgr).all() and not (rgb == bgr).all()


def test_orientation_in_exif_is_applied(tmp_path):
    record = make_dataset(tmp_path, make_document(num_images=1))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    stored = np.zeros((96, 64, 3), np.uint8)
    stored[:48] = 255  # the upper half
    record["file_name"] = str(tmp_path / "rotated.png")
    Image.fromarray(stored).save(record["file_name"], exif=exif)
    image = make_mapper()(record)["image"]
    assert image.shape == (3, 64, 96)
    assert (image[:, :, 48:] == 255).all() and (image[:, :, :48] == 0).all()


@pytest.mark.parametrize("content", [b"", b"this is no picture", b"\x89PNG\r\n\x1a\n damaged"])
def test_an_unreadable_image_is_named(tmp_path, content):
    dataset = make_dataset(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"1\.png cannot be read.*skip_unreadable=true"):
        make_mapper()(dataset[0])
    with pytest.raises(UnreadableImageError) as caught:
        make_mapper(is_train=False)(dataset[0])
    assert "1.png" in str(caught.value) and "skip_unreadable" not in str(caught.value)


@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_truncated_image_is_named(tmp_path, extension, kept):
    document = make_document(num_images=1)
    document["images"][0]["file_name"] = f"1.{extension}"
    dataset = make_dataset(tmp_path, document)
    path = tmp_path / "images" / f"1.{extension}"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(UnreadableImageError, match=rf"1\.{extension}"):
        make_mapper()(dataset[0])


def test_a_missing_image_is_named(tmp_path):
    dataset = make_dataset(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"1\.png cannot be read \(FileNotFoundError"):
        make_mapper()(dataset[0])


def test_an_image_of_another_size_than_stated_is_named(tmp_path):
    dataset = make_dataset(tmp_path)
    dataset[0]["height"] = 65
    with pytest.raises(ImageSizeError, match=r"1\.png.*got \(96, 64\), expect \(96, 65\)"):
        make_mapper()(dataset[0])


def test_running_out_of_file_handles_is_not_the_images_fault(tmp_path, monkeypatch):
    def open_too_many(*args, **kwargs):
        raise OSError(errno.EMFILE, "too many open files")

    dataset = make_dataset(tmp_path)
    monkeypatch.setattr("detectron2.data.detection_utils.PathManager.open", open_too_many)
    with pytest.raises(OSError, match="too many open files") as caught:
        SkipUnreadable(make_mapper(), num_images=4)(dataset[0])
    assert not isinstance(caught.value, UnreadableImageError)


def unreadable(record):
    raise UnreadableImageError(record["file_name"])


def test_nothing_but_unreadable_images_is_an_error():
    mapper = SkipUnreadable(unreadable, num_images=2)
    assert mapper({"file_name": "a"}) is None
    assert mapper({"file_name": "a"}) is None  # counts once
    with pytest.raises(UnreadableImageError, match="none of the 2 images can be read"):
        mapper({"file_name": "b"})


def test_only_a_few_unreadable_images_are_named(caplog):
    mapper = SkipUnreadable(unreadable, num_images=100, max_named=3)
    for i in range(20):
        assert mapper({"file_name": f"{i}.png"}) is None
    messages = [r.getMessage() for r in caplog.records]
    assert [m for m in messages if ".png" in m] == [
        f"skipped unreadable image {i}.png ({i + 1} so far)" for i in range(3)
    ]
    assert messages[3:] == [f"skipped {n} unreadable images so far" for n in (4, 8, 16)]
    assert len(mapper.skipped) == 20
