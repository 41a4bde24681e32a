"""Data sets by catalogue name, or from a COCO-format JSON that no Python code has registered."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from ..errors import UnknownNameError, UserError
from .files import check_file_name, check_path, find_escapes
from .images import shown_name
from .shapes import ensure_shapes

__all__ = [
    "check_same_classes",
    "dataset_names",
    "dataset_num_classes",
    "get_detection_dataset",
    "missing_files",
    "register_coco_json",
]

logger = logging.getLogger(__name__)

_WITHOUT_AREA = "without area (dropped)"
_NOT_FINITE = "not finite (dropped)"
_OUTSIDE = "outside of their image (dropped)"
_CLIPPED = "reaching out of their image (clipped)"
# Whole numbers from here on are no sizes, and as ids they do not fit into 64 bits.
_BEYOND = 2**63
# Less than this many pixels outside is the rounding of a tool and not worth a word.
_TOLERANCE = 0.01


def register_coco_json(
    json_file: str,
    image_root: str | None = None,
    *,
    name: str | None = None,
    allow_outside: bool = False,
) -> str:
    """Register a COCO-format data set in Detectron2's catalogues; again is no error.

    The file is checked as a whole, and is never changed. Where boxes have to be dropped or
    clipped, or something is missing that COCO's evaluation needs ("area", "iscrowd", annotation
    ids above 0), a completed copy in a cache folder takes its place, so that training and
    evaluation agree on what the objects are; one log line counts the boxes.

    Args:
        json_file: the annotations. Without an "annotations" list it is a test set.
        image_root: folder that the JSON's ``file_name`` entries are relative to; by default the
            folder of the JSON.
        name: catalogue name; by default one made from both paths.
        allow_outside: the JSON may name images outside of the folder, by ``..``, absolute paths or
            links. By default it may not: whoever wrote it would choose the files that are read.

    Returns:
        the catalogue name.

    Raises:
        FileNotFoundError: JSON or image folder are missing, or the folder has none of the images.
        ValueError: the file is not COCO format, where the message names the entry at fault; it
            names images outside of the folder; or the name is taken by another data set.
    """
    path = Path(json_file).expanduser()
    root = path.parent if image_root is None else Path(image_root).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    if not root.is_dir():
        raise FileNotFoundError(
            f"image folder {root} of {path} does not exist: set image_root beside json_file"
        )
    source = (str(path.resolve()), str(root.resolve()))
    if name is None:
        digest = hashlib.sha1("\n".join(source).encode()).hexdigest()[:8]
        name = f"{path.stem}_{digest}"
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).get("source")
        if known != source:
            raise UserError(
                f"the data set name {name!r} is taken already"
                + (f", by {known[0]} with the images of {known[1]}" if known else "")
            )
        return name

    content = path.read_bytes()
    document = _parse(path, content)
    _check_document(path, document)
    _check_file_names(path, root, document["images"], allow_outside=allow_outside)
    _check_images(path, root, document["images"])
    repaired = _repair(document, path)
    if repaired is not None:
        digest = hashlib.sha1(content).hexdigest()[:16]
        path = _write_to_cache(f"{path.stem}-{digest}.json", json.dumps(repaired))
    categories = sorted(document["categories"], key=lambda c: c["id"])
    MetadataCatalog.get(name).set(
        thing_classes=[c["name"] for c in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        json_file=str(path),
        image_root=str(root),
        source=source,
        evaluator_type="coco",
    )
    DatasetCatalog.register(name, partial(load_coco_json, str(path), str(root), name))
    return name


def get_detection_dataset(
    names: str | Sequence[str] | None = None,
    *,
    json_file: str | None = None,
    image_root: str | None = None,
    name: str | None = None,
    allow_outside: bool = False,
    filter_empty: bool = True,
) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of registered data sets, or of a COCO-format JSON.

    Boxes without area, not finite or outside of their image are dropped and boxes that reach out
    of it clipped; one log line counts them. The order is always the same: that of ``names``, and
    within a COCO data set that of the image ids.

    Args:
        names: catalogue name or names. Not used when ``json_file`` is given.
        json_file, image_root, name: see :func:`register_coco_json`.
        allow_outside: images may lie outside of the image folder, which data sets in the catalogue
            have too (``image_root`` of their metadata).
        filter_empty: leave out images without objects (or with crowds only).

    Raises:
        FileNotFoundError: a file or folder is missing.
        KeyError: a name is not registered.
        ValueError: the JSON is not COCO format (see :func:`register_coco_json`), the data sets
            differ in their classes, images lie outside of the image folder, or no image is left.
    """
    names = _resolve(names, json_file, image_root, name, allow_outside)
    dataset_num_classes(names)
    # Boxes are checked before images are filtered: an image may lose its last one.
    dicts = []
    for dataset_name in names:
        _require_files(dataset_name)
        try:
            part = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        except AssertionError as error:
            raise UserError(f"data set {dataset_name} cannot be used: {error}") from error
        _check_paths(dataset_name, part, allow_outside=allow_outside)
        dicts.extend(_clean_dicts(part, dataset_name))
    if not filter_empty:
        return dicts
    kept = [d for d in dicts if any(not a.get("iscrowd", 0) for a in d.get("annotations", ()))]
    if not kept:
        raise UserError(
            f"{', '.join(names)}: none of the {len(dicts)} images has an object; "
            "set filter_empty=False to use them all the same"
        )
    if len(kept) < len(dicts):
        logger.info(
            "%s: %d of %d images have no object and are left out (filter_empty=True)",
            ", ".join(names),
            len(dicts) - len(kept),
            len(dicts),
        )
    return kept


