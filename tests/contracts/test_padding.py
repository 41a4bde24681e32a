"""How far the scores of an image move in a batch of unequal sizes, as docs/coming_from.md says."""

import pytest
import torch

from detection_toolkit.data import get_detection_dataset
from detection_toolkit.data.images import read_image
from detection_toolkit.engine import Predictor
from detection_toolkit.engine.shipped import shipped_config

IMAGES = 60


@pytest.fixture(scope="module")
def trained():
    """The shipped detector, and images of its data set as it is given them."""
    predictor = Predictor.from_config(shipped_config(), overrides=["train.device=cpu"])
    records = get_detection_dataset("shapes_val", filter_empty=False)[:IMAGES]
    return predictor.model, [
        predictor.preprocess(read_image(r["file_name"], "BGR")) for r in records
    ]


@torch.no_grad()
def scores(model, batch):
    """(query, class) -> score, of the first image."""
    found = model(batch)[0]["instances"]
    pairs = zip(found.query_index.tolist(), found.pred_classes.tolist())
    return dict(zip(pairs, found.scores.tolist()))


def changes_of_scores(model, images, extra):
    """Of detections above 0.3, beside an image so many pixels larger than the padded one."""
    changes = []
    for x in images:
        height, width = (-(-side // 32) * 32 + extra for side in x["image"].shape[-2:])
        larger = {"image": torch.zeros(3, height, width), "height": height, "width": width}
        alone, beside = scores(model, [x]), scores(model, [x, larger])
        changes += [
            abs(score - beside.get(pair, 0.0)) for pair, score in alone.items() if score > 0.3
        ]
    return torch.tensor(changes)


@pytest.mark.slow
def test_equal_padding_leaves_the_scores_and_more_of_it_moves_them(trained):
    none, little, much = (changes_of_scores(*trained, extra) for extra in (0, 32, 160))
    # The batch of two is computed in another order.
    assert none.max() < 0.01
    # Figures of the page, with room for other processors and the choice of images.
    assert 0.02 < little.mean() < 0.2 and little.median() < 0.06
    assert little.mean() < much.mean() < 0.5
