"""What is recorded of the stages is what they did, and the stage viewer shows or refuses it."""

import copy

import numpy as np
import pytest
import torch
import visualize_stages
from detectron2.config import instantiate
from detectron2.structures import Instances
from matplotlib.colors import to_hex
from PIL import Image
from small_runs import SMALL_MODEL, make_batch, make_detector
from tolerances import tolerance

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.modeling import SamplingModule
from detection_toolkit.visualization import (
    animate_stages,
    choose_queries,
    draw_followed_query,
    draw_query_stages,
    draw_stages,
    resize_trace,
    save_animation,
    trace_stages,
)

DEVICE = "train.device=cpu"
# The detector computes in float64; boxes, points and scores are then kept as float32, and scaled.
# Boxes may reach beyond the picture of 96 x 128 pixels.
PIXELS = tolerance(torch.float32, scale=256, operations=4)
SHARES = tolerance(torch.float32, scale=1, operations=4)


@pytest.fixture(scope="module")
def detector():
    return make_detector().eval()


@pytest.fixture(scope="module")
def inputs():
    (x,) = make_batch([2])
    return {**x, "height": 128, "width": 96}


@pytest.fixture(scope="module")
def traces(detector, inputs):
    return trace_stages(detector, inputs)


def test_each_stage_starts_where_the_one_before_ended(traces):
    whole = torch.tensor([0.0, 0, 96, 128]).expand(6, 4)  # pixels of the original picture
    torch.testing.assert_close(traces[0].boxes_before, whole, **PIXELS)
    for before, after in zip(traces, traces[1:]):
        torch.testing.assert_close(after.boxes_before, before.boxes, **PIXELS)


def test_the_last_trace_is_the_answer_and_no_hook_is_left(detector, inputs, traces):
    instances = detector([inputs])[0]["instances"]
    last = traces[-1].detections
    torch.testing.assert_close(last.pred_boxes.tensor, instances.pred_boxes.tensor, **PIXELS)
    scores = traces[-1].scores[last.query_index, last.pred_classes]
    torch.testing.assert_close(scores, last.scores, **SHARES)
    assert not any(module._forward_pre_hooks for module in detector.modules())
    sampling = [m for m in detector.modules() if isinstance(m, SamplingModule)]
    assert len(sampling) == len(traces) and all(m._recorded is None for m in sampling)


def test_points_are_those_that_features_are_taken_from(detector, inputs, monkeypatch):
    seen = []
    for stage in detector.decoder.stages:
        original = stage.sampling.points

        def keep(*arguments, original=original):
            seen.append(original(*arguments))
            return seen[-1]

        monkeypatch.setattr(stage.sampling, "points", keep)
    traces = trace_stages(detector, inputs)
    assert len(seen) == len(traces)
    for points, trace in zip(seen, traces):
        # Of the very same pass; 64 rows shown as 128.
        expected = points.xy[0].flatten(1, 2).float() * torch.tensor([1.0, 2.0])
        assert torch.equal(trace.points, expected)
        weights = trace.level_weights.sum(-1)
        torch.testing.assert_close(weights, torch.ones_like(weights), **SHARES)


def test_shares_are_how_much_of_the_reused_filter_is_in_the_adapted_one(detector, inputs):
    stage = detector.decoder.stages[2]
    arguments = {}
    hook = stage.mixing.register_forward_pre_hook(lambda _, x: arguments.update(queries=x[0]))
    trace = trace_stages(detector, inputs)[2]
    hook.remove()
    queries, adapter = arguments["queries"], stage.mixing.channel_adapter
    # Own filters of zeros, reused ones of ones: the adapted filter is the share itself.
    own = torch.zeros(1, 6, 2, 8, 8, dtype=torch.float64)
    adapted = adapter(queries, own, (torch.ones_like(own),))
    reused = trace.records["FilterReuse"]
    assert reused.channel_sources == (1,) and reused.spatial_source == 1
    share = adapted[0][0][0].mean((1, 2, 3)).float()
    torch.testing.assert_close(reused.channel_shares[:, 0], share, **SHARES)
    rows, points = stage.mixing.rows, 4
    own = torch.zeros(1, 6, 2, rows, points, dtype=torch.float64)
    spatial = stage.mixing.spatial_adapter(queries, own, torch.ones_like(own))
    share = spatial[0].mean((1, 2, 3)).float()
    torch.testing.assert_close(reused.spatial_shares, share, **SHARES)


def test_stages_before_reuse_have_no_sources(traces):
    for trace in traces[:2]:
        reused = trace.records["FilterReuse"]
        assert reused.channel_sources == () and reused.channel_shares is None
        assert reused.spatial_source is None and reused.spatial_shares is None