def dataset_names(dataset: Mapping[str, Any], *, with_files: bool = True) -> list[str]:
    """Catalogue names that a config node ``dataloader.*.dataset`` stands for.

    Registers the JSON where one is given, and draws a built-in data set where it is missing, so
    that metadata and files are there afterwards. The metadata hold class names also where
    ``register_coco_instances`` was given none: they are read from its JSON.

    Args:
        dataset: the node.
        with_files: False if the names and metadata are wanted alone: then nothing is drawn, and
            the files of registered data sets may be missing.

    Raises:
        FileNotFoundError, KeyError, ValueError: see :func:`get_detection_dataset`.
    """
    keys = ("names", "json_file", "image_root", "name")
    allow_outside = bool(dataset.get("allow_outside", False))
    names = _resolve(*(dataset.get(key) for key in keys), allow_outside)
    for name in names:
        if with_files:
            _require_files(name)
        _read_class_names(name)
    return names


def dataset_num_classes(names: str | Sequence[str]) -> int | None:
    """Number of classes of registered data sets; None where their metadata does not say.

    Raises:
        ValueError: they differ in their classes.
    """
    names = [names] if isinstance(names, str) else list(names)
    known = {n: MetadataCatalog.get(n).get("thing_classes") for n in names}
    classes = {n: list(c) for n, c in known.items() if c is not None}
    if not classes:
        return None
    first, *others = classes
    for other in others:
        check_same_classes(classes[first], classes[other], first, other)
    return len(classes[first])


def check_same_classes(
    train_classes: Sequence[str],
    test_classes: Sequence[str],
    train_name: str = "the training set",
    test_name: str = "the test set",
) -> None:
    """Two data sets must agree in their class names and in the order of their ids.

    Raises:
        ValueError: they do not; the message names the difference.
    """
    train_classes, test_classes = list(train_classes), list(test_classes)
    if train_classes == test_classes:
        return
    details = []
    for name, ours, theirs in [
        (train_name, train_classes, test_classes),
        (test_name, test_classes, train_classes),
    ]:
        only = [c for c in ours if c not in theirs]
        if only:
            shown = ", ".join(map(repr, only[:8])) + (", ..." if len(only) > 8 else "")
            details.append(f"only {name} has {shown}")
    if not details:
        pairs = enumerate(zip(train_classes, test_classes))
        different = [f"class {i} is {a!r} there and {b!r} here" for i, (a, b) in pairs if a != b]
        numbers = f"they have {len(train_classes)} and {len(test_classes)} classes"
        details.append(different[0] if different else numbers)
    raise UserError(
        f"the classes of {train_name} and {test_name} differ: {'; '.join(details)}. "
        "Both need the same categories, in the same order of their ids"
    )


def _resolve(
    names: str | Sequence[str] | None,
    json_file: str | None,
    image_root: str | None,
    name: str | None,
    allow_outside: bool,
) -> list[str]:
    if json_file:
        return [register_coco_json(json_file, image_root, name=name, allow_outside=allow_outside)]
    if image_root:
        raise UserError(f"image_root={image_root} is given without json_file")
    if not names:
        raise UserError("a data set needs names, or json_file and image_root")
    names = [names] if isinstance(names, str) else list(names)
    registered = DatasetCatalog.list()
    for missing in (n for n in names if n not in registered):
        near = difflib.get_close_matches(str(missing), registered, n=3)
        raise UnknownNameError(
            f"no data set is registered as {missing!r}: "
            + (f"did you mean {' or '.join(near)}? Else use" if near else "use")
            + " a registered name such as coco_2017_train or shapes_train, or give json_file and "
            "image_root"
        )
    return names


