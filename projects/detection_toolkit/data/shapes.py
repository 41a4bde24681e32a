"""The built-in data set: geometric shapes on textured backgrounds, generated on first use.

Every image has its own random generator, seeded by (seed of the split, index of the image), so
that pictures and boxes are the same however the work is shared out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..errors import UnknownNameError, UserError
from .documents import KEPT_KEYS

__all__ = [
    "SHAPES",
    "ShapesSpec",
    "cache_folder",
    "ensure_shapes",
    "generate_shapes",
    "register_shapes",
    "render_image",
]

logger = logging.getLogger(__name__)

# Part of the cache folder's name: raise it when the drawing changes, so that no cache is stale.
VERSION = 1
ANNOTATIONS = "annotations.json"
IMAGES = "images"
_FIXED_POINT_BITS = 4  # OpenCV's drawing functions then take sixteenths of a pixel

OUTLINES = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "arrow")
BACKGROUNDS = ("noise", "gradient", "stripes", "checks", "clouds", "clutter")
# Saturation and value (OpenCV's 0..255) between which a palette's colours lie.
PALETTES: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "vivid": ((130, 256), (110, 256)),
    "pastel": ((20, 110), (90, 256)),
}


@dataclass(frozen=True)
class ShapesSpec:
    """What a split of the data set looks like; lengths in pixels.

    Raises:
        ValueError: a value that cannot be drawn.
    """

    num_images: int
    seed: int
    classes: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
    long_side: int = 160
    """Longer side of every image."""
    min_aspect: float = 0.7
    """The shorter side is between this and 1 of the longer one."""
    mean_objects: float = 3.0
    """Mean number of objects drawn in an image that is not empty."""
    max_objects: int = 7
    empty_share: float = 0.04
    """Share of images without objects."""
    min_size: float = 10.0
    """Longer side of the smallest object's box, before the image's border cuts it."""
    max_size: float = 80.0
    """The same of the largest object."""
    min_visible: float = 0.4
    """Objects of which less is visible are not drawn at all."""
    backgrounds: tuple[str, ...] = ("noise", "gradient", "stripes", "checks")
    palette: str = "vivid"
    contrast: float = 60.0
    """Distance that a shape's colour keeps from the mean colour under it, where the palette has
    such a colour; in grey levels."""
    blur: float = 0.8
    """Largest standard deviation of the blur."""
    noise: float = 10.0
    """Largest standard deviation of the pixel noise in grey levels."""

    def __post_init__(self) -> None:
        def refuse(field: str, allowed: object) -> None:
            raise UserError(f"ShapesSpec.{field}={getattr(self, field)!r}: must be {allowed}")

        if self.num_images < 1:
            refuse("num_images", "at least 1")
        if not self.classes or not set(self.classes) <= set(OUTLINES):
            refuse("classes", f"of {OUTLINES}")
        if len(set(self.classes)) < len(self.classes):
            refuse("classes", "names that do not repeat")
        if not self.backgrounds or not set(self.backgrounds) <= set(BACKGROUNDS):
            refuse("backgrounds", f"of {BACKGROUNDS}")
        if self.palette not in PALETTES:
            refuse("palette", f"one of {tuple(PALETTES)}")
        if self.long_side < 16:
            refuse("long_side", "at least 16")
        if not 0 < self.min_aspect <= 1:
            refuse("min_aspect", "above 0, at most 1")
        if not 4 <= self.min_size <= self.max_size:
            refuse("min_size", "at least 4 and at most max_size")
        if self.max_size > self.long_side:
            refuse("max_size", f"at most long_side={self.long_side}")
        if not 1 <= self.mean_objects <= self.max_objects:
            refuse("mean_objects", f"between 1 and max_objects={self.max_objects}")
        for field in ("empty_share", "min_visible"):
            if not 0 <= getattr(self, field) <= 1:
                refuse(field, "between 0 and 1")


_TRAIN = ShapesSpec(num_images=6000, seed=1)
# Other looks, and one class more; the others keep their ids.
_SHIFTED = replace(
    _TRAIN,
    num_images=1500,
    seed=3,
    classes=(*_TRAIN.classes, "arrow"),
    backgrounds=("clutter", "clouds"),
    palette="pastel",
    contrast=35.0,
    noise=18.0,
)
# Three times the objects, smaller and overlapping more, on every background, with less contrast.
_HARD = replace(
    _TRAIN,
    num_images=2000,
    seed=5,
    mean_objects=9.0,
    max_objects=18,
    min_size=8.0,
    max_size=64.0,
    min_visible=0.3,
    empty_share=0.02,
    backgrounds=BACKGROUNDS,
    contrast=45.0,
    noise=14.0,
)
SHAPES: Mapping[str, ShapesSpec] = {
    "shapes_train": _TRAIN,
    "shapes_val": replace(_TRAIN, num_images=300, seed=2),
    "shapes_shifted_train": _SHIFTED,
    "shapes_shifted_val": replace(_SHIFTED, num_images=200, seed=4),
    "shapes_hard_train": _HARD,
    "shapes_hard_val": replace(_HARD, num_images=300, seed=6),
}


def _outline(name: str) -> np.ndarray:
    """Corners (n, 2) of a shape around the origin."""

    def polygon(n: int) -> np.ndarray:
        angle = np.arange(n) / n * 2 * math.pi
        return np.stack([np.cos(angle), np.sin(angle)], 1)

    if name in ("circle", "ring"):
        return polygon(64)
    if name == "square":
        return polygon(4)
    if name == "triangle":
        return polygon(3)
    if name == "hexagon":
        return polygon(6)
    if name == "star":
        points = polygon(10)
        points[1::2] *= 0.45
        return points
    if name == "cross":
        corners = [(1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1)]
        corners += [(-x, -y) for x, y in corners]
        return np.array(corners, dtype=float)
    if name == "arrow":
        corners = [(3, 0), (0, 3), (0, 1), (-3, 1), (-3, -1), (0, -1), (0, -3)]
        return np.array(corners, dtype=float)
    raise UserError(f"no shape is called {name!r}; there are {', '.join(OUTLINES)}")


def _smooth_noise(
    rng: np.random.Generator, height: int, width: int, cell: int, channels: int = 3
) -> np.ndarray:
    """(H, W, channels) float32 in about -1..1, correlated over ``cell`` pixels."""
    shape = (max(2, height // cell), max(2, width // cell), channels)
    coarse = rng.random(shape, dtype=np.float32) * 2 - 1
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return smooth.reshape(height, width, channels)


def _background(spec: ShapesSpec, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32 of about 0..255."""
    kind = spec.backgrounds[rng.integers(len(spec.backgrounds))]
    low, high = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if kind in ("gradient", "stripes"):
        angle = rng.uniform(0, 2 * math.pi)
        along = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
        if kind == "gradient":
            mix = (along - along.min()) / np.ptp(along)
        else:
            mix = 0.35 * (np.sin(along / np.float32(rng.uniform(2, 8))) > 0)
        return low + (high - low) * mix[..., None].astype(np.float32)
    if kind == "checks":
        cell = int(rng.integers(6, 24))
        mix = 0.35 * ((x // cell + y // cell) % 2)
        return low + (high - low) * mix[..., None].astype(np.float32)
    if kind == "noise":
        return low + 40 * _smooth_noise(rng, height, width, int(rng.integers(2, 12)))
    if kind == "clouds":
        image = np.full((height, width, 3), rng.uniform(90, 170, 3), np.float32)
        for cell, weight in ((48, 60), (20, 35), (8, 20), (3, 12)):
            image += weight * _smooth_noise(rng, height, width, cell)
        return image
    if kind == "clutter":
        image = np.clip(low + 30 * _smooth_noise(rng, height, width, 16), 0, 255)
        for _ in range(int(rng.integers(10, 30))):
            color = rng.uniform(40, 215, 3).tolist()
            start = rng.integers(0, (width, height))
            end = start + rng.integers(-40, 41, 2)
            thickness = int(rng.integers(1, 5))
            # Antialiased lines need 8-bit images; the blur below smooths these.
            cv2.line(image, start.tolist(), end.tolist(), color, thickness)
        return cv2.GaussianBlur(image, (0, 0), 1.0)
    raise UserError(f"no background is called {kind!r}; there are {', '.join(BACKGROUNDS)}")


def _color(spec: ShapesSpec, rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour (3,) of the palette that stands out from the mean colour under the shape."""
    saturation, value = PALETTES[spec.palette]
    hsv = np.stack([rng.integers(*r, size=20) for r in ((0, 180), saturation, value)], -1)
    colors = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2BGR)[0].astype(np.float32)
    distances = np.linalg.norm(colors - under, axis=1)
    enough = np.flatnonzero(distances >= spec.contrast)
    return colors[enough[0] if len(enough) else distances.argmax()]


def _fill(mask: np.ndarray, points: np.ndarray, value: int) -> None:
    """Antialiased polygon; a point's whole numbers are pixel borders, as a box's."""
    # For OpenCV they are pixel centres.
    corners = np.round((points - 0.5) * 2**_FIXED_POINT_BITS).astype(np.int32)
    cv2.fillPoly(mask, [corners], value, cv2.LINE_AA, _FIXED_POINT_BITS)


def _place(
    spec: ShapesSpec, rng: np.random.Generator, height: int, width: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(class index, box xyxy (4,), mask (H, W) uint8) of the objects, the topmost last."""
    if rng.uniform() < spec.empty_share:
        return []
    count = min(1 + int(rng.poisson(spec.mean_objects - 1)), spec.max_objects)
    candidates = []
    for _ in range(count):
        label = int(rng.integers(len(spec.classes)))
        # Log-uniform: as many objects between 10 and 20 pixels as between 20 and 40.
        size = math.exp(rng.uniform(math.log(spec.min_size), math.log(spec.max_size)))
        angle = rng.uniform(0, 2 * math.pi)
        center = rng.uniform(0.2 * size, (width - 0.2 * size, height - 0.2 * size))
        cos, sin = math.cos(angle), math.sin(angle)
        points = _outline(spec.classes[label]) @ np.array([[cos, sin], [-sin, cos]])
        points -= (points.min(0) + points.max(0)) / 2
        points *= size / np.ptp(points, axis=0).max()
        mask = np.zeros((height, width), np.uint8)
        _fill(mask, points + center, 255)
        if spec.classes[label] == "ring":
            _fill(mask, points * 0.55 + center, 0)
        low = np.clip(points.min(0) + center, 0, (width, height))
        high = np.clip(points.max(0) + center, 0, (width, height))
        if (high - low).min() >= spec.min_size / 2:
            candidates.append((label, np.concatenate([low, high]), mask))

    # From the topmost down: what is hidden too much by those above it is left out.
    covered = np.zeros((height, width), bool)
    kept = []
    for label, box, mask in reversed(candidates):
        inside = mask > 127
        visible = np.count_nonzero(inside & ~covered)
        if visible == 0 or visible < spec.min_visible * np.count_nonzero(inside):
            continue
        covered |= inside
        kept.append((label, box, mask))
    return kept[::-1]


def render_image(spec: ShapesSpec, index: int) -> tuple[np.ndarray, list[tuple[int, list[float]]]]:
    """Draw one image.

    Args:
        spec: what to draw.
        index: which of its images.

    Returns:
        (H, W, 3) uint8 BGR image, and (class index, [x, y, width, height] in pixels) of every
        object: its full extent, also where another object hides it, clipped to the image.
    """
    rng = np.random.default_rng((spec.seed, index))
    sides = [spec.long_side, round(spec.long_side * rng.uniform(spec.min_aspect, 1.0))]
    height, width = sides[::-1] if rng.uniform() < 0.6 else sides
    # Boxes first, so that nothing about the pixels' arithmetic can change them.
    objects = _place(spec, rng, height, width)
    image = _background(spec, rng, height, width)
    for _, box, mask in objects:
        x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
        x1, y1 = np.ceil(box[2:]).astype(int) + 1
        part, alpha = image[y0:y1, x0:x1], mask[y0:y1, x0:x1, None]
        color = _color(spec, rng, part[alpha[..., 0] > 127].mean(0))
        shade = 1 + 0.12 * _smooth_noise(rng, *part.shape[:2], cell=24, channels=1)
        part += (np.clip(color * shade, 0, 255) - part) * (alpha.astype(np.float32) / 255)

    blur = rng.uniform(0, spec.blur)
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    strength = np.float32(rng.uniform(0, spec.noise))
    image = image + strength * rng.standard_normal(image.shape, dtype=np.float32)
    annotations = [
        (label, [round(float(v), 2) for v in (*box[:2], *(box[2:] - box[:2]))])
        for label, box, _ in objects
    ]
    return np.clip(np.round(image), 0, 255).astype(np.uint8), annotations


def _write_image(spec: ShapesSpec, folder: Path, index: int) -> dict:
    image, objects = render_image(spec, index)
    extension, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92]
    if index % 10 == 0:
        extension, options = ".png", []
    name = f"{index:06d}{extension}"
    # OpenCV itself cannot write to every path that Python can.
    done, encoded = cv2.imencode(extension, image, options)
    if not done:
        raise OSError(f"OpenCV cannot encode {folder / name}")
    (folder / name).write_bytes(encoded.tobytes())
    height, width = image.shape[:2]
    return {"file_name": name, "height": height, "width": width, "objects": objects}


def _coco_document(spec: ShapesSpec, records: list[dict], title: str) -> dict:
    images, annotations = [], []
    for image_id, record in enumerate(records, start=1):
        images.append({"id": image_id, **{k: v for k, v in record.items() if k != "objects"}})
        for label, box in record["objects"]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": f"{title}, drawn by detection_toolkit", "spec": asdict(spec)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in enumerate(spec.classes, start=1)],
    }


def generate_shapes(
    spec: ShapesSpec,
    folder: str | os.PathLike,
    *,
    workers: int | None = None,
    title: str = "shapes",
) -> None:
    """Write ``images/`` and ``annotations.json`` (COCO format) of a split, unless they are there.

    The folder appears when all is written, and simultaneous calls wait for the first one: none
    ever sees half a data set.

    Args:
        spec: what to draw.
        folder: where to.
        workers: threads; default: one a core.
        title: what progress bar and log call it.

    Raises:
        FileExistsError: the folder holds something else, or a split of another spec.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if _is_complete(spec, folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(folder)):
        if _is_complete(spec, folder):
            return
        prefix = f".{folder.name}."
        for leftover in folder.parent.glob(f"{prefix}*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
        partial_folder = Path(tempfile.mkdtemp(".partial", prefix, folder.parent))
        try:
            _generate(spec, partial_folder, workers or os.cpu_count() or 1, title)
            # As any new folder, where mkdtemp's is for its owner only.
            partial_folder.chmod((partial_folder / IMAGES).stat().st_mode)
            partial_folder.replace(folder)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    # Whoever still waits holds the file open; taking its name away does no harm then.
    with contextlib.suppress(OSError):
        Path(f"{folder}.lock").unlink()


def _is_complete(spec: ShapesSpec, folder: Path) -> bool:
    annotations = folder / ANNOTATIONS
    if annotations.is_file():
        with open(annotations, encoding="utf-8") as file:
            found = json.load(file).get("info", {}).get("spec")
        if found != json.loads(json.dumps(asdict(spec))):
            raise FileExistsError(f"{folder} holds a split of another kind: remove it first")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no generated data set: remove it first")
    return False


def _generate(spec: ShapesSpec, folder: Path, workers: int, title: str) -> None:
    start = time.perf_counter()
    (folder / IMAGES).mkdir()
    write = partial(_write_image, spec, folder / IMAGES)
    # Threads and not processes: OpenCV and NumPy release the lock for most of the work, and no
    # process has to import PyTorch first.
    with ThreadPoolExecutor(workers) as pool:
        written = pool.map(write, range(spec.num_images))
        shown = sys.stderr is not None and sys.stderr.isatty()
        bar = tqdm(written, f"drawing {title}", spec.num_images, unit=" images", disable=not shown)
        records = list(bar)
    text = json.dumps(_coco_document(spec, records, title))
    (folder / ANNOTATIONS).write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - start
    logger.info("Drew the %d images of %s in %.1f s", spec.num_images, title, seconds)


def cache_folder() -> Path:
    """Where generated data sets live: ``$DETECTRON2_DATASETS/detection_toolkit_shapes`` if that
    variable is set, else ``~/.cache/detection_toolkit/shapes``; one sub-folder a version."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if root:
        base = Path(root).expanduser() / "detection_toolkit_shapes"
    else:
        base = Path("~/.cache/detection_toolkit/shapes").expanduser()
    return base / f"v{VERSION}"


def register_shapes(name: str, spec: ShapesSpec) -> None:
    """Put a split into Detectron2's catalogues. It is drawn when it is first asked for.

    As with Detectron2's own data sets, the environment says at registration where files live.

    Args:
        name: catalogue name.
        spec: what it looks like.

    Raises:
        ValueError: the name is taken by another data set.
    """
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("shapes_spec") == spec:
            return
        raise UserError(f"the data set name {name!r} is taken already")
    # A changed spec must not meet the files of the former one.
    digest = hashlib.sha1(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_folder() / f"{name}-{digest}"
    MetadataCatalog.get(name).set(
        thing_classes=list(spec.classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(spec.classes))},
        json_file=str(folder / ANNOTATIONS),
        image_root=str(folder / IMAGES),
        evaluator_type="coco",
        shapes_spec=spec,
    )
    DatasetCatalog.register(name, partial(_load, name))


def ensure_shapes(name: str) -> Path:
    """Draw a registered split unless its files are there; returns the folder.

    Raises:
        KeyError: no such split is registered.
    """
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
    spec = metadata.get("shapes_spec") if metadata else None
    if spec is None:
        known = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("shapes_spec")]
        raise UnknownNameError(
            f"no generated data set is called {name!r}; there are {', '.join(known)}"
        )
    folder = Path(metadata.json_file).parent
    # The cache's name has the spec's digest, so that a look at it is enough.
    if not (folder / ANNOTATIONS).is_file():
        generate_shapes(spec, folder, title=name)
    return folder


def _load(name: str) -> list[dict]:
    folder = ensure_shapes(name)
    return load_coco_json(str(folder / ANNOTATIONS), str(folder / IMAGES), name, KEPT_KEYS)


for _name, _spec in SHAPES.items():
    register_shapes(_name, _spec)
