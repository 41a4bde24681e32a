"""Documents, images and checkpoints as no program would write them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import torch
from coco_files import make_document
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import strategies as st
from picture_cases import encoded, rgb

from detection_toolkit.checkpoint.official_files import CheckpointFileError, read_checkpoint
from detection_toolkit.data import DetectionMapper, UnreadableImageError, get_detection_dataset
from detection_toolkit.data.images import read_image
from detection_toolkit.data.inspection import inspect_dataset
from detection_toolkit.engine.errors import is_user_error

NUMBERS = st.one_of(
    st.integers(-3, 120),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0, True, False]),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["1.png", "../1.png", "/1.png", "a\0", "\ud800", ".", "1.png/", "x" * 5000]),
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Paths of all nodes of a document."""
    yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


@st.composite
def documents(draw):
    """A valid COCO-format document of three images, changed at up to four places."""
    document = make_document(num_images=3, boxes_per_image=2)
    document["annotations"][0]["segmentation"] = [[1, 2, 9, 2, 9, 9]]
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(places(document))))
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "add"]))
        if not path:
            if draw(st.integers(0, 30)) == 0:
                document = draw(VALUES)
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if action == "remove":
            del parent[path[-1]]
        elif action == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif action == "add" and isinstance(parent, dict):
            name = draw(st.sampled_from(["iscrowd", "ignore", "area", "segmentation", "keypoints"]))
            parent[name] = draw(VALUES)
        else:
            parent[path[-1]] = draw(VALUES)
    return document


def try_document(document, folder: Path) -> bool:
    """Load a document as training does; True if it is taken.

    Raises:
        AssertionError: what is taken is not fit for training, or what is refused is refused by
            something else than the project's own checks.
    """
    path = folder / "annotations.json"
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    before = set(DatasetCatalog.list())
    try:
        _inspect(path, folder / "images")
        try:
            dataset = get_detection_dataset(
                json_file=str(path), image_root=str(folder / "images"), filter_empty=False
            )
        except Exception as error:
            assert is_user_error(error), f"{type(error).__name__}: {error}"
            assert str(error)
            return False
        for record in dataset:
            _check_record(record)
        return True
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)


def _inspect(path, root):
    try:
        report = inspect_dataset(path, root, workers=1)
    except ValueError as error:
        assert "cannot be read as JSON" in str(error)
        return
    for _, finding in report.in_order():
        assert finding.count >= len(finding.examples) > 0


def _check_record(record):
    try:
        sample = DetectionMapper(True, augmentations=[])(record)
    except Exception as error:
        assert is_user_error(error), f"{type(error).__name__}: {error}"
        return
    instances = sample["instances"]
    boxes = instances.gt_boxes.tensor
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    height, width = instances.image_size
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert (instances.gt_classes >= 0).all()


_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
IMAGES = {
    f"{name}-{mode}": encoded(rgb(24, 32).convert(mode), name, **options)
    for name, mode, options in [
        ("PNG", "RGB", {}),
        ("JPEG", "RGB", {"exif": _TURNED}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("WEBP", "RGB", {}),
        ("PPM", "L", {}),
        ("PNG", "P", {"transparency": 1}),
    ]
}


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """Some bits flipped, some bytes cut off, put in, or set to zero."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        place = int(generator.integers(len(data))) if data else 0
        kind = generator.integers(5)
        if not data:
            break
        if kind <= 1:
            data[place] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            data[place] = int(generator.choice([0, 255, 127]))
        elif kind == 3:
            del data[place : place + int(generator.integers(1, 40))]
        else:
            data = data[: place + 1]
    return bytes(data)


def try_image(content: bytes, path: Path) -> bool:
    """Read an image; True if it can be. Anything but a picture or a clear refusal is a failure."""
    path.write_bytes(content)
    try:
        image = read_image(path, max_pixels=10**6)
    except UnreadableImageError as error:
        assert str(error).startswith(f"image {path} cannot be read")
        return False
    assert image.dtype == np.uint8
    assert image.ndim == 3 and image.shape[2] == 3 and image.size
    return True


def checkpoint() -> bytes:
    """A small file of torch.save."""
    file = io.BytesIO()
    torch.save({"model": {"weight": torch.arange(60.0)}, "iteration": 3, "name": "x"}, file)
    return file.getvalue()


def try_checkpoint(content: bytes, path: Path) -> bool:
    """Read a checkpoint; True if it can be."""
    path.write_bytes(content)
    try:
        read_checkpoint(path)
    except CheckpointFileError:
        return False
    return True
