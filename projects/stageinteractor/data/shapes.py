"""The built-in data set: geometric shapes on textured backgrounds, generated on first use.

Every image has its own random generator, seeded by (seed, index), so that the files are the same
on every machine and the work can be split over processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from tqdm import tqdm

__all__ = ["SHAPES", "ShapesSpec", "ensure_shapes", "generate_shapes", "render_image"]

# Part of the cache folder's name: raise it when the pictures of a spec change.
VERSION = 1


@dataclass(frozen=True)
class ShapesSpec:
    """What a split of the data set looks like."""

    num_images: int
    seed: int
    classes: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
    long_side: int = 160
    """Longer side of every image in pixels; the shorter is between 0.7 and 1 of it."""
    mean_objects: float = 3.0
    max_objects: int = 7
    empty_share: float = 0.04
    """Share of images without objects."""
    min_size: float = 10.0
    """Smallest diameter in pixels; the largest is half the longer side."""
    min_visible: float = 0.4
    """Objects of which less is visible are not drawn at all."""
    backgrounds: tuple[str, ...] = ("noise", "gradient", "stripes", "checks")
    palette: str = "vivid"
    """Colours of the shapes: "vivid" or "pastel"."""
    contrast: float = 60.0
    """Least distance of a shape's colour to the mean background under it, in grey levels."""
    blur: float = 0.8
    """Largest standard deviation of the blur in pixels."""
    noise: float = 10.0
    """Largest standard deviation of the pixel noise in grey levels."""


_TRAIN = ShapesSpec(num_images=6000, seed=1)
_SHIFTED = replace(
    _TRAIN,
    num_images=1500,
    seed=3,
    classes=(*_TRAIN.classes, "hexagon"),
    backgrounds=("clutter", "clouds"),
    palette="pastel",
    contrast=35.0,
    noise=18.0,
)
SHAPES: dict[str, ShapesSpec] = {
    "shapes_train": _TRAIN,
    "shapes_val": replace(_TRAIN, num_images=300, seed=2),
    "shapes_shifted_train": _SHIFTED,
    "shapes_shifted_val": replace(_SHIFTED, num_images=200, seed=4),
}


