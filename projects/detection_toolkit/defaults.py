"""Values that command lines show in their help, apart from the modules that they are for.

Those load PyTorch, which no help needs.
"""

from __future__ import annotations

__all__ = [
    "DEFAULT_SCORE_THRESHOLD",
    "INPUT_TYPES",
    "MAX_PIXELS",
    "RUNTIMES",
    "STEPS_OF_COSTS",
    "TILE_OVERLAP",
]

DEFAULT_SCORE_THRESHOLD = 0.3
"""Least score of a detection that is drawn."""
INPUT_TYPES = ("float32", "uint8")
"""Of the images that an exported detector takes."""
MAX_PIXELS = 178_956_970
"""Of an image: where Pillow itself refuses to go on; about 540 MB as RGB."""
RUNTIMES = ("onnxruntime", "openvino")
"""That run an exported ONNX file."""
STEPS_OF_COSTS = 10
"""Training steps whose median is the cost of one."""
TILE_OVERLAP = 0.2
"""Share of a tile's side that the next tile shows, too."""
