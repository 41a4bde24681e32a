"""What the page shows: right, shared by nobody, and a message for every file that is no picture."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from PIL import Image
from pycocotools.coco import COCO
from tolerances import tolerance
from torchvision.ops import box_convert, box_iou

from detection_toolkit.data import SHAPES
from detection_toolkit.data.shapes import render_image
from detection_toolkit.engine.inspection import build_inspected_detector
from detection_toolkit.engine.shipped import shipped_config
from detection_toolkit.web import ExampleImages, PictureRefused, StageViewer
from detection_toolkit.web.viewing import coco_results, list_detections

# Two passes of the shipped detector in float32, some hundred roundings each: boxes within 320
# pixels; a score's slope is at most a quarter of a logit.
PIXELS = tolerance(torch.float32, scale=320, operations=100)
SCORES = tolerance(torch.float32, scale=4, operations=100)


@pytest.fixture(scope="module")
def viewer():
    return StageViewer(build_inspected_detector(shipped_config(), ["train.device=cpu"]))


@pytest.fixture(scope="module")
def image():
    """(240, 320, 3) BGR, four objects."""
    small = render_image(SHAPES["shapes_val"], 8)[0]
    return cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def viewed(viewer, image):
    return viewer.view(image, "000000000139.jpg")


def test_the_last_stage_is_the_answer_in_pixels_of_the_original_picture(viewer, image, viewed):
    answer = viewer.predictor(image)["instances"]
    answer = answer[answer.scores >= 0.3]
    found = viewed.detections(-1, 0.3)
    assert len(found) >= 4
    torch.testing.assert_close(found.pred_boxes.tensor, answer.pred_boxes.tensor, **PIXELS)
    torch.testing.assert_close(found.scores, answer.scores, **SCORES)
    rows = list_detections(viewer, found)
    names = viewer.metadata.thing_classes
    for row, box, label in zip(rows, answer.pred_boxes.tensor.tolist(), answer.pred_classes):
        assert row.label == names[label]
        corners = (row.x, row.y, row.x + row.width, row.y + row.height)
        assert corners == pytest.approx(box, rel=0, abs=PIXELS["atol"])


def test_one_forward_pass_serves_all_drawings_which_change_nothing(viewer, image, monkeypatch):
    passes = []
    original = viewer.predictor.model.inference_stages

    def count(inputs):
        passes.append(inputs)
        return original(inputs)

    monkeypatch.setattr(viewer.predictor.model, "inference_stages", count)
    viewed = viewer.view(image, "a.png")
    before = [trace.boxes.clone() for trace in viewed.traces]
    detections = viewed.detections(-1, 0.0).pred_boxes.tensor.clone()
    query = int(viewed.detections(-1, 0.3).query_index[0])
    pictures = [viewer.draw(viewed, stage, 0.3) for stage in range(viewer.num_stages)]
    followed = [viewer.draw(viewed, stage, 0.3, query) for stage in range(viewer.num_stages)]
    assert len(passes) == 1
    different = [pictures[0], pictures[-1], followed[0], followed[-1]]
    for a, b in zip(different, different[1:]):
        assert a.shape == b.shape == viewed.image.shape
        assert (a != b).any()
    assert (viewer.draw(viewed, -1, 0.3) != viewer.draw(viewed, -1, 0.95)).any()
    for trace, boxes in zip(viewed.traces, before):
        assert torch.equal(trace.boxes, boxes)
    assert torch.equal(viewed.detections(-1, 0.0).pred_boxes.tensor, detections)


def test_boxes_are_drawn_where_the_objects_are(viewer, viewed):
    drawn = viewer.draw(viewed, viewer.num_stages - 1, 0.3)
    scale = drawn.shape[1] / viewed.original_size[1]
    changed = (drawn != viewed.image).any(-1)
    for x0, y0, x1, y1 in (viewed.detections(-1, 0.3).pred_boxes.tensor * scale).tolist():
        # The left edge, a pixel or two wide; the label is below.
        left = int(np.clip(round(x0), 2, drawn.shape[1] - 3))
        edge = changed[int(y0) + 4 : int(y1) - 4, left - 2 : left + 3].any(1)
        assert edge.mean() > 0.9
        middle = changed[round((y0 + y1) / 2) - 2 :, round((x0 + x1) / 2)][:4]
        assert not middle.all()


def test_the_figure_of_a_query_has_all_its_stages(viewer, viewed):
    best, other = viewed.detections(-1, 0.3).query_index[:2].tolist()
    figure = viewer.draw_stages_of(viewed, best)
    assert figure.dtype == np.uint8 and figure.shape[1] > 1000
    assert (figure != viewer.draw_stages_of(viewed, other)).any()


def test_results_are_cocos(viewer, viewed):
    found = viewed.detections(-1, 0.3)
    results = coco_results(viewer, found, viewed.name)
    coco = COCO()
    names = viewer.metadata.thing_classes
    coco.dataset = {
        "images": [{"id": 139, "width": 320, "height": 240}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    coco.createIndex()
    loaded = coco.loadRes(results)
    rows = list_detections(viewer, found)
    assert len(loaded.anns) == len(rows)
    for annotation, row in zip(loaded.dataset["annotations"], rows):
        assert coco.cats[annotation["category_id"]]["name"] == row.label
        assert annotation["bbox"] == pytest.approx([row.x, row.y, row.width, row.height])
        assert annotation["score"] == row.score
    assert coco_results(viewer, found, "street.jpg")[0]["image_id"] == 1
    assert coco_results(viewer, viewed.detections(-1, 1.1), "street.jpg") == []


def test_classes_without_names_and_ids_are_numbers(viewer, viewed, monkeypatch):
    monkeypatch.setattr(viewer.predictor, "metadata", Metadata())
    found = viewed.detections(-1, 0.3)
    labels = found.pred_classes.tolist()
    assert [row.label for row in list_detections(viewer, found)] == [str(x) for x in labels]
    assert [x["category_id"] for x in coco_results(viewer, found, viewed.name)] == labels
    assert viewer.draw(viewed, 0, 0.3).shape == viewed.image.shape


def test_a_click_finds_the_query_of_the_smallest_box_around_it(viewer, viewed):
    found = viewed.shown_traces[-1].detections
    found = found[found.scores >= 0.3]
    areas = found.pred_boxes.area()
    for i, (x0, y0, x1, y1) in enumerate(found.pred_boxes.tensor.tolist()):
        query = viewed.query_at((x0 + x1) / 2, (y0 + y1) / 2, stage=-1, threshold=0.3)
        (j,) = (found.query_index == query).nonzero()[:1, 0].tolist()
        assert areas[j] <= areas[i]
    assert viewed.query_at(-5, -5, stage=-1, threshold=0.3) is None
    assert viewed.query_at(10, 10, stage=-1, threshold=1.1) is None


def test_queries_are_named_and_the_followed_one_stays(viewer, viewed):
    found = viewed.detections(-1, 0.3)
    names = viewer.name_queries(viewed, 0.3)
    assert [q for _, q in names] == list(dict.fromkeys(found.query_index.tolist()))
    label = viewer.class_name(int(found.pred_classes[0]))
    assert names[0][0] == f"{names[0][1]}: {label} {float(found.scores[0]):.2f}"
    assert viewer.name_queries(viewed, 1.1) == []
    followed = names[0][1]
    assert [q for _, q in viewer.name_queries(viewed, 1.1, followed)] == [followed]


def test_simultaneous_users_get_their_own_pictures(viewer):
    images = [render_image(SHAPES["shapes_val"], index)[0] for index in range(2, 6)]
    alone = [viewer.view(image, "x.png") for image in images]
    together = [None] * len(images)

    def view(index):
        together[index] = viewer.view(images[index], "x.png")

    threads = [threading.Thread(target=view, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, together):
        for a, b in zip(expected.traces, got.traces):
            torch.testing.assert_close(a.points, b.points, **PIXELS)
            torch.testing.assert_close(a.boxes, b.boxes, **PIXELS)


def _text(path):
    path.write_text("just a text\n")


def _nothing(path):
    path.touch()


def _cut(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def _large(path):
    Image.new("L", (1100, 1000)).save(path)


def _floating_point(path):
    Image.fromarray(np.zeros((20, 20), np.float32)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("notes.txt", _text, "is not a picture that can be read. JPEG, PNG"),
        ("text.png", _text, "is not a picture that can be read. JPEG, PNG"),
        ("nothing.jpg", _nothing, "is not a picture that can be read"),
        ("cut.png", _cut, "is damaged: it cannot be decoded"),
        ("large.png", _large, "has too many pixels: at most 1 million can be used"),
        ("float.tiff", _floating_point, "cannot be used: its values (mode F,"),
    ],
)
def test_bad_files_are_refused_with_a_reason_and_no_path(
    viewer, image, tmp_path, name, write, reason
):
    path = tmp_path / name
    write(path)
    limited = StageViewer(viewer.predictor, max_pixels=1_000_000)
    with pytest.raises(PictureRefused) as caught:
        limited.view_file(path)
    assert str(caught.value).startswith(f"{name} {reason}")
    assert str(tmp_path) not in str(caught.value)
    assert len(limited.view(image, "good.png").detections(-1, 0.3)) >= 4  # and it goes on


@pytest.mark.parametrize("size", [(1, 1), (3, 3000), (3000, 3), (1, 20000)])
def test_thin_pictures_are_shown_or_refused(viewer, size):
    try:
        viewed = viewer.view(np.full((*size, 3), 90, np.uint8), "thin.png")
    except PictureRefused as error:
        assert str(error) == f"thin.png of {size[1]}x{size[0]} pixels is too thin for the detector"
        return
    assert viewed.original_size == size
    assert max(viewed.image.shape) == (1280 if max(size) > 1280 else 800)
    assert viewer.draw(viewed, 0, 0.0).shape == viewed.image.shape
    assert viewer.draw(viewed, 0, 0.0, 0).shape == viewed.image.shape


@pytest.mark.parametrize("size", [(240, 320), (300, 20), (2, 9000), (9000, 1)])
def test_the_detector_computes_on_so_many_pixels_at_most(viewer, monkeypatch, size):
    seen = []
    original = viewer.predictor.model.inference_stages

    def note(inputs):
        seen.extend(inputs)
        return original(inputs)

    monkeypatch.setattr(viewer.predictor.model, "inference_stages", note)
    limited = StageViewer(viewer.predictor, max_input_pixels=5000)
    viewed = limited.view(np.full((*size, 3), 90, np.uint8), "large.png")
    (inputs,) = seen
    height, width = inputs["image"].shape[1:]
    assert (height, width) == viewed.seen_size and 4000 < height * width <= 5000
    assert (inputs["height"], inputs["width"]) == size == viewed.original_size


def test_detections_of_a_scaled_picture_are_in_pixels_of_the_original(viewer, image, viewed):
    # The detector then sees it at the size at which it was drawn.
    limited = StageViewer(viewer.predictor, max_input_pixels=120 * 160).view(image, "a.png")
    assert limited.seen_size == (120, 160) and limited.original_size == (240, 320)
    assert viewed.seen_size is None
    found = limited.detections(-1, 0.3)
    assert len(found) == 4
    boxes = 2 * torch.tensor([box for _, box in render_image(SHAPES["shapes_val"], 8)[1]])
    overlap = box_iou(found.pred_boxes.tensor, box_convert(boxes, "xywh", "xyxy"))
    assert (overlap.max(dim=1).values > 0.7).all()


def test_predictions_that_are_not_finite_are_a_message(viewer, image, monkeypatch):
    original = viewer.predictor.model.inference_stages

    def spoil(inputs):
        outputs, detections = original(inputs)
        return [x._replace(boxes=x.boxes * float("nan")) for x in outputs], detections

    monkeypatch.setattr(viewer.predictor.model, "inference_stages", spoil)
    with pytest.raises(PictureRefused, match=r"answer to a\.png is not finite"):
        viewer.view(image, "a.png")


def test_examples_are_those_of_the_data_set():
    examples = ExampleImages(SHAPES["shapes_val"], (3, 1))
    assert len(examples) == 2 and examples.name(1) == "000001.png"
    np.testing.assert_array_equal(examples.image(0), render_image(SHAPES["shapes_val"], 3)[0])