def _outline(name: str, radius: float) -> np.ndarray:
    """Corners (n, 2) of a shape around the origin."""

    def polygon(n: int, scale: float = 1.0) -> np.ndarray:
        angle = np.arange(n) / n * 2 * math.pi
        return np.stack([np.cos(angle), np.sin(angle)], 1) * radius * scale

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
        a = radius / math.hypot(1, 1 / 3)
        b = a / 3
        corners = [(b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b)]
        corners += [(-x, -y) for x, y in corners]
        return np.array(corners)
    raise ValueError(f"no shape is called {name!r}")


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    coarse = rng.uniform(-1, 1, (max(2, height // cell), max(2, width // cell), 3))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _background(spec: ShapesSpec, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float image of 0..255."""
    kind = spec.backgrounds[rng.integers(len(spec.backgrounds))]
    low, high = rng.uniform(30, 225, (2, 3))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "gradient":
        t = (along - along.min()) / (np.ptp(along) + 1e-6)
        return low + (high - low) * t[..., None]
    if kind == "stripes":
        t = (np.sin(along / rng.uniform(2, 8)) > 0).astype(float)
        return low + (high - low) * 0.35 * t[..., None]
    if kind == "checks":
        cell = rng.integers(6, 24)
        t = ((x // cell + y // cell) % 2).astype(float)
        return low + (high - low) * 0.35 * t[..., None]
    if kind == "noise":
        return low + 40 * _smooth_noise(rng, height, width, int(rng.integers(2, 12)))
    if kind == "clouds":
        clouds = sum(
            _smooth_noise(rng, height, width, cell) * weight
            for cell, weight in ((48, 60), (20, 35), (8, 20), (3, 12))
        )
        return rng.uniform(90, 170, 3) + clouds
    if kind == "clutter":
        image = np.clip(low + 30 * _smooth_noise(rng, height, width, 16), 0, 255)
        for _ in range(int(rng.integers(10, 30))):
            color = rng.uniform(40, 215, 3).tolist()
            start = rng.integers(0, (width, height))
            end = start + rng.integers(-40, 41, 2)
            cv2.line(
                image, start.tolist(), end.tolist(), color, int(rng.integers(1, 5)), cv2.LINE_AA
            )
        return cv2.GaussianBlur(image, (0, 0), 1.0)
    raise ValueError(f"no background is called {kind!r}")


def _color(spec: ShapesSpec, rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour of the palette that stands out from the mean colour under the shape."""
    best, best_distance = under, -1.0
    for _ in range(20):
        hue = rng.integers(0, 180)
        if spec.palette == "vivid":
            saturation, value = rng.integers(130, 256), rng.integers(110, 256)
        elif spec.palette == "pastel":
            saturation, value = rng.integers(20, 110), rng.integers(90, 256)
        else:
            raise ValueError(f"no palette is called {spec.palette!r}")
        hsv = np.array([[[hue, saturation, value]]], dtype=np.uint8)
        color = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)
        distance = float(np.linalg.norm(color - under))
        if distance >= spec.contrast:
            return color
        if distance > best_distance:
            best, best_distance = color, distance
    return best


def render_image(spec: ShapesSpec, index: int) -> tuple[np.ndarray, list[tuple[int, list[float]]]]:
    """Draw one image.

    Returns:
        (H, W, 3) uint8 BGR image, and (class index, [x, y, width, height] in pixels) of every
        object, full extents clipped to the image.
    """
    rng = np.random.default_rng((spec.seed, index))
    sides = [spec.long_side, int(round(spec.long_side * rng.uniform(0.7, 1.0)))]
    rng.shuffle(sides)
    height, width = sides
    image = _background(spec, rng, height, width)
    count = 0
    if rng.uniform() >= spec.empty_share:
        count = int(np.clip(rng.poisson(spec.mean_objects - 1) + 1, 1, spec.max_objects))

    shift = 4  # OpenCV's fixed-point coordinates: 1/16 pixel
    candidates = []
    for _ in range(count):
        label = int(rng.integers(len(spec.classes)))
        size = math.exp(rng.uniform(math.log(spec.min_size), math.log(spec.long_side / 2)))
        outline = _outline(spec.classes[label], size / 2)
        angle = rng.uniform(0, 2 * math.pi)
        rotation = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        center = rng.uniform(0.2 * size, (width - 0.2 * size, height - 0.2 * size))
        points = outline @ rotation + center
        mask = np.zeros((height, width), np.uint8)
        corners = np.round(points * 2**shift).astype(np.int32)
        cv2.fillPoly(mask, [corners], 255, cv2.LINE_AA, shift)
        if spec.classes[label] == "ring":
            hole = np.round((points - center) * 0.55 * 2**shift + center * 2**shift)
            cv2.fillPoly(mask, [hole.astype(np.int32)], 0, cv2.LINE_AA, shift)
        # The pixel (i, j) covers [i, i + 1) x [j, j + 1): OpenCV draws at pixel centres.
        low = np.clip(points.min(0) + 0.5, 0, (width, height))
        high = np.clip(points.max(0) + 0.5, 0, (width, height))
        full_area = np.count_nonzero(mask > 127)
        if full_area == 0 or (high - low).min() < spec.min_size / 2:
            continue
        candidates.append((label, [*low, *(high - low)], mask, full_area))

    # From the topmost down: what is hidden too much by those above it is left out.
    covered = np.zeros((height, width), bool)
    kept = []
    for label, box, mask, full_area in reversed(candidates):
        visible = np.count_nonzero((mask > 127) & ~covered)
        if visible < spec.min_visible * full_area:
            continue
        covered |= mask > 127
        kept.append((label, box, mask))
    objects = []
    for label, box, mask in reversed(kept):
        alpha = mask[..., None] / 255.0
        under = image[mask > 127].mean(0)
        color = _color(spec, rng, under)
        shade = 1 + 0.12 * _smooth_noise(rng, height, width, 24)[..., :1]
        image = image * (1 - alpha) + np.clip(color * shade, 0, 255) * alpha
        objects.append((label, [round(float(v), 2) for v in box]))

    blur = rng.uniform(0, spec.blur)
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    image = image + rng.normal(0, rng.uniform(0, spec.noise), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), objects


def _write_image(spec: ShapesSpec, folder: str, index: int) -> dict:
    image, objects = render_image(spec, index)
    extension = "png" if index % 10 == 0 else "jpg"
    name = f"{index:06d}.{extension}"
    path = str(Path(folder, name))
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if extension == "jpg" else []
    if not cv2.imwrite(path, image, options):
        raise OSError(f"cannot write {path}")
    return {"file_name": name, "height": image.shape[0], "width": image.shape[1], "objects": objects}


def generate_shapes(
    spec: ShapesSpec, folder: str | os.PathLike, *, workers: int | None = None, title: str = "shapes"
) -> None:
    """Write the images and ``annotations.json`` (COCO format) of a split.

    Args:
        spec: what to draw.
        folder: where to; it appears when all is written, so an interrupted or simultaneous call
            never leaves half a data set.
        workers: threads; default: one a core.
        title: what the progress bar says.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partly = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (partly / "images").mkdir()
        write = partial(_write_image, spec, str(partly / "images"))
        # Threads suffice, as OpenCV and NumPy release the lock, and work in any caller, also in a
        # notebook or a loader process.
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            written = pool.map(write, range(spec.num_images))
            progress = tqdm(written, f"drawing {title}", spec.num_images, unit="image")
            records = list(progress)
        annotations = []
        for image_id, record in enumerate(records, start=1):
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
        document = {
            "info": {"description": f"{title}: geometric shapes, made by stageinteractor"},
            "images": [
                {"id": i, **{k: r[k] for k in ("file_name", "height", "width")}}
                for i, r in enumerate(records, start=1)
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in enumerate(spec.classes, start=1)],
        }
        (partly / "annotations.json").write_text(json.dumps(document))
        try:
            partly.replace(folder)
        except OSError:
            if not (folder / "annotations.json").is_file():
                raise
            # Another process was faster: its files are the same.
    finally:
        shutil.rmtree(partly, ignore_errors=True)


def cache_folder() -> Path:
    """Where generated data sets live: ``$DETECTRON2_DATASETS/stageinteractor_shapes`` if that
    variable is set, else ``~/.cache/stageinteractor/shapes``."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if root:
        base = Path(root, "stageinteractor_shapes")
    else:
        base = Path("~/.cache/stageinteractor/shapes").expanduser()
    return base / f"v{VERSION}"


def ensure_shapes(name: str) -> Path:
    """Generate the split unless the cache has it; returns its folder."""
    folder = cache_folder() / name
    if not (folder / "annotations.json").is_file():
        generate_shapes(SHAPES[name], folder, title=name)
    return folder


def _load(name: str) -> list[dict]:
    folder = ensure_shapes(name)
    return load_coco_json(str(folder / "annotations.json"), str(folder / "images"), name)


def register_shapes() -> None:
    """Put the built-in data sets into Detectron2's catalogues; nothing is generated yet."""
    for name, spec in SHAPES.items():
        if name in DatasetCatalog.list():
            continue
        folder = cache_folder() / name
        DatasetCatalog.register(name, partial(_load, name))
        MetadataCatalog.get(name).set(
            thing_classes=list(spec.classes),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(spec.classes))},
            json_file=str(folder / "annotations.json"),
            image_root=str(folder / "images"),
            evaluator_type="coco",
        )


def main() -> None:
    """Command line: ``python -m stageinteractor.data.shapes``."""
    parser = argparse.ArgumentParser(description="Generate the built-in shapes data sets.")
    parser.add_argument("names", nargs="*", default=list(SHAPES), help="splits; default: all")
    parser.add_argument("--output", type=Path, help="folder; default: the cache")
    parser.add_argument("--num-images", type=int, help="images a split instead of the usual number")
    args = parser.parse_args()
    for name in args.names:
        if name not in SHAPES:
            parser.error(f"no split is called {name!r}; there are {', '.join(SHAPES)}")
        spec = SHAPES[name]
        if args.num_images is not None:
            spec = replace(spec, num_images=args.num_images)
        folder = (args.output or cache_folder()) / name
        if not (folder / "annotations.json").is_file():
            generate_shapes(spec, folder, title=name)
        print(folder)


if __name__ == "__main__":
    main()
