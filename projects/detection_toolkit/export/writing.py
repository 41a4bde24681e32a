"""Graphs as bytes of a file."""

from __future__ import annotations

import contextlib
import io
import warnings

import torch

from ..errors import UserError
from .description import METADATA_KEY, Description
from .graph import plain_attention
from .runtime import require

__all__ = ["INPUTS", "OUTPUTS", "to_onnx", "to_torch_export"]

INPUTS = ("images", "image_sizes")
OUTPUTS = ("boxes", "scores", "labels")
OPSET = 18  # has grid sampling, since 16


def to_onnx(program: torch.export.ExportedProgram, description: Description) -> bytes:
    """The ONNX file of a graph, weights included.

    Inputs are ``images`` and ``image_sizes``, outputs ``boxes``, ``scores`` and ``labels``, as of
    :class:`~detection_toolkit.export.DetectionGraph`; the metadata hold the description as JSON.

    Raises:
        ImportError: packages of the extra ``onnx`` are missing.
        ValueError: the file would exceed ONNX's limit of 2 GB.
    """
    onnx = require("onnx", "ONNX export")
    require("onnxscript", "ONNX export")
    with plain_attention(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter about itself
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            verbose=False,
        )
    proto = exported.model_proto
    images = proto.graph.input[0].type.tensor_type.shape.dim
    names = {images[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    del proto.graph.value_info[:]  # shapes in between, in the exporter's own letters
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    proto.producer_name = METADATA_KEY
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, description.to_json()
    if proto.ByteSize() >= 2**31:
        raise UserError(
            f"the model takes {proto.ByteSize() / 1e9:.1f} GB, and an ONNX file holds at most 2: "
            "use --format torch_export"
        )
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def to_torch_export(program: torch.export.ExportedProgram, description: Description) -> bytes:
    """The file that ``torch.export.load`` reads; its extra file holds the description as JSON."""
    buffer = io.BytesIO()
    extra = {f"{METADATA_KEY}.json": description.to_json()}
    torch.export.save(program, buffer, extra_files=extra)
    return buffer.getvalue()
