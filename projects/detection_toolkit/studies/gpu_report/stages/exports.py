"""Does an exported detector run on the device, with the same detections."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import partial

import torch
from detectron2.config import instantiate

from ....checkpoint.checkpointer import Checkpointer
from ....export import (
    Description,
    exportable_detector,
    measure_parity,
    open_onnx,
    run_session,
    to_onnx,
    trace,
)
from ...environment import ROOT
from ...timing import alternate
from ..context import Context, Row, rows_of

__all__ = ["exports"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SIZES = (((64, 64),), ((97, 161),), ((200, 133), (171, 240)))


def exports(context: Context) -> Iterator[Row]:
    """An ONNX model, run by ONNX Runtime with the provider of the device."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield Row("ONNX", note=f"left out: {', '.join(missing)} not installed")
        return
    yield from rows_of("ONNX", partial(_onnx, context))


def _onnx(context: Context) -> Iterator[Row]:
    import onnxruntime

    provider = "CUDAExecutionProvider" if context.on_gpu else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        yield Row("ONNX", note=f"left out: this ONNX Runtime has no {provider}")
        return
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cfg = context.plan.exported.load()
    torch.manual_seed(0)
    detector = instantiate(cfg.model).eval()
    checkpoint = cfg.train.init_checkpoint
    if checkpoint:
        Checkpointer(detector, str(context.folder)).load(str(ROOT / checkpoint))
    program = trace(exportable_detector(cfg.model, detector.state_dict()))
    content = to_onnx(program, Description(None))
    session, _ = open_onnx(content, providers=[provider])

    def run(images, sizes):
        return run_session(session, images.numpy(), sizes.numpy())

    parity = measure_parity(detector, run, SIZES)
    used = session.get_providers()[0]
    image = torch.zeros(1, 3, *SIZES[1][0], dtype=torch.uint8)
    sizes = torch.tensor([SIZES[1][0]])
    seconds = alternate({"": lambda: run(image, sizes)}, device=context.device, rounds=5)[""]
    values = {
        "detections": parity.detections,
        "without counterpart": parity.unmatched,
        "boxes (px)": parity.boxes,
        "scores": parity.scores,
        "ms": 1e3 * seconds,
    }
    yield Row(f"ONNX, {used}", values, parity.holds and used == provider)