def _require_files(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("shapes_spec") is not None:
        ensure_shapes(name)
    # Whoever registered them may have given a Path.
    json_file, image_root = (
        os.fspath(metadata.get(key) or "") for key in ("json_file", "image_root")
    )
    advice = (
        "put it there, or set the environment variable DETECTRON2_DATASETS to the folder that "
        "holds the data sets"
    )
    if json_file and "://" not in json_file and not Path(json_file).is_file():
        raise FileNotFoundError(
            f"annotation file {json_file} of data set {name} does not exist: {advice}"
        )
    if image_root and "://" not in image_root and not Path(image_root).is_dir():
        raise FileNotFoundError(
            f"image folder {image_root} of data set {name} does not exist: {advice}"
        )


def _read_class_names(name: str) -> None:
    """Set the names that Detectron2 would set when it loads a COCO data set."""
    metadata = MetadataCatalog.get(name)
    path = Path(metadata.get("json_file") or "")
    is_coco = metadata.get("evaluator_type") == "coco"
    if not is_coco or metadata.get("thing_classes") is not None or not path.is_file():
        return
    document = _parse(path, path.read_bytes())
    categories = document.get("categories") if isinstance(document, dict) else None
    if not isinstance(categories, list) or not categories:
        return
    _check_categories(path, categories)
    metadata.thing_classes = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are no files; URLs are taken to be there.

    Each folder is listed once: to ask for every image of COCO takes minutes on a network disk.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        if "://" in path:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or "."))
            except OSError:
                listed[folder] = set()
        # A disk may take two spellings of a name for the same, and a list of names does not.
        if name not in listed[folder] and not os.path.isfile(path):
            missing.append(path)
    return missing


