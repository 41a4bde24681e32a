"""The reasons of label decisions add up to the cross-stage matcher's targets."""

import json
import os
import re

import numpy as np
import pytest
import torch
import visualize_assignment
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_runs import SMALL_MODEL

from detection_toolkit.structures import Assignment, GroundTruth
from detection_toolkit.training import StagewiseMatcher
from detection_toolkit.visualization import (
    distinct_names,
    draw_assignment,
    explain_labels,
    figure_stems,
)
from stageinteractor import CrossStageMatcher


@given(st.integers(0, 2**31 - 1))
def test_decisions_are_the_difference_between_both_matchers(seed):
    generator = torch.Generator().manual_seed(seed)
    stages, queries, objects, classes = 4, 6, 3, 3

    def draw(*shape):
        corner = torch.rand(*shape, 2, generator=generator) * 6
        return torch.cat([corner, corner + 6 + torch.rand(*shape, 2, generator=generator) * 4], -1)

    labels = torch.randint(classes, (objects,), generator=generator)
    truth = GroundTruth.collate([draw(objects)], [labels], [(20, 20)])
    index = torch.stack([torch.randperm(queries, generator=generator) for _ in range(stages)])
    assignment = Assignment(torch.where(index < objects, index, -1)[:, None])
    boxes = draw(stages, 1, queries)
    matcher = CrossStageMatcher(0.4)
    decisions = explain_labels(assignment, boxes, truth, matcher)

    own = StagewiseMatcher()(assignment, boxes, truth, num_classes=classes).multi_hot[:, 0]
    target = matcher(assignment, boxes, truth, num_classes=classes).multi_hot[:, 0]
    for change, expected in (
        ("added", (target > 0) & (own == 0)),
        ("removed", (target == 0) & (own > 0)),
        ("kept", (target > 0) & (own > 0)),
    ):
        places = [(d.stage, d.query, d.label) for d in decisions if d.change == change]
        assert sorted(places) == [tuple(x) for x in expected.nonzero().tolist()]
    for d in decisions:
        assert bool(d.sources) == (d.change != "removed")
        assert all(s.iou >= 0.4 and s.stage >= d.stage - 1 for s in d.sources)
        assert all(int(labels[s.object_index]) == d.label for s in d.sources)


def test_an_own_match_is_always_kept():
    truth = GroundTruth.collate([torch.tensor([square(0)])], [torch.tensor([2])], [(10, 40)])
    assignment = Assignment(torch.tensor([[[0, -1]], [[-1, 0]]]))
    boxes = torch.tensor([[[square(8), square(1)]], [[square(8), square(0)]]])
    decisions = explain_labels(assignment, boxes, truth, StagewiseMatcher())
    assert [(d.stage, d.query, d.change) for d in decisions] == [(0, 0, "kept"), (1, 1, "kept")]
    assert [[s.stage for s in d.sources] for d in decisions] == [[0], [1]]


def square(x):
    return [float(x), 0.0, x + 10.0, 10.0]


def test_a_label_comes_from_the_next_stage_and_goes_where_the_box_is_off():
    truth = GroundTruth.collate([torch.tensor([square(0)])], [torch.tensor([2])], [(10, 40)])
    assignment = Assignment(torch.tensor([[[0, -1]], [[-1, 0]]]))
    boxes = torch.tensor([[[square(8), square(1)]], [[square(8), square(0)]]])
    removed, added, kept = explain_labels(assignment, boxes, truth, CrossStageMatcher())
    assert (removed.change, removed.stage, removed.query) == ("removed", 0, 0)
    assert removed.own_iou == pytest.approx(2 / 18)
    assert (added.change, added.stage, added.query, added.own_object) == ("added", 0, 1, -1)
    assert [(s.stage, s.object_index) for s in added.sources] == [(1, 0)]
    assert added.sources[0].iou == pytest.approx(9 / 11)
    assert (kept.change, kept.stage, kept.query) == ("kept", 1, 1)