def test_queries_are_chosen_by_score_each_once(traces):
    last = traces[-1].detections
    chosen = choose_queries(traces, 3, threshold=0.0)
    assert len(set(chosen)) == 3 and chosen[0] == int(last.query_index[0])
    with pytest.raises(ValueError, match="no detection reaches the score 0.999"):
        choose_queries(traces, 3, threshold=0.999)


def test_adamixer_has_points_but_reuses_nothing():
    cfg = get_config("adamixer/adamixer_shapes_tiny.py")
    traces = trace_stages(instantiate(cfg.model).eval(), make_batch([1])[0])
    assert all(t.points is not None for t in traces)
    assert not any(t.records["FilterReuse"].channel_sources for t in traces)


class Doubled(torch.nn.Module):
    """A stage that samples anywhere but in a part named sampling, and twice."""

    def __init__(self, stage):
        super().__init__()
        self.parts = torch.nn.ModuleList([stage, copy.deepcopy(stage.sampling)])

    def forward(self, queries, maps, carry):
        stage, extra = self.parts
        extra(queries.content, queries.geometry, maps)
        return stage(queries, maps, carry)


def test_points_are_found_wherever_a_stage_samples(detector, inputs, traces):
    other = copy.deepcopy(detector)
    other.decoder.stages = torch.nn.ModuleList(Doubled(stage) for stage in other.decoder.stages)
    doubled = trace_stages(other, inputs)
    for before, after in zip(traces, doubled):
        count = before.points.shape[1]
        assert after.points.shape[1] == after.level_weights.shape[1] == 2 * count
    # Stages of another kind: the method's panel is left out, and no other part of the figure.
    assert not any(trace.records for trace in doubled)
    image = np.zeros((128, 96, 3), np.uint8)
    axes = [
        len(draw_stages(image, of_one, threshold=0.0).get_axes()) for of_one in (traces, doubled)
    ]
    assert axes[0] == axes[1] + 1


def test_only_the_followed_queries_are_labelled_and_no_label_covers_another(traces):
    """As with hundreds of queries: here everything that the stages predict is drawn."""
    crowded = [t._replace(detections=Instances.cat([t.detections] * 5)) for t in traces]
    figure = draw_stages(np.zeros((128, 96, 3), np.uint8), crowded, threshold=0.0)
    labelled = 0
    for axis in figure.get_axes()[: len(traces)]:
        extents = [text.get_window_extent() for text in axis.texts]
        assert 1 <= len(extents) <= 6 * 5
        colors = {to_hex(text.get_bbox_patch().get_facecolor()) for text in axis.texts}
        assert "#ffffff" not in colors
        labelled += len(extents)
        assert not any(
            min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)
            for i, a in enumerate(extents)
            for b in extents[:i]
        )
    assert labelled < sum(len(t.detections) for t in crowded)


def test_a_detector_without_stages_is_refused():
    with pytest.raises(ValueError, match="no cascade of stages"):
        trace_stages(torch.nn.Identity(), {})


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a b.png"
    Image.effect_noise((96, 64), 60).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), SMALL_MODEL)
    model = instantiate(cfg.model)
    for stage in model.decoder.stages:
        torch.nn.init.zeros_(stage.class_tower.out.bias)  # scores around one half
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"model": model.state_dict()}, path)
    return f"train.init_checkpoint='{path}'"


