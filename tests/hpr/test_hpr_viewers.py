"""The panels of HPR in the figure of the stages."""

from __future__ import annotations

import torch
from hpr_models import make_model
from matplotlib import pyplot
from small_runs import make_batch

from deformable_detr.heads import boxes_in_pixels
from detection_toolkit.visualization import STAGE_VIEWERS, trace_stages

VIEWERS = ("MergeWeights", "RegionalAttention")


def test_the_panels_show_weights_and_what_is_looked_at():
    detector = make_model().eval()
    (picture,) = make_batch([1])
    traces = trace_stages(detector, picture)
    for stage, trace in zip(detector.decoder.stages, traces, strict=True):
        assert set(VIEWERS) <= set(trace.records)
        weights = trace.records["MergeWeights"]
        torch.testing.assert_close(weights[1], stage.merge_refined.weights.t().float())
        looked = trace.records["RegionalAttention"]
        assert looked.shape == (7, 7)
        torch.testing.assert_close(looked.sum(), torch.ones(()))
    # Nothing is recorded later.
    look = detector.decoder.stages[0].auxiliary["regional"].look
    assert not look._forward_pre_hooks
    for name in VIEWERS:
        figure, axis = pyplot.subplots()
        STAGE_VIEWERS.get(name)().draw(axis, [trace.records[name] for trace in traces])
        figure.canvas.draw()
        pyplot.close(figure)


def test_attention_weights_are_those_of_the_cells():
    detector = make_model().eval()
    stage = detector.decoder.stages[0]
    maps = detector.extract_features(detector.preprocess_image(make_batch([1])))
    queries = detector.initial_queries(maps)
    regions = stage.roi_features(boxes_in_pixels(queries.geometry, maps.image_sizes), maps)
    look = stage.auxiliary["regional"].look
    content, regions = queries.content[0], regions[0]
    samples = look.samples(content).unflatten(-1, (look.num_samples, -1))
    _, expected = look.attention(
        samples, regions + look.key_position, regions, average_attn_weights=False
    )  # (n, H, S, cells)
    torch.testing.assert_close(look.weights(content, regions), expected.transpose(1, 2))


def test_scalar_and_fixed_weights_are_shown_too():
    for merge in ("scalar", "fixed"):
        detector = make_model(f"model.decoder.merge={merge}").eval()
        record = trace_stages(detector, make_batch([1])[0])[0].records["MergeWeights"]
        assert record.shape == (2, 3, 1)