def _parse(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also of the encoding
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def _check_document(path: Path, document: Any) -> None:
    """Refuse what is not COCO format; the message names the first entry at fault."""
    if not isinstance(document, dict):
        raise UserError(f"{path} is not in COCO format: its top level is not an object")
    for key in ("images", "categories"):
        if not isinstance(document.get(key), list) or not document[key]:
            raise UserError(
                f"{path} is not in COCO format: it has no list {key!r}, or an empty one"
            )
    annotations = document.get("annotations", [])
    if not isinstance(annotations, list):
        raise UserError(f"{path} is not in COCO format: 'annotations' is not a list")
    _check_entries(path, "image", document["images"], ("id", "file_name", "height", "width"))
    _check_categories(path, document["categories"])
    _check_entries(path, "annotation", annotations, ("id", "image_id", "category_id", "bbox"))

    for image in document["images"]:
        what = f"{path}: image {image['id']!r} has"
        if not isinstance(image["file_name"], str):
            raise UserError(f"{what} file_name {image['file_name']!r}, which is not a text")
        for key in ("height", "width"):
            if not is_number(image[key]) or not 1 <= image[key] < math.inf:
                raise UserError(f"{what} {key} {image[key]!r}, which is not a number of pixels")

    image_ids = {image["id"] for image in document["images"]}
    category_ids = {category["id"] for category in document["categories"]}
    for annotation in annotations:
        what = f"{path}: annotation {annotation['id']!r} has"
        for key, known, where in [
            ("category_id", category_ids, "categories"),
            ("image_id", image_ids, "images"),
        ]:
            if isinstance(annotation[key], (list, dict)) or annotation[key] not in known:
                raise UserError(f"{what} {key} {annotation[key]!r}, which is not in {where!r}")
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            raise UserError(f"{what} bbox {box!r}, which is not four numbers")
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise UserError(f"{what} iscrowd {annotation['iscrowd']!r}, which is neither 0 nor 1")
        if annotation.get("ignore", 0) not in (0, None):
            raise UserError(
                f"{what} 'ignore' set, which Detectron2 does not support: use 'iscrowd', or "
                "remove the annotation"
            )


def _check_categories(path: Path, categories: list[Any]) -> None:
    _check_entries(path, "category", categories, ("id", "name"))
    id_of: dict[str, int] = {}
    for category in categories:
        name, number = category["name"], category["id"]
        if not isinstance(name, str):
            raise UserError(f"{path}: category {number!r} has a name that is not a text")
        if not isinstance(number, int):
            raise UserError(f"{path}: category id {number!r} is not a whole number")
        if _is_no_text(name):
            raise UserError(f"{path}: category {number!r} has a name {name!a} that is no text")
        if name in id_of:
            # Results are reported by name: one of the two would be lost.
            raise UserError(
                f"{path}: the categories {id_of[name]} and {number} are both named {name!r}: "
                "rename one, or give their annotations the same category_id"
            )
        id_of[name] = number


def _check_entries(path: Path, kind: str, entries: list[Any], keys: Sequence[str]) -> None:
    for entry in entries:
        text = repr(entry)
        shown = text if len(text) <= 80 else text[:77] + "..."
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {kind} {shown} is not an object")
        for key in keys:
            if key not in entry:
                raise UserError(f"{path}: {kind} {shown} has no {key!r}")
        number = entry["id"]
        if not isinstance(number, str) and not (isinstance(number, int) and is_number(number)):
            raise UserError(f"{path}: {kind} {shown} has an id that is neither number nor text")
    if len({type(entry["id"]) for entry in entries}) > 1:
        raise UserError(f"{path}: some {kind} ids are numbers and others are texts")
    counts = Counter(entry["id"] for entry in entries)
    repeated = [i for i, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"{path}: {kind} id {repeated[0]!r} occurs more than once")


def _check_images(path: Path, root: Path, images: list[dict[str, Any]]) -> None:
    # All of them is a wrong folder. If some are missing, it is for the loaders to say.
    files = [str(root / image["file_name"]) for image in images]
    if len(missing_files(files)) == len(files):
        raise FileNotFoundError(
            f"image folder {root} does not hold the images of {path}: for example, there is no "
            f"{files[0]}. Set image_root to the folder that the file names "
            "are relative to"
        )


def _check_file_names(
    path: Path, root: Path, images: list[dict[str, Any]], *, allow_outside: bool
) -> None:
    advice = "If you trust its author, set allow_outside=true beside json_file"
    for image in images:
        wrong = check_file_name(image["file_name"], allow_outside=allow_outside)
        if wrong is None:
            continue
        what = f"{path}: image {image['id']!r} has file_name {ascii(image['file_name'])}"
        if check_file_name(image["file_name"], allow_outside=True) is not None:
            raise UserError(f"{what}, which {wrong}")
        raise UserError(f"{what}, which {wrong}, outside of the image folder. {advice}")
    if not allow_outside:
        escapes = find_escapes(root, (str(root / image["file_name"]) for image in images))
        if escapes:
            raise UserError(
                f"{path}: {len(escapes)} of its images are links to files outside of the image "
                f"folder {root}, for example {shown_name(escapes[0])}. {advice}"
            )


def _check_paths(name: str, dicts: Sequence[Mapping[str, Any]], *, allow_outside: bool) -> None:
    """What :func:`_check_file_names` is for data sets that others have put into the catalogue."""
    metadata = MetadataCatalog.get(name)
    root = metadata.get("image_root")
    if root is None or metadata.get("source") is not None:
        return  # no folder is known, or register_coco_json has looked
    root = os.fspath(root)
    paths = [d["file_name"] for d in dicts if isinstance(d.get("file_name"), str)]
    folder = f"outside of its image folder {root or '(the current one)'}"
    advice = "If you trust who wrote its annotations, set allow_outside=true beside names"
    for path in paths:
        wrong = check_path(path, root, allow_outside=allow_outside)
        if wrong is None:
            continue
        what = f"data set {name}: the image {ascii(path)} {wrong}"
        if check_path(path, root, allow_outside=True) is not None:
            raise UserError(what)
        raise UserError(f"{what}, {folder}. {advice}")
    if not allow_outside and "://" not in root:
        escapes = find_escapes(root or os.curdir, paths)
        if escapes:
            raise UserError(
                f"data set {name}: {len(escapes)} of its images are links to files {folder}, for "
                f"example {shown_name(escapes[0])}. {advice}"
            )


def is_number(value: object) -> bool:
    """Whether a value of a JSON is a number, infinite or NaN perhaps, that a float can hold."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _BEYOND


def _clip_box(
    box: Sequence[float], width: float, height: float
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """The part of an ``xyxy`` box within the image, None for nothing; and what was wrong."""
    x0, y0, x1, y1 = box
    if not (math.isfinite(x0) and math.isfinite(y0) and math.isfinite(x1) and math.isfinite(y1)):
        return None, _NOT_FINITE
    if x1 <= x0 or y1 <= y0:
        return None, _WITHOUT_AREA
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return None, _OUTSIDE
    beyond = max(inside[0] - x0, inside[1] - y0, x1 - inside[2], y1 - inside[3])
    return inside, _CLIPPED if beyond > _TOLERANCE else None


def _log_problems(problems: Counter, what: str) -> None:
    if problems:
        counts = ", ".join(f"{count} {problem}" for problem, count in sorted(problems.items()))
        logger.warning("boxes of %s: %s", what, counts)


def _repair(document: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """A copy of a checked document that COCO's evaluation can use; None where it needs none."""
    annotations = document.get("annotations")
    if annotations is None:
        return None
    sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    # pycocotools takes the annotation id 0 for "no match", and cannot use texts.
    renumber = any(not isinstance(a["id"], int) or a["id"] < 1 for a in annotations)
    changed = renumber or "info" not in document
    problems: Counter = Counter()
    repaired = []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        inside, problem = _clip_box((x, y, x + w, y + h), *sizes[annotation["image_id"]])
        if problem is not None:
            problems[problem] += 1
            changed = True
            if inside is None:
                continue
            x0, y0, x1, y1 = inside
            annotation = {**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if is_number(annotation.get("area")):
                annotation["area"] = min(annotation["area"], (x1 - x0) * (y1 - y0))
        if not is_number(annotation.get("area")) or not math.isfinite(annotation["area"]):
            annotation = {**annotation, "area": annotation["bbox"][2] * annotation["bbox"][3]}
            changed = True
        if "iscrowd" not in annotation:
            annotation = {**annotation, "iscrowd": 0}
            changed = True
        unusable = [key for key, is_usable in _FURTHER.items() if not is_usable(annotation)]
        if unusable:
            # Boxes are what counts. Detectron2 would drop an object with its mask, which the
            # evaluation would miss, and break off at other nonsense.
            annotation = {k: v for k, v in annotation.items() if k not in unusable}
            changed = True
        if renumber:
            annotation = {**annotation, "id": len(repaired) + 1}
        repaired.append(annotation)
    _log_problems(problems, str(path))
    return {"info": {}, **document, "annotations": repaired} if changed else None


def _has_usable_mask(annotation: Mapping[str, Any]) -> bool:
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if not _is_list_of_numbers(size, int) or len(size) != 2:
            return False
        if isinstance(counts, str):
            return True
        # The runs must fill the mask: whoever decodes them relies on it.
        is_list = _is_list_of_numbers(counts, int) and min(counts, default=0) >= 0
        return is_list and sum(counts) == size[0] * size[1]
    if isinstance(mask, list) and mask:
        # Not number by number: a large data set has a hundred million.
        is_list = all(isinstance(p, list) for p in mask)
        return is_list and any(len(p) >= 6 and len(p) % 2 == 0 for p in mask)
    return "segmentation" not in annotation or mask in (None, [])


def _has_usable_keypoints(annotation: Mapping[str, Any]) -> bool:
    return "keypoints" not in annotation or _is_list_of_numbers(annotation["keypoints"])


# What an annotation may have beside its box, and whether it can be loaded.
_FURTHER = {
    "segmentation": _has_usable_mask,
    "keypoints": _has_usable_keypoints,
    "ignore": lambda annotation: annotation.get("ignore", 0) == 0,
}


def _is_list_of_numbers(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and is_number(v) for v in value)


def _is_no_text(text: str) -> bool:
    """Whether a text has halves of characters, which JSON can express and no output can show."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _write_to_cache(name: str, text: str) -> Path:
    """Write a file as a whole or not at all, where several processes may do the same."""
    tried = []
    for folder in (
        Path("~/.cache/detection_toolkit/annotations").expanduser(),
        Path(tempfile.gettempdir(), "detection_toolkit-annotations"),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, suffix=".partial", delete=False, encoding="utf-8"
            ) as file:
                file.write(text)
            os.replace(file.name, folder / name)
            return folder / name
        except OSError as error:
            tried.append(f"{folder} ({error})")
    raise OSError(f"no cache folder can be written: {'; '.join(tried)}")


def _clean_dicts(dicts: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Dataset dicts whose boxes have area and lie within their image; one log line counts."""
    problems: Counter = Counter()
    cleaned = []
    for record in dicts:
        kept = []
        changed = False
        for annotation in record.get("annotations", ()):
            mode = annotation.get("bbox_mode")
            if mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
                kept.append(annotation)
                continue
            x0, y0, x1, y1 = map(float, annotation["bbox"])
            if mode == BoxMode.XYWH_ABS:
                x1, y1 = x0 + x1, y0 + y1
            inside, problem = _clip_box((x0, y0, x1, y1), record["width"], record["height"])
            if problem is not None:
                problems[problem] += 1
                changed = True
                if inside is None:
                    continue
                annotation = {**annotation, "bbox": list(inside), "bbox_mode": BoxMode.XYXY_ABS}
            kept.append(annotation)
        # A copy: the lists of a catalogue belong to whoever registered them.
        cleaned.append({**record, "annotations": kept} if changed else record)
    _log_problems(problems, name)
    return cleaned