def test_a_figure_is_written_as_png_and_pdf(picture, weights, tmp_path, capsys):
    arguments = ["--input", picture, "--output", str(tmp_path / "out"), "--queries", "1"]
    assert visualize_stages.main([*arguments, "--opts", weights, DEVICE, *SMALL_MODEL]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a b_stages.pdf",
        "a b_stages.png",
    ]
    assert (tmp_path / "out" / "a b_stages.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "out" / "a b_stages.png") as drawn:
        assert drawn.width == 1584 and len(drawn.convert("RGB").getcolors(1 << 24)) > 500
    assert "a b_stages.png" in capsys.readouterr().out


def test_an_animation_is_written_beside_the_figure(picture, weights, tmp_path, capsys):
    arguments = ["--input", picture, "--output", str(tmp_path), "--animation", "--opts"]
    assert visualize_stages.main([*arguments, weights, DEVICE, *SMALL_MODEL]) == 0
    with Image.open(tmp_path / "a b_stages.webp") as animation:
        assert animation.format == "WEBP" and animation.n_frames > 3
        assert animation.info["loop"] == 0
    assert "a b_stages.webp" in capsys.readouterr().out


def test_the_boxes_of_an_animation_begin_and_end_where_the_stages_say(traces, tmp_path):
    image = np.zeros((128, 96, 3), np.uint8)
    frames = animate_stages(image, traces, threshold=0.0, num_queries=1)
    longest = max(frame.milliseconds for frame in frames)
    assert frames[-1].milliseconds == longest > frames[1].milliseconds
    assert sum(frame.milliseconds > 1000 for frame in frames) == 1 + len(traces)
    picture = frames[-1].picture
    assert picture.shape[0] > 480 and picture.shape[1] == 360  # 3.75 times as large
    (query,) = choose_queries(traces, 1, threshold=0.0)
    for frame, boxes in (
        (frames[0].picture, traces[0].boxes_before),
        (frames[-1].picture, traces[-1].boxes),
    ):
        x0, y0, x1, y1 = (boxes[query] * 3.75).round().int().tolist()
        x, y = (x0 + x1) // 2, (y0 + y1) // 2
        for column, row in ((x0, y), (x1, y), (x, y0), (x, y1)):
            if 5 < column < 355 and 5 < row < 475:
                assert frame[row - 4 : row + 5, column - 4 : column + 5].max() > 100, (column, row)
    path = save_animation(frames, tmp_path / "new" / "a.gif")
    with Image.open(path) as animation:
        assert animation.format == "GIF" and animation.n_frames > 3


def test_no_detection_and_no_picture_leave_nothing_behind(picture, weights, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no picture")
    arguments = ["--input", picture, str(tmp_path / "broken.png"), "--output"]
    arguments += [str(tmp_path / "out"), "--confidence-threshold", "1.1", "--opts"]
    assert visualize_stages.main([*arguments, weights, DEVICE, *SMALL_MODEL]) == 1
    errors = capsys.readouterr().err
    assert "a b.png: no detection reaches the score 1.1" in errors
    assert "broken.png cannot be read" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "missing.png"], "no such file: missing.png"),
        (["--config-file", "no_such_config.py", "--input", "PICTURE"], "no_such_config.py"),
        (
            ["--input", "PICTURE", "--opts", "WEIGHTS", DEVICE, "model.decoder.num_stages=3"],
            "is not of this config",
        ),
        (
            ["--input", "PICTURE", "--opts", "train.init_checkpoint=missing.pth"],
            "missing.pth does not exist",
        ),
        (
            ["--config-file", "adamixer/adamixer_shapes_tiny.py", "--input", "PICTURE"],
            "name a checkpoint",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, picture, weights, tmp_path, caplog):
    known = {"PICTURE": picture, "WEIGHTS": weights}
    with pytest.raises(SystemExit, match=message) as ended:
        visualize_stages.main(
            ["--output", str(tmp_path / "out"), *(known.get(a, a) for a in arguments)]
        )
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()
    assert not [r for r in caplog.records if "shape" in r.getMessage()]  # one for each tensor


def test_a_resized_trace_is_of_the_picture_at_another_size(traces):
    last = traces[-1]
    before = last.detections.pred_boxes.tensor.clone()
    resized = resize_trace(last, 256, 48)  # of 128 rows and 96 columns
    scale = torch.tensor([0.5, 2.0])
    assert resized.detections.image_size == (256, 48)
    torch.testing.assert_close(resized.detections.pred_boxes.tensor, before * scale.repeat(2))
    torch.testing.assert_close(resized.boxes, last.boxes * scale.repeat(2))
    torch.testing.assert_close(resized.boxes_before, last.boxes_before * scale.repeat(2))
    torch.testing.assert_close(resized.points, last.points * scale)
    assert torch.equal(last.detections.pred_boxes.tensor, before)


@pytest.mark.parametrize("with_points", [True, False])
def test_a_followed_query_is_drawn_at_every_stage(traces, with_points):
    if not with_points:
        traces = [trace._replace(points=None, level_weights=None) for trace in traces]
    image = np.full((128, 96, 3), 90, np.uint8)
    kept = image.copy()
    drawn = [
        draw_followed_query(image, traces, 2, stage=stage, threshold=0.0)
        for stage in range(len(traces))
    ]
    assert all(x.shape == image.shape and x.dtype == np.uint8 for x in drawn)
    assert all((a != b).any() for a, b in zip(drawn, drawn[1:]))
    assert (image == kept).all()
    figure = draw_query_stages(image, traces, 2)
    rows = (len(traces) if with_points else 0) + 3
    assert sum(bool(axis.get_title()) for axis in figure.get_axes()) == rows


def test_a_picture_of_odd_size_keeps_it(traces):
    for height, width in ((97, 131), (1, 50), (333, 7)):
        resized = [resize_trace(trace, height, width) for trace in traces]
        image = np.zeros((height, width, 3), np.uint8)
        assert draw_followed_query(image, resized, 0, stage=0).shape == image.shape
