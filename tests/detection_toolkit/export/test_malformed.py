"""ONNX files that no export has written: what is wrong with them is said."""

import json

import numpy as np
import pytest

from detection_toolkit.errors import UserError
from detection_toolkit.export import Description, OnnxPredictor, open_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FLOAT, INT64, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.UINT8
SOUND = Description(("cat", "dog"), "RGB", "pillow", 32, 64)


def write(path, outputs, *, images=FLOAT, sizes=INT64, extra=(), names=None, description=SOUND):
    """A graph that gives constants: name -> array."""
    takes = [
        onnx.helper.make_tensor_value_info("images", images, ["B", 3, "H", "W"]),
        onnx.helper.make_tensor_value_info("image_sizes", sizes, ["B", 2]),
        *extra,
    ]
    nodes, gives = [], []
    for name, value in outputs.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(value))
        nodes.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
        gives.append(onnx.helper.make_tensor_value_info(name, kind, None))
    graph = onnx.helper.make_graph(nodes, "detector", takes, gives)
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    text = description if isinstance(description, str) else description.to_json()
    onnx.helper.set_model_props(model, {"detection_toolkit": text})
    onnx.save(model, path)
    return path


def detections(number=2, *, boxes=None, scores=None, labels=None):
    return {
        "boxes": np.full((1, number, 4), [0, 0, 9, 9], np.float32) if boxes is None else boxes,
        "scores": np.full((1, number), 0.5, np.float32) if scores is None else scores,
        "labels": np.zeros((1, number), np.int64) if labels is None else labels,
    }


PICTURE = np.zeros((40, 60, 3), np.uint8)


def test_a_sound_one_is_used(tmp_path):
    predictor = OnnxPredictor(write(tmp_path / "a.onnx", detections()))
    assert len(predictor(PICTURE)["instances"]) == 2


GRAPHS = {
    "no labels": lambda: ({"boxes": 0.0, "scores": 0.0}, {}),
    "texts as images": lambda: (detections(), {"images": onnx.TensorProto.STRING}),
    "float sizes": lambda: (detections(), {"sizes": FLOAT}),
    "one more input": lambda: (
        detections(),
        {"extra": [onnx.helper.make_tensor_value_info("x", FLOAT, [1])]},
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_another_graph_is_named_when_it_is_opened(tmp_path, kind):
    outputs, options = GRAPHS[kind]()
    with pytest.raises(UserError, match=r"a\.onnx is no detector"):
        open_onnx(write(tmp_path / "a.onnx", outputs, **options))


OUTPUTS = {
    "flat boxes": detections(boxes=np.ones((1, 2), np.float32)),
    "three numbers a box": detections(boxes=np.ones((1, 2, 3), np.float32)),
    "a scalar": detections(scores=np.float32(1)),
    "more scores": detections(scores=np.ones((1, 3), np.float32)),
    "two images": detections(boxes=np.ones((2, 2, 4), np.float32)),
    "texts as labels": detections(labels=np.array([["a", "b"]], object)),
    "labels with a point": detections(labels=np.ones((1, 2), np.float32)),
    "a label of no class": detections(labels=np.array([[0, 2]])),
    "a label below zero": detections(labels=np.array([[0, -1]])),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_are_no_detections_is_named(tmp_path, kind):
    predictor = OnnxPredictor(write(tmp_path / "a.onnx", OUTPUTS[kind]))
    with pytest.raises(UserError, match="the ONNX model gives"):
        predictor(PICTURE)


def test_a_graph_that_fails_is_named(tmp_path):
    path = write(tmp_path / "a.onnx", detections())
    model = onnx.load(path)
    node = onnx.helper.make_node("Reshape", ["images", "image_sizes"], ["r"])
    flat = onnx.helper.make_node("Identity", ["r"], ["scores"])
    kept = [n for n in model.graph.node if n.output[0] != "scores"]
    del model.graph.node[:]
    model.graph.node.extend([*kept, node, flat])
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"fails on an image|cannot be opened"):
        OnnxPredictor(path)(PICTURE)


VALUES = json.loads(SOUND.to_json())
DESCRIPTIONS = [
    "",
    "[]",
    "3",
    "null",
    "{",
    "[" * 100_000,
    json.dumps({**VALUES, "version": 99}),
    json.dumps({**VALUES, "version": None}),
    *(
        json.dumps({**VALUES, **changed})
        for changed in (
            {"class_names": 3},
            {"class_names": [1, 2]},
            {"class_names": [["a"], {}]},
            {"image_format": ["RGB"]},
            {"image_format": "HSV"},
            {"resizing": ["pillow"]},
            {"resizing": {"a": 1}},
            {"resizing": "magic"},
            {"short_side": "32"},
            {"short_side": 0},
            {"short_side": -5},
            {"short_side": 10**12},
            {"short_side": 1.5},
            {"short_side": True},
            {"max_side": None},
            {"max_side": 10**12},
            {"unknown": 1},
        )
    ),
]


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_a_malformed_description_is_named(tmp_path, text):
    with pytest.raises(UserError, match="description|not one that `python tools/export.py`"):
        open_onnx(write(tmp_path / "a.onnx", detections(), description=text))
    if text:
        with pytest.raises(UserError, match="description"):
            Description.from_json(text)


def test_a_description_without_resizing_needs_no_sides():
    plain = Description(None)
    assert Description.from_json(plain.to_json()) == plain
