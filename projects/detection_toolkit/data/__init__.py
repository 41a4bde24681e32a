"""Data sets, mapper and loaders, on Detectron2's. Importing it registers the built-in data sets."""

from .build import build_test_loader, build_train_loader
from .copy_paste import CopyPaste
from .datasets import (
    check_same_classes,
    dataset_names,
    dataset_num_classes,
    get_detection_dataset,
)
from .evaluation_loader import EvaluationLoader
from .images import UnreadableImageError, read_image
from .loader_processes import LoaderProcessError, loader_process_errors
from .mapper import DetectionMapper, SkipUnreadable
from .mosaic import MixUp, Mosaic
from .multi_image import MultiImageMapper
from .registration import register_coco_json, register_data
from .shapes import SHAPES, ShapesSpec, ensure_shapes, generate_shapes, register_shapes
from .strong import (
    InRandomOrder,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
)
from .weak_strong import WeakStrongMapper

__all__ = [
    "SHAPES",
    "CopyPaste",
    "DetectionMapper",
    "EvaluationLoader",
    "InRandomOrder",
    "LoaderProcessError",
    "MixUp",
    "Mosaic",
    "MultiImageMapper",
    "RandomColorOperation",
    "RandomErasing",
    "RandomGeometricOperation",
    "ShapesSpec",
    "SkipUnreadable",
    "UnreadableImageError",
    "WeakStrongMapper",
    "build_test_loader",
    "build_train_loader",
    "check_same_classes",
    "dataset_names",
    "dataset_num_classes",
    "ensure_shapes",
    "generate_shapes",
    "get_detection_dataset",
    "loader_process_errors",
    "read_image",
    "register_coco_json",
    "register_data",
    "register_shapes",
]
