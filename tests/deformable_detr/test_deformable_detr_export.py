"""Exported as ONNX and as a program, every variant agrees with itself at sizes never traced."""

from __future__ import annotations

import pytest
import torch
from deformable_detr_models import VARIANTS, make_model, small_config

from detection_toolkit.commands.export import PARITY_SIZES
from detection_toolkit.export import exportable_detector, measure_parity
from detection_toolkit.export.description import Description
from detection_toolkit.export.graph import trace
from detection_toolkit.export.runtime import open_onnx, run_session
from detection_toolkit.export.writing import to_onnx, to_torch_export

SIZES = [*PARITY_SIZES, [(75, 66)], [(131, 203), (90, 203), (131, 77)]]
# One cell of the coarsest map, which torch.export sets apart from more.
SMALL = [[(75, 43)], [(33, 70), (64, 41)]]


# Each takes half a minute. What all detectors have in common is exported in make test, too, by
# tests/detection_toolkit/export.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def detector(variant):
    """Its scores are around one half, so that all detections are compared."""
    detector = make_model(variant)
    with torch.no_grad():
        for stage in detector.decoder.stages:
            stage.head.classes.bias.zero_()
    return detector.eval()


@pytest.fixture(scope="module")
def program(detector, variant):
    return trace(exportable_detector(small_config(variant), detector.state_dict()))


def description():
    return Description.from_test_augmentations([], class_names=list("abcdef"), image_format="RGB")


def test_the_program_agrees(detector, program, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(to_torch_export(program, description()))
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images, sizes):
        return module(images.float(), sizes)

    parity = measure_parity(detector, run, SIZES)
    assert parity.holds, parity
    assert parity.detections > 20 * len(SIZES)
    with pytest.raises(AssertionError, match="images.size"):
        run(torch.zeros(1, 3, 75, 43), torch.tensor([[75, 43]]))


def test_onnx_agrees(detector, program):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    session, _ = open_onnx(to_onnx(program, description()), threads=1)
    assert [i.shape for i in session.get_inputs()] == [
        ["batch", 3, "height", "width"],
        ["batch", 2],
    ]

    def run(images, sizes):
        return run_session(session, images.float().numpy(), sizes.numpy())

    parity = measure_parity(detector, run, [*SIZES, *SMALL])
    assert parity.holds, parity
    assert parity.detections > 20 * len([*SIZES, *SMALL])