def test_in_a_crowd_the_queries_of_the_table_are_labelled_and_no_label_covers_another():
    generator = torch.Generator().manual_seed(0)
    stages, queries, objects = 3, 40, 30
    corner = torch.rand(objects, 2, generator=generator) * 120
    truth_boxes = torch.cat([corner, corner + 25], 1)
    truth = GroundTruth.collate([truth_boxes], [torch.zeros(objects).long()], [(150, 150)])
    index = torch.stack([torch.randperm(queries, generator=generator) for _ in range(stages)])
    assignment = Assignment(torch.where(index < objects, index, -1)[:, None])
    boxes = truth_boxes[torch.randint(objects, (stages, 1, queries), generator=generator)]
    matcher = CrossStageMatcher()
    decisions = explain_labels(assignment, boxes, truth, matcher)
    figure = draw_assignment(
        np.zeros((150, 150, 3), np.uint8),
        boxes[:, 0],
        assignment,
        truth,
        decisions,
        assigner=matcher,
        max_rows=8,
    )
    *pictures, table = figure.get_axes()
    in_table = {label.get_text() for label in table.get_yticklabels()}
    assert len(in_table) == 8
    for axis in pictures:
        extents = [text.get_window_extent() for text in axis.texts]
        assert not any(
            min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)
            for i, a in enumerate(extents)
            for b in extents[:i]
        )
        named = {q for text in axis.texts for q in re.findall(r"q\d+", text.get_text())}
        assert named <= in_table
    assert sum(len(axis.texts) for axis in pictures) > 20


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    from coco_files import make_document, write_dataset
    from detectron2.config import instantiate
    from small_runs import data_overrides

    from detection_toolkit.config import apply_overrides, get_config

    folder = tmp_path_factory.mktemp("assignment")
    document = make_document(num_images=3)
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 3]
    opts = [*SMALL_MODEL, *data_overrides(*write_dataset(folder / "data", document))]
    opts += ["train.device=cpu", "model.num_classes=3"]
    cfg = apply_overrides(get_config("stageinteractor/shapes_tiny.py"), opts)
    torch.save({"model": instantiate(cfg.model).state_dict()}, folder / "model.pth")
    return ["--opts", f"train.init_checkpoint='{folder / 'model.pth'}'", *opts[:-1]]


def test_figure_and_table_of_one_image(arguments, tmp_path):
    out = tmp_path / "out"
    assert visualize_assignment.main(["--images", "2.png", "--output", str(out), *arguments]) == 0
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".pdf", ".png"]
    with Image.open(out / "2_assignment.png") as drawn:
        assert drawn.width == 1584 and len(drawn.convert("RGB").getcolors(1 << 24)) > 500
    document = json.loads((out / "2_assignment.json").read_text())
    own = [d for d in document["decisions"] if d["own_object"] >= 0 and d["change"] != "added"]
    assert len(own) == 3 * 2  # stages x objects
    assert document["image_id"] == 2


@pytest.mark.parametrize(
    "own, configured, expected",
    [
        ("{_target_:stageinteractor.CrossStageMatcher,iou_threshold:0.7}", None, 0.7),
        ("{_target_:detection_toolkit.training.StagewiseMatcher}", None, 0.5),
        ("{_target_:detection_toolkit.training.StagewiseMatcher}", "[]", None),
    ],
)
def test_the_models_own_label_assigner_is_drawn_or_one_to_compare(
    own, configured, expected, arguments, tmp_path
):
    opts = [*arguments, f"model.criterion.label_assigner={own}"]
    if configured is not None:
        opts.append(f"dataloader.stage_evaluator.label_assigners={configured}")
    assert visualize_assignment.main(["--images", "2", "--output", str(tmp_path), *opts]) == 0
    document = json.loads((tmp_path / "2_assignment.json").read_text())
    assert document["iou_threshold"] == expected


@pytest.mark.parametrize(
    "image, message", [("17", "image 17 is not in the training set"), ("3", "has no objects")]
)
def test_bad_images_are_one_line(image, message, arguments, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=message) as ended:
        visualize_assignment.main(["--images", image, "--output", str(out), *arguments])
    assert "\n" not in str(ended.value) and not out.exists()


def test_pictures_of_one_name_get_a_figure_each(tmp_path):
    stems = figure_stems(["a/1.jpg", "b/1.jpg", "c/2.jpg"], tmp_path, "assignment")
    assert [stem.name for stem in stems] == ["1_assignment", "1_2_assignment", "2_assignment"]


@given(st.lists(st.sampled_from(["a", "A", "a_2", "a.png", "a.PNG", "b.v2", "b"]), max_size=12))
def test_distinct_names_are_distinct_whatever_the_case(names):
    distinct = distinct_names(names)
    assert len({name.lower() for name in distinct}) == len(names) == len(distinct)
    assert [os.path.splitext(x)[1] for x in distinct] == [os.path.splitext(x)[1] for x in names]
    assert distinct[:1] == names[:1]
