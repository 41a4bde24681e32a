"""Deformable DETR of transformers has the same weights and predicts the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

from benchmarks.transformers_peer import (  # noqa: E402
    CONFIGS,
    LIMIT,
    Sizes,
    differences,
    make_images,
    make_ours,
    make_peer,
    run_peer,
)
from tolerances import tolerance  # noqa: E402

from detection_toolkit.checkpoint.official import official_file  # noqa: E402
from detection_toolkit.checkpoint.official_files import write_official  # noqa: E402

SMALL = Sizes(channels=64, heads=4, ffn_channels=32, layers=2, queries=20)
# In float64; a few constants of transformers' position codes are of float32.
ROUNDING = tolerance(torch.float32, scale=1.0, operations=10)["atol"]
BATCHES = {
    "alone": [(96, 128)],
    "of one size": [(96, 128), (96, 128)],
    "padded": [(128, 96), (75, 90), (64, 128)],
}


def in_float64(images):
    images.tensor = images.tensor.double()
    return images


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A small detector of transformers, and ours with its weights."""
    peer = make_peer(request.param, SMALL)
    return request.param, peer.double(), make_ours(peer, request.param, SMALL).double()


@pytest.mark.parametrize("batch", BATCHES)
def test_predictions_of_small_detectors_are_the_same(batch, pair):
    _, peer, ours = pair
    logits, boxes = differences(peer, ours, in_float64(make_images(BATCHES[batch])))
    assert max(logits, boxes) < ROUNDING


def test_transformers_reads_what_is_written_here(pair, tmp_path):
    variant, peer, ours = pair
    peer.config.save_pretrained(tmp_path)
    content = official_file(ours.state_dict(), ours, source="huggingface")
    write_official(tmp_path / "model.safetensors", content)
    again = type(peer).from_pretrained(tmp_path, dtype=torch.float64).eval()
    images = in_float64(make_images(BATCHES["padded"]))
    logits, boxes = differences(again, ours, images)
    assert max(logits, boxes) < ROUNDING
    assert torch.equal(run_peer(again, images).pred_boxes, run_peer(peer, images).pred_boxes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONFIGS)
def test_predictions_at_the_released_size_are_the_same(variant):
    peer = make_peer(variant)
    ours = make_ours(peer, variant)
    for sizes in ([(224, 288), (224, 288)], [(256, 224), (200, 250)]):
        logits, boxes = differences(peer, ours, make_images(sizes))
        assert max(logits, boxes) < LIMIT
