"""An ONNX model whose products and convolutions compute in float16 or int8.

ONNX Runtime's own converter to float16 leads the boxes through float16 as well, where they are
rounded to half a pixel, and gives several nodes one name if most operators stay in float32.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .runtime import require

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

__all__ = ["to_float16", "to_int8"]

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_LARGEST = 65504.0


def to_float16(content: bytes) -> bytes:
    """Let products and convolutions compute in float16, and store their weights so.

    As under autocast, all else stays in float32: boxes, positions, norms, and the choice of the
    detections. A weight beyond the range of float16 becomes its largest number.

    Args:
        content: as :func:`~detection_toolkit.export.to_onnx` returns it.

    Raises:
        ImportError: packages of the extra ``onnx`` are missing.
    """
    onnx = require("onnx", "ONNX export")
    model = onnx.load_from_string(content)
    graph = model.graph
    weights = {x.name: x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT}
    uses = Counter(name for node in graph.node for name in node.input)
    halved: dict[str, str] = {}
    nodes: list[NodeProto] = []

    def half(name: str) -> str:
        """Another name, of the same values in float16."""
        if name in halved:
            return halved[name]
        halved[name] = f"{name}_float16"
        if name in weights:
            graph.initializer.append(_rounded(onnx, weights[name], halved[name]))
        else:
            nodes.append(_cast(onnx, name, halved[name], onnx.TensorProto.FLOAT16))
        return halved[name]

    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            uses[name] -= 1
            node.input[i] = half(name) if name else name
        (output,) = node.output
        node.output[0] = f"{output}_float16"
        nodes += [node, _cast(onnx, node.output[0], output, onnx.TensorProto.FLOAT)]
    kept = [x for x in graph.initializer if x.name not in weights or uses[x.name] > 0]
    for field, values in ((graph.node, nodes), (graph.initializer, kept)):
        values = list(values)
        del field[:]
        field.extend(values)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def to_int8(content: bytes, images: Iterable[np.ndarray]) -> bytes:
    """Let products with weights, and convolutions, compute in 8 bits, by ONNX Runtime's quantizer.

    Products of two activations stay in float32, as does all that :func:`to_float16` leaves so.

    Args:
        content: as :func:`~detection_toolkit.export.to_onnx` returns it.
        images: (3, H, W) of 0..255, resized as the detector's input: they tell the range of each
            activation. Some dozens do.

    Raises:
        ImportError: packages of the extra ``onnx`` are missing.
        UserError: no image.
    """
    onnx = require("onnx", "ONNX export")
    quantization = require("onnxruntime.quantization", "--precision int8")
    model = onnx.load_from_string(content)
    weights = {x.name for x in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in _PRODUCTS and n.input[1] in weights]
    kinds = {x.name: x.type.tensor_type.elem_type for x in model.graph.input}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds["images"])
    batches = [
        {"images": x[None].astype(dtype), "image_sizes": np.array([x.shape[1:]], dtype=np.int64)}
        for x in images
    ]
    if not batches:
        raise UserError("int8 needs some images, which tell the ranges of activations")

    class Batches(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return batches.pop() if batches else None

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        root = logging.getLogger()
        root.addFilter(_is_no_advice)
        try:
            quantization.quantize_static(
                model,
                path,
                Batches(),
                nodes_to_quantize=[node.name for node in products],
                op_types_to_quantize=list(_PRODUCTS),
            )
        finally:
            root.removeFilter(_is_no_advice)
        return path.read_bytes()


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Not what ONNX Runtime says of its own preparation, which an exported graph does not need."""
    return "pre-processing before quantization" not in record.getMessage()


def _cast(onnx: ModuleType, name: str, result: str, data_type: int) -> NodeProto:
    return onnx.helper.make_node("Cast", [name], [result], name=f"cast_{result}", to=data_type)


def _rounded(onnx: ModuleType, weight: TensorProto, name: str) -> TensorProto:
    values = onnx.numpy_helper.to_array(weight).clip(-_LARGEST, _LARGEST)
    return onnx.numpy_helper.from_array(values.astype(np.float16), name)
