"""A run of every variant, and all that looks at it: evaluation by stage, report, viewers, page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import report
import torch
import visualize_assignment
import visualize_stages
from deformable_detr_models import VARIANTS, make_model, small_run
from detectron2.config import LazyConfig
from PIL import Image
from small_runs import make_batch
from tolerances import tolerance
from torchvision.ops import box_convert

from deformable_detr import DeformableAttention
from detection_toolkit.engine import Trainer
from detection_toolkit.engine.inspection import build_inspected_detector
from detection_toolkit.modeling import PointSampler
from detection_toolkit.visualization import draw_query_stages, draw_stages, trace_stages
from detection_toolkit.web import ExampleImages, StageViewer
from maps import make_maps

# Boxes and the shares of maps that are no padding are float32; boxes may reach beyond a picture of
# 192 x 256 pixels.
PIXELS = tolerance(torch.float32, scale=512, operations=10)


@pytest.mark.parametrize("kind", ["point", "box"])
def test_points_lie_where_the_offsets_of_the_paper_lead(kind):
    """Also for an image that is padded, and for two sets of queries that look at each image."""
    torch.manual_seed(0)
    heads, points, channels = 2, 3, 8
    attention = DeformableAttention(channels, num_heads=heads, num_levels=2, num_points=points)
    attention.double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    levels = [torch.randn(2, channels, *size, dtype=torch.float64) for size in ((4, 6), (2, 3))]
    maps = make_maps(levels, (8, 16), [(32, 48), (16, 32)])
    queries = torch.randn(4, 5, channels, dtype=torch.float64)
    references = torch.rand(4, 5, 2 if kind == "point" else 4, dtype=torch.float64)
    ratios = maps.valid_ratios.repeat_interleave(2, 0)[:, None].double()
    on_levels = references[:, :, None] * ratios.repeat(1, 1, 1, references.shape[-1] // 2)
    with attention.recording() as calls:
        attention(queries, on_levels, maps)
    attention(queries, on_levels, maps)
    (call,) = calls  # of the time in between
    offsets = attention.sampling_offsets(queries).view(4, 5, heads, 2, points, 2)
    weights = attention.attention_weights(queries).view(4, 5, heads, 2 * points).softmax(-1)
    torch.testing.assert_close(call.shares, weights)
    sizes = torch.tensor([[48.0, 32], [48, 32], [32, 16], [32, 16]], dtype=torch.float64)
    assert call.level_weights.shape == (4, 5, heads, 2 * points, 2)
    for i in range(2):
        own = slice(i * points, (i + 1) * points)
        assert (call.level_weights[..., own, i] == 1).all()
        if kind == "point":
            step = float((8, 16)[i])  # pixels of a cell, as no part of it is padding
        else:
            step = (references[..., 2:] * sizes[:, None] / points / 2)[:, :, None, None]
        center = (references[..., :2] * sizes[:, None])[:, :, None, None]
        expected = center + offsets[:, :, :, i] * step
        torch.testing.assert_close(call.xy[..., own, :], expected, **PIXELS)
    assert (call.level_weights.sum(-1) == 1).all()
    boxes = torch.cat([references[..., :2], references[..., 2:]], -1)
    if kind == "point":
        boxes = torch.cat([boxes, torch.zeros_like(boxes)], -1)
    boxes = box_convert(boxes, "cxcywh", "xyxy") * sizes.repeat(1, 2)[:, None]
    torch.testing.assert_close(call.boxes, boxes, **PIXELS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_traces_have_the_points_of_every_stage_by_level_and_head(variant):
    detector = make_model(variant).double().eval()
    (inputs,) = make_batch([2], height=64, width=96)
    inputs.update(height=128, width=192)
    traces = trace_stages(detector, inputs)
    heads, levels, points = 4, 4, 4
    scale = torch.tensor([2.0, 2.0, 2.0, 2.0])
    maps = detector.extract_features(detector.preprocess_image([inputs]))
    initial = detector.initial_queries(maps)
    reference = torch.nn.functional.pad(initial.geometry[0], (0, 4 - initial.geometry.shape[-1]))
    sizes = torch.tensor([96.0, 64, 96, 64], dtype=torch.float64)
    first = (box_convert(reference.detach(), "cxcywh", "xyxy") * sizes).float() * scale
    torch.testing.assert_close(traces[0].boxes_before, first, **PIXELS)
    # Without refinement all stages look around the same points.
    second = first if variant == "plain" else traces[0].boxes
    torch.testing.assert_close(traces[1].boxes_before, second, **PIXELS)
    for trace in traces:
        assert trace.points.shape == (6, heads * levels * points, 2)
        assert trace.groups.tolist() == [h for h in range(heads) for _ in range(levels * points)]
        level = trace.level_weights.argmax(-1)
        assert (level.view(6, heads, levels, points) == torch.arange(levels)[:, None]).all()
        of_head = trace.shares.view(6, heads, -1).sum(-1)
        torch.testing.assert_close(of_head, torch.ones_like(of_head))
    assert not any(m.is_recording for m in detector.modules() if isinstance(m, PointSampler))

    image = np.zeros((128, 192, 3), np.uint8)
    for figure in (
        draw_stages(image, traces, threshold=0.0, num_queries=1, strides=detector.strides),
        draw_query_stages(image, traces, 3, strides=detector.strides),
    ):
        (legend,) = [x for part in figure.subfigs for x in part.legends]
        assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "3", "4"]
        rows = [a for a in figure.get_axes() if a.get_title().startswith("points of stage")]
        assert len(rows) == 2
        for axis, trace in zip(rows, traces):
            # One collection a head, whose areas are in proportion to the shares.
            assert len(axis.collections) == heads
            query = 3 if figure.get_axes()[0] is rows[0] else None
            for head, drawn in enumerate(axis.collections):
                assert len(drawn.get_offsets()) == levels * points
                if query is not None:
                    shares = trace.shares[query, trace.groups == head].numpy()
                    areas = drawn.get_sizes()
                    np.testing.assert_allclose(areas / areas.sum(), shares / shares.sum(), 1e-5)


# Two-stage has all that the others have; points and traces of all of them are tested above.
OTHERS = [pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS if x != "two_stage"]


@pytest.fixture(scope="module", params=["two_stage", *OTHERS])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def run(variant, tmp_path_factory):
    """Folder of a run of two steps that is evaluated by stage, and its data's first picture."""
    folder = tmp_path_factory.mktemp(variant)
    config = small_run(
        folder, variant, "train.max_iter=2", "train.stage_evaluation=true", num_images=4
    )
    torch.manual_seed(0)
    trainer = Trainer(config)
    with torch.no_grad():
        for stage in trainer.checkpointer.model.decoder.stages:
            stage.head.classes.bias.zero_()  # scores around one half
    trainer.train()
    LazyConfig.save(config, str(folder / "output" / "config.yaml"))
    return folder / "output", folder / "data"


