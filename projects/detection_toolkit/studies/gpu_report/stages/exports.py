"""Does an exported detector run on the device, with the same detections, and what is its AP."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate

from ....checkpoint.checkpointer import Checkpointer
from ....engine import Trainer
from ....export import (
    Description,
    ExportedDetector,
    exportable_detector,
    measure_parity,
    open_onnx,
    run_session,
    to_float16,
    to_onnx,
    trace,
)
from ...environment import ROOT
from ...timing import alternate
from ..context import Context, Row, rows_of
from .trains import run_config

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
    del program
    cfg = run_config(context, context.plan.exported, "exported")
    for precision, model in (("float32", content), ("float16", to_float16(content))):
        session, _ = open_onnx(model, providers=[provider])

        def run(images: Any, sizes: Any, session: Any = session) -> Any:
            return run_session(session, np.asarray(images), np.asarray(sizes))

        parity = measure_parity(detector, run, SIZES)
        used = session.get_providers()[0]
        image = torch.zeros(1, 3, *SIZES[1][0], dtype=torch.uint8)
        sizes = torch.tensor([SIZES[1][0]])
        once = partial(run, image, sizes)
        seconds = alternate({"": once}, device=context.device, rounds=5)[""]
        results = Trainer.test(cfg, ExportedDetector(run))
        values = {
            "detections": parity.detections,
            "without counterpart": parity.unmatched,
            "boxes (px)": parity.boxes,
            "scores": parity.scores,
            "AP": results["bbox"]["AP"],
            "ms": 1e3 * seconds,
        }
        # Rounding to float16 moves detections; what it costs is seen in AP.
        holds = (parity.holds or precision == "float16") and used == provider
        yield Row(f"ONNX, {precision}, {used}", values, holds)
    results = Trainer.test(cfg, detector.to(context.device))
    yield Row(f"PyTorch, {context.device.type}", {"AP": results["bbox"]["AP"]})
