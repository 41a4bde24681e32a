"""Detectors as one file that runs without this project: ONNX, or an exported PyTorch program.

The optional packages (``pip install onnx onnxruntime onnxscript``) are imported where they are
used.
"""

from .description import Description
from .graph import DetectionGraph, exportable_detector, trace
from .parity import Parity, compare_detections, measure_parity
from .predictor import ExportedDetector, OnnxPredictor
from .reduced import to_float16, to_int8
from .runtime import open_onnx, open_runtime, provider_names, run_session
from .writing import to_onnx, to_torch_export

__all__ = [
    "Description",
    "DetectionGraph",
    "ExportedDetector",
    "OnnxPredictor",
    "Parity",
    "compare_detections",
    "exportable_detector",
    "measure_parity",
    "open_onnx",
    "open_runtime",
    "provider_names",
    "run_session",
    "to_float16",
    "to_int8",
    "to_onnx",
    "to_torch_export",
    "trace",
]
