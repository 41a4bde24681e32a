"""Documents, images and checkpoints as no program would write them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from coco_files import make_document
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from hypothesis import strategies as st
from picture_cases import encoded, rgb
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
def damaged_documents(draw):
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


def _set_ids(document, convert):
    for key, names in [("images", ["id"]), ("annotations", ["id", "image_id"])]:
        for entry in document[key]:
            for name in names:
                entry[name] = convert(entry[name])


def _set_categories(document, convert):
    for key, name in [("categories", "id"), ("annotations", "category_id")]:
        for entry in document[key]:
            entry[name] = convert(entry[name])


def _set_boxes(document, convert):
    for annotation in document["annotations"]:
        annotation["bbox"] = convert(*annotation["bbox"])


def _set(key, name, value):
    """Changes one or all entries of a list; a value that is called is given the entry."""

    def change(document, index):
        for entry in document[key] if index is None else [document[key][index % 3]]:
            entry[name] = value(entry) if callable(value) else copy.deepcopy(value)

    return change


def _remove(key, name):
    def change(document, index):
        for entry in document[key] if index is None else [document[key][index % 3]]:
            entry.pop(name, None)

    return change


def _all(change, *args):
    return lambda document, index: change(document, *args)


# What programs write that is not, or hardly, COCO's format: (document, index of one entry, None
# for all).
DIALECTS = [
    _set("annotations", "area", lambda a: -a["area"]),
    _set("annotations", "area", lambda a: a["area"] / 96 / 64),
    _set("annotations", "area", lambda a: str(a["area"])),
    _set("annotations", "area", 0),
    _set("annotations", "area", None),
    _remove("annotations", "area"),
    _remove("annotations", "iscrowd"),
    _remove("annotations", "id"),
    _set("annotations", "iscrowd", 1),
    _set("annotations", "iscrowd", True),
    _set("annotations", "iscrowd", "0"),
    _set("annotations", "ignore", 0),
    _set("annotations", "ignore", 1),
    _set("annotations", "segmentation", []),
    _set("annotations", "segmentation", [[]]),
    _set("annotations", "segmentation", [[4, 6, 34, 31]]),
    _set("annotations", "segmentation", [[4, 6, 34, 31], [4, 6, 34, 6, 34, 31]]),
    _set("annotations", "segmentation", [4, 6, 34, 6, 34, 31]),
    _set("annotations", "segmentation", {"size": [64, 96], "counts": [100, 44, 6000]}),
    _set("annotations", "keypoints", []),
    _set("annotations", "bbox", []),
    _set("annotations", "bbox", [0, 0, 0, 0]),
    _set("annotations", "bbox", [0, 0, 96, 64]),
    _set("annotations", "bbox", [90, 60, 30, 25]),
    _set("annotations", "bbox", lambda a: [str(v) for v in a["bbox"]]),
    _set("annotations", "bbox", lambda a: [[v] for v in a["bbox"]]),
    _set("annotations", "image_id", 99),
    _set("annotations", "category_id", 0),
    _set("annotations", "score", 0.9),
    _set("images", "file_name", lambda i: f"./{i['file_name']}"),
    _set("images", "file_name", lambda i: f".\\{i['file_name']}"),
    _set("images", "file_name", lambda i: f"..\\images\\{i['file_name']}"),
    _set("images", "file_name", lambda i: f"C:\\images\\{i['file_name']}"),
    _set("images", "file_name", lambda i: f"/data/images/{i['file_name']}"),
    _set("images", "width", 96.0),
    _set("images", "width", "96"),
    _set("images", "license", None),
    _set("categories", "name", "圆形"),
    _set("categories", "name", ""),
    _set("categories", "name", lambda c: f"{c['name']} \U0001f600 <b>%s{{0}}"),
    _set("categories", "supercategory", "none"),
    _all(_set_ids, lambda i: i - 1),
    _all(_set_ids, float),
    _all(_set_ids, str),
    _all(_set_ids, lambda i: i + 0.5),
    _all(_set_ids, lambda i: i + 2**62),
    _all(_set_ids, lambda i: -i),
    _all(_set_categories, float),
    _all(_set_categories, str),
    _all(_set_categories, lambda i: 0 if i == 3 else i),
    _all(_set_boxes, lambda x, y, w, h: [x, y, x + w, y + h]),
    _all(_set_boxes, lambda x, y, w, h: [y, x, h, w]),
    _all(_set_boxes, lambda x, y, w, h: [x / 96, y / 64, w / 96, h / 64]),
    _all(_set_boxes, lambda x, y, w, h: [-x, -y, w, h]),
    _all(lambda document: document.pop("info")),
    _all(lambda document: document.pop("annotations")),
    _all(lambda document: document.pop("categories")),
    _all(lambda document: document["annotations"].clear()),
    _all(lambda document: document.update(images=document["images"] * 2)),
    _all(lambda document: document.update(annotations=document["annotations"] * 2)),
    _all(lambda document: document["categories"].insert(0, {"id": 0, "name": "objects"})),
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"]


@st.composite
def tool_documents(draw):
    """A valid document as other programs would write it: in up to three dialects; its bytes."""
    document = make_document(num_images=3, boxes_per_image=2)
    if draw(st.booleans()):
        places_of = [[60, 30, 30, 30], [5, 5, 80, 50], [50, 4, 40, 20], [2, 40, 10, 20]]
        for annotation, box in zip(document["annotations"], places_of):
            annotation.update(bbox=box, area=box[2] * box[3])
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(DIALECTS))
        # A dialect may have nothing to change in another: ids that are texts have no half.
        with contextlib.suppress(TypeError, ValueError, KeyError, IndexError):
            change(document, draw(st.sampled_from([None, 0, 1, 2])))
    text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    return text.encode(draw(st.sampled_from(["utf-8", *ENCODINGS])))


def documents():
    """Of both kinds."""
    return st.one_of(damaged_documents(), tool_documents(), tool_documents())


def try_document(document, folder: Path) -> bool:
    """Load a document as training does; True if it is taken.

    Args:
        document: of a JSON, its text, or the bytes of its file.
        folder: has ``images``.

    Raises:
        AssertionError: what is taken is not fit for training or evaluation; what is refused is
            refused by something else than the project's own checks; or training, its other route
            (a registered name) and the checker do not agree.
    """
    path = folder / "annotations.json"
    if not isinstance(document, bytes):
        document = document if isinstance(document, str) else json.dumps(document)
        document = document.encode("utf-8", errors="surrogatepass")
    path.write_bytes(document)
    images = str(folder / "images")
    before = set(DatasetCatalog.list())
    try:
        harm = _harm(path, images)
        loaded = _load(json_file=str(path), image_root=images)
        assert (loaded is None) == bool(harm), harm
        register_coco_instances("fuzzed", {}, str(path), images)
        if loaded is not None:
            assert _load("fuzzed") == loaded
            for record in loaded:
                _check_record(record)
            _evaluate("fuzzed", loaded)
        elif harm != {"folder"}:  # of a name, the loaders say that all images are missing
            assert _load("fuzzed") is None
        return loaded is not None
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)


def _harm(path, root) -> set[str]:
    """Kinds of harm that the checker finds in a document, beside that to images."""
    try:
        report = inspect_dataset(path, root, workers=1)
    except ValueError as error:
        assert "cannot be read as JSON" in str(error)
        return {"json"}
    for finding in report.findings:
        assert finding.count >= len(finding.examples) > 0
    of_images = {"missing", "unreadable", "size"}
    return {f.kind for f in report.findings if f.severity == "harm"} - of_images


def _load(*args, **kwargs):
    """Dataset dicts as they are trained on, None where they are refused."""
    try:
        records = get_detection_dataset(*args, **kwargs)
    except Exception as error:
        assert is_user_error(error), f"{type(error).__name__}: {error}"
        assert str(error)
        return None
    # The routes agree in the boxes, not in how they are written.
    return [{**r, "annotations": [_with_corners(a) for a in r["annotations"]]} for r in records]


def _with_corners(annotation):
    corners = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    # Detectron2's route has no ids of annotations.
    rest = {k: v for k, v in annotation.items() if k != "id"}
    return {**rest, "bbox": list(map(float, corners)), "bbox_mode": BoxMode.XYXY_ABS}


def _evaluate(name, records):
    """Whether COCO's evaluation counts the objects that are trained on, and those alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(MetadataCatalog.get(name).json_file)
        objects = [a for r in records for a in r["annotations"] if not a["iscrowd"]]
        counted = [a for a in coco.anns.values() if not a["iscrowd"]]
        assert len(counted) == len(objects) > 0
        assert all(a["id"] > 0 and 0 < a["area"] < math.inf for a in counted)
        detections = [
            {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}
            for a in counted
            if a["area"] < 1e10  # COCO's own limit
        ]
        if detections:
            evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] > 0


def _check_record(record):
    try:
        sample = DetectionMapper(True, augmentations=[])(record)
    except Exception as error:
        assert is_user_error(error), repr(error)
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