def test_it_is_evaluated_by_stage_and_reported(run):
    output, _ = run
    (path,) = output.glob("inference/*/stage_metrics.json")
    metrics = json.loads(path.read_text())
    assert [x["stage"] for x in metrics["stages"]] == [1, 2]
    assert all(x["AP"] is not None and x["detections"] > 0 for x in metrics["stages"])
    assert {"own_match", "cross_stage"} == set(metrics["label_changes"])
    assert report.main([str(output)]) == 0
    page = (output / "report.html").read_text()
    for heading in ("Summary", "Stages", "Scores", "Worst images"):
        assert f"<h2>{heading}</h2>" in page


def picture_of(run):
    return sorted((run[1] / "images").glob("*.png"))[0]


def weights(run):
    output, _ = run
    return [
        *("--config-file", str(output / "config.yaml"), "--opts"),
        *(f"train.init_checkpoint='{output / 'model_final.pth'}'", "train.device=cpu"),
    ]


def test_its_stages_are_drawn(run, tmp_path, capsys):
    arguments = ["--input", str(picture_of(run)), "--output", str(tmp_path), "--queries", "2"]
    assert visualize_stages.main([*arguments, *weights(run)]) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("*_stages.png")
    with Image.open(path) as drawn:
        assert drawn.width == 1584 and len(drawn.convert("RGB").getcolors(1 << 24)) > 500


def test_its_assignment_is_drawn(run, tmp_path):
    arguments = ["--images", "1", "--output", str(tmp_path)]
    assert visualize_assignment.main([*arguments, *weights(run)]) == 0
    (path,) = tmp_path.glob("*_assignment.json")
    document = json.loads(path.read_text())
    own = [d for d in document["decisions"] if d["own_object"] >= 0 and d["change"] != "added"]
    document = json.loads((run[1] / "annotations.json").read_text())
    objects = [a for a in document["annotations"] if a["image_id"] == 1 and not a.get("iscrowd")]
    assert len(own) == 2 * len(objects) > 0


def test_it_is_shown_on_the_page(run):
    pytest.importorskip("gradio")
    from detection_toolkit.data import SHAPES
    from detection_toolkit.web.page import Page

    config, overrides = weights(run)[1], weights(run)[3:]
    viewer = StageViewer(build_inspected_detector(config, overrides))
    page = Page(viewer, ExampleImages(SHAPES["shapes_val"], (8,)), max_upload=2**20)
    page.build("title", "subtitle")
    update = page.open_first(0.3)
    assert update[page.stage]["value"] == viewer.num_stages == 2
    viewed = viewer.view(ExampleImages(SHAPES["shapes_val"], (8,)).image(0), "000008.png")
    query = viewer.name_queries(viewed, 0.3)[0][1]
    plain, followed = (viewer.draw(viewed, 1, 0.3, q) for q in (None, query))
    assert plain.shape == followed.shape and (plain != followed).any()
    assert viewer.draw_stages_of(viewed, query).shape[2] == 3
    assert "each head has its marker" in page._explain(viewed, 1, query)
