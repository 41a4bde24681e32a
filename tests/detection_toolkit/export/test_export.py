"""A small detector, exported once by the tool, against the one it was made of."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.data import transforms as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import SMALL_MODEL, data_overrides
from tolerances import tolerance

from detection_toolkit.commands import export as tool
from detection_toolkit.commands import predict
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data.transforms import OpenCVResizeShortestEdge
from detection_toolkit.engine import Predictor
from detection_toolkit.errors import UserError
from detection_toolkit.export import (
    Description,
    ExportedDetector,
    OnnxPredictor,
    compare_detections,
    exportable_detector,
    measure_parity,
    open_onnx,
    provider_names,
    run_session,
    to_float16,
    to_int8,
)
from detection_toolkit.export.description import METADATA_KEY

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "stageinteractor/shapes_tiny.py"
MASK_RCNN = "dfvt/mask_rcnn_dfvt_tiny_1x.py"
WEIGHTS = f"train.init_checkpoint='{ROOT / 'checkpoints' / 'shapes_tiny.pth'}'"


def make_weights(path, seed, overrides=()):
    """A checkpoint of scores around one half and boxes that every stage moves."""
    torch.manual_seed(seed)
    model = instantiate(apply_overrides(get_config(CONFIG), [*SMALL_MODEL, *overrides]).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        for stage in model.decoder.stages:
            stage.class_tower.out.bias.zero_()
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def weights(folder):
    return make_weights(folder / "weights.pth", seed=0)


@pytest.fixture(scope="module")
def arguments(weights):
    """The tool's command line, without what it writes."""
    options = [*SMALL_MODEL, f"train.init_checkpoint='{weights}'", "train.ema.enabled=false"]
    return ["--config-file", CONFIG, *options]


@pytest.fixture(scope="module")
def predictor(arguments):
    return Predictor.from_config(CONFIG, overrides=[*arguments[2:], "train.device=cpu"])


@pytest.fixture(scope="module")
def exported(arguments, folder):
    """The ONNX file, and what the tool printed."""
    path = folder / "new" / "model.onnx"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        tool.main([*arguments, "--output", str(path), "--benchmark", "64", "80", "--runs", "1"])
    return path, printed.getvalue()


@pytest.fixture(scope="module")
def run(exported):
    return tool.open_exported(exported[0].read_bytes(), "onnx", "float32", 1)


@pytest.fixture()
def picture():
    image = np.random.default_rng(0).integers(0, 80, (90, 120, 3), dtype=np.uint8)
    image[20:60, 30:70] = (40, 200, 220)
    return image


def test_the_tool_reports_parity_and_both_times(exported):
    path, printed = exported
    assert path.is_file()
    assert "detections agree within" in printed
    times = re.search(
        r"^(\d+\.\d\d) times as fast as PyTorch: ONNX Runtime (\d+\.\d) ms an image, PyTorch "
        r"(\d+\.\d) ms \(batches of one, 64x80 pixels, \d+ threads, median of 1\)$",
        printed,
        flags=re.M,
    )
    ratio, of_file, eager = map(float, times.groups())
    # Each is rounded to the last digit that is printed.
    assert (eager - 0.05) / (of_file + 0.05) - 0.005 <= ratio
    assert ratio <= (eager + 0.05) / max(of_file - 0.05, 1e-9) + 0.005
    assert list(path.parent.iterdir()) == [path]  # no weights beside it, no partial file


def test_the_file_describes_itself(exported, predictor):
    session, description = open_onnx(exported[0])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", ["batch", 3, "height", "width"], "tensor(float)"),
        ("image_sizes", ["batch", 2], "tensor(int64)"),
    ]
    # 6 queries; the detector keeps as many detections.
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("boxes", ["batch", 6, 4]),
        ("scores", ["batch", 6]),
        ("labels", ["batch", 6]),
    ]
    assert description.class_names == tuple(predictor.metadata.thing_classes)
    assert len(set(description.class_names)) == 6
    assert description.image_format == "RGB" and description.resizing is None


# Smaller images leave one cell of the coarsest map, which this backbone cannot normalise.
SIDES = st.tuples(st.integers(33, 130), st.integers(33, 130))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(SIDES, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_onnx_agrees_at_any_size_beside_any_padding(predictor, run, sizes, seed):
    parity = measure_parity(predictor.model, run, [sizes], seed=seed)
    assert parity.holds, f"{sizes}: {parity}"
    assert parity.detections >= 3 * len(sizes)


def test_a_program_for_uint8_images_agrees(arguments, folder):
    path = folder / "model.pt2"
    fewer = ["model.decoder.num_stages=1"]  # what stages reuse is in the ONNX file
    weights = make_weights(folder / "one_stage.pth", 0, fewer)
    overrides = [*arguments[2:], *fewer, f"train.init_checkpoint='{weights}'"]
    options = ["--format", "torch_export", "--input-type", "uint8", "--output", str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        tool.main([*arguments[:2], *overrides, *options])
    predictor = Predictor.from_config(CONFIG, overrides=[*overrides, "train.device=cpu"])
    extra = {f"{METADATA_KEY}.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert len(Description.from_json(extra[f"{METADATA_KEY}.json"]).class_names) == 6
    module = program.module()
    sizes = [[(75, 43)], [(33, 70), (64, 41), (50, 90)]]
    with torch.no_grad():
        assert measure_parity(predictor.model, module, sizes).holds


@pytest.mark.slow
def test_the_file_of_fewer_stages_has_their_detections_and_no_other_weights(
    arguments, exported, tmp_path
):
    path = tmp_path / "two_stages.onnx"
    tool.main([*arguments, "--stages", "2", "--output", str(path)])
    assert path.stat().st_size < exported[0].stat().st_size
    run = tool.open_exported(path.read_bytes(), "onnx", "float32", 1)
    predictor = Predictor.from_config(CONFIG, overrides=[*arguments[2:], "train.device=cpu"])

    class SecondStage(torch.nn.Module):
        decoder = predictor.model.decoder

        def forward(self, batch):
            return [{"instances": x} for x in predictor.model.inference_stages(batch)[1][1]]

    sizes = [[(75, 43)], [(33, 70), (64, 41), (50, 90)]]
    parity = measure_parity(SecondStage(), run, sizes)
    assert parity.holds and parity.detections > 0
    assert not measure_parity(predictor.model, run, sizes).holds


@pytest.mark.parametrize(
    "config, message", [(CONFIG, "from 1 to 3"), (MASK_RCNN, "has no cascade")]
)
def test_stages_that_a_detector_lacks_are_no_export(arguments, tmp_path, config, message):
    overrides = arguments[2:] if config == CONFIG else arguments[-2:]
    options = ["--config-file", config, "--stages", "4", "--output", str(tmp_path / "model.onnx")]
    with pytest.raises(SystemExit, match=message):
        tool.main([*options, *overrides])


def test_nothing_is_written_of_an_export_that_differs(arguments, exported, tmp_path, monkeypatch):
    other = make_weights(tmp_path / "other.pth", seed=1)
    monkeypatch.setattr("detection_toolkit.export.trace", lambda *_, **__: None)
    monkeypatch.setattr("detection_toolkit.export.to_onnx", lambda *_: exported[0].read_bytes())
    output = tmp_path / "model.onnx"
    with pytest.raises(SystemExit, match="differs from the detector"):
        tool.main([*arguments, f"train.init_checkpoint='{other}'", "--output", str(output)])
    assert not output.exists()


@pytest.mark.parametrize("resizing", [None, "pillow", "opencv", "opencv, padded"])
def test_the_predictor_of_the_file_is_that_of_the_config(
    exported, predictor, picture, tmp_path, monkeypatch, resizing
):
    augmentations = {
        None: [],
        "pillow": [T.ResizeShortestEdge(70, 80)],
        "opencv": [OpenCVResizeShortestEdge(70, 80)],
        "opencv, padded": [OpenCVResizeShortestEdge(70, 80), T.FixedSizeCrop((96, 80), True, 114)],
    }[resizing]
    description = Description.from_test_augmentations(
        augmentations, class_names=["a", "b"], image_format="RGB"
    )
    proto = onnx.load(exported[0])
    next(p for p in proto.metadata_props if p.key == METADATA_KEY).value = description.to_json()
    onnx.save(proto, tmp_path / "resizing.onnx")
    monkeypatch.setattr(predictor, "aug", T.AugmentationList(augmentations))

    of_file = OnnxPredictor(tmp_path / "resizing.onnx")
    assert of_file.metadata.thing_classes == ["a", "b"]
    expected = predictor(picture)["instances"]
    actual = of_file(picture)["instances"]
    padded = resizing == "opencv, padded"  # 60 rows of 80 pixels become 96
    assert actual.image_size == expected.image_size == ((144, 120) if padded else (90, 120))
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        actual.pred_boxes.tensor, expected.pred_boxes.tensor, atol=0.05, rtol=0
    )
    assert torch.equal(actual.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_many_pictures_give_what_each_gives(exported, picture, batch_size):
    predictor = OnnxPredictor(exported[0])
    images = [picture, picture[:60], picture[:, ::-1], picture[::-1]]
    found = list(predictor.predict(iter(images), batch_size=batch_size))
    assert len(found) == len(images)
    for instances, image in zip(found, images):
        expected = predictor(np.ascontiguousarray(image))["instances"]
        assert instances.image_size == expected.image_size == image.shape[:2]
        limits = tolerance(torch.float32, 1.0, 1000)
        torch.testing.assert_close(instances.scores, expected.scores, **limits)


def with_metadata(source, target, metadata: dict[str, str]):
    proto = onnx.load(source)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, target)
    return target


def test_a_file_that_has_the_description_under_another_key_is_read(exported, tmp_path):
    """As files do that were exported before the toolkit had its name."""
    expected = open_onnx(exported[0])[1]
    others = {"a": "no JSON", "b": "[1]", "c": '{"version": 1}', "old": expected.to_json()}
    assert open_onnx(with_metadata(exported[0], tmp_path / "old.onnx", others))[1] == expected
    newer = {"old": expected.to_json().replace('"version": 1', '"version": 9')}
    with pytest.raises(UserError, match="has version 9, and this program reads 1"):
        open_onnx(with_metadata(exported[0], tmp_path / "newer.onnx", newer))
    del others["old"]
    with pytest.raises(UserError, match="not one that `python tools/export.py` has written"):
        open_onnx(with_metadata(exported[0], tmp_path / "none.onnx", others))


def test_the_file_names_its_producer(exported):
    proto = onnx.load(exported[0])
    assert proto.producer_name == "detection_toolkit"
    assert [p.key for p in proto.metadata_props] == ["detection_toolkit"]


def test_the_demo_needs_no_model(exported, picture, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(Predictor, "__init__", fail)
    cv2.imwrite(str(tmp_path / "in.png"), picture)
    arguments = ["--input", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png")]
    arguments += ["--save-json", str(tmp_path / "out.json"), "--confidence-threshold", "0"]
    assert predict.main(["--onnx", str(exported[0]), *arguments]) == 0
    assert cv2.imread(str(tmp_path / "out.png")) is not None
    found = json.loads((tmp_path / "out.json").read_text())
    names = open_onnx(exported[0])[1].class_names
    assert found and all(names[x["category_id"]] == x["category_name"] for x in found)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--onnx", "{folder}/absent.onnx"], "no such ONNX model"),
        (["--onnx", "{folder}/text.onnx"], "cannot be opened as an ONNX model"),
        (["--onnx", "{folder}/foreign.onnx"], "not one that `python tools/export.py` has written"),
        (["--onnx", "{folder}/text.onnx", "--config-file", CONFIG], "leave --config-file"),
    ],
)
def test_the_demo_says_what_is_wrong_with_a_file(options, message, tmp_path, capsys):
    (tmp_path / "text.onnx").write_text("no model")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "foreign", [value], [other])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.save(model, tmp_path / "foreign.onnx")

    options = [option.format(folder=tmp_path) for option in options]
    with pytest.raises(SystemExit) as ended:
        predict.main(["--input", "in.png", "--output", str(tmp_path / "out"), *options])
    assert message in ended.value.code
    assert ended.value.code.startswith("error: ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config-file", "absent.py"], "absent.py"),
        (["--config-file", CONFIG, "train.init_checkpoint=absent.pth"], "absent.pth"),
        (["--config-file", CONFIG, "--output", "."], "is a folder"),
        (
            ["--config-file", "dfvt/mask_rcnn_dfvt_tiny_1x.py", WEIGHTS],
            "GeneralizedRCNN has no cascade of stages",
        ),
        (
            ["--config-file", "adamixer/adamixer_shapes_tiny.py", WEIGHTS],
            "shapes_tiny.pth is not of this config",
        ),
        (
            ["--config-file", "stageinteractor/stageinteractor_r50_100q_1x.py"],
            "no trained weights for stageinteractor/stageinteractor_r50_100q_1x.py",
        ),
        (
            [
                *("--config-file", CONFIG),
                "dataloader.test.mapper.augmentations=[{_target_: "
                "detectron2.data.transforms.RandomFlip}]",
            ],
            "has RandomFlip",
        ),
    ],
)
def test_the_tool_says_what_it_cannot_export(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    output = [] if "--output" in options else ["--output", "model.onnx"]
    with pytest.raises(SystemExit, match=message):
        tool.main([*options, *output])
    assert not any(tmp_path.iterdir())


def test_weights_of_a_run_are_enough_and_without_them_a_config_is_asked_for(tmp_path, capsys):
    for name in ("config.yaml", "model_best.pth"):
        (tmp_path / name).touch()
    weights = str(tmp_path / "model_best.pth")
    args = tool.parse_args(["--weights", weights, "--output", "model.onnx"])
    assert (args.config_file, args.opts) == (weights, [])
    for words in ([], ["--weights", "alone.pth"]):
        with pytest.raises(SystemExit):
            tool.parse_args([*words, "--output", "model.onnx"])
        assert "name the detector: --config-file FILE" in capsys.readouterr().err


def test_only_query_based_detectors_have_a_graph():
    cfg = get_config("dfvt/mask_rcnn_dfvt_tiny_1x.py")
    with pytest.raises(ValueError, match="only query-based detectors can be exported"):
        exportable_detector(cfg.model, {})


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="onnxscript: pip install onnx onnxruntime onnxscript"):
        tool.main(["--config-file", CONFIG, "--output", str(tmp_path / "model.onnx")])


def test_a_provider_that_onnx_runtime_lacks_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has no NoSuchProvider; it has .*CPUExecutionProvider"):
        OnnxPredictor(path, providers=["NoSuchProvider", "CPUExecutionProvider"])


def test_providers_by_short_names():
    assert provider_names("CPU") == ("CPUExecutionProvider",)
    with pytest.raises(UserError, match=r"no provider abacus; it has .*\bcpu\b"):
        provider_names("abacus")


def test_a_provider_that_does_not_start_is_named(exported, monkeypatch):
    """ONNX Runtime itself would go on without it."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("it may start here")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    with pytest.raises(UserError, match="could not start CUDAExecutionProvider"):
        OnnxPredictor(exported[0], providers=names)


@pytest.fixture
def openvino_file(exported):
    pytest.importorskip("openvino")
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        pytest.skip("OpenVINO chooses by the processor alone, and crashes where oneDNN is limited")
    return exported[0]


def test_openvino_finds_what_the_detector_finds(openvino_file, predictor, picture):
    run = tool.open_exported(openvino_file.read_bytes(), "onnx", "float32", 1, "openvino")
    parity = measure_parity(predictor.model, run, tool.PARITY_SIZES)
    assert parity.holds, parity
    expected, found = (
        OnnxPredictor(openvino_file, runtime=runtime)(picture)["instances"]
        for runtime in ("onnxruntime", "openvino")
    )
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


def test_the_demo_runs_a_file_by_openvino(openvino_file, tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("in.png", picture)
    found = []
    for options in ([], ["--provider", "cpu"], ["--runtime", "openvino"]):
        options += ["--save-json", "out.json", "--confidence-threshold", "0"]
        onnx_file = ["--onnx", str(openvino_file)]
        assert predict.main(["--input", "in.png", "--output", "out.png", *onnx_file, *options]) == 0
        found.append([r["score"] for r in json.loads(Path("out.json").read_text())])
    assert found[0] == found[1] == pytest.approx(found[2], abs=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--runtime", "openvino"], "are for --onnx FILE"),
        (["--provider", "cpu"], "are for --onnx FILE"),
        (["--onnx", "a.onnx", "--runtime", "openvino", "--provider", "cpu"], "OpenVINO runs on"),
        (["--onnx", "a.onnx", "--provider", "abacus"], "no provider abacus; it has"),
        (["--onnx", "a.onnx", "--runtime", "openvino"], "no such ONNX model: a.onnx"),
        (["--onnx", "in.png", "--runtime", "openvino"], "in.png cannot be opened by OpenVINO"),
    ],
)
def test_runtimes_that_cannot_be_used_are_named(tmp_path, monkeypatch, picture, options, message):
    if "openvino" in options:
        pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("in.png", picture)
    with pytest.raises(SystemExit) as ended:
        predict.main(["--input", "in.png", "--output", "out.png", *options])
    assert ended.value.code.startswith("error: ") and message in ended.value.code
    assert "\n" not in ended.value.code


def test_a_missing_openvino_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="needs the package openvino: pip install openvino"):
        OnnxPredictor(exported[0], runtime="openvino")
    with pytest.raises(UserError, match="no runtime abacus: there are onnxruntime, openvino"):
        OnnxPredictor(exported[0], runtime="abacus")


def test_providers_are_those_of_the_session(exported):
    predictor = OnnxPredictor(exported[0], providers=["CPUExecutionProvider"])
    assert predictor.session.get_providers() == ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def halved(exported):
    return to_float16(exported[0].read_bytes())


def test_in_float16_products_and_their_weights_are_and_nothing_else(halved):
    graph = onnx.load_from_string(halved).graph
    weights = {x.name: x.data_type for x in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    half = onnx.TensorProto.FLOAT16
    for name in {name for node in products for name in node.input if name}:
        assert weights.get(name) == half or makers.get(name) == "Cast", name
    others = [n for node in graph.node if node not in products for n in node.input]
    assert not [name for name in others if weights.get(name) == half]
    assert {x.type.tensor_type.elem_type for x in graph.output} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    assert set(weights) - set(others) == {n for n, kind in weights.items() if kind == half}


def test_in_float16_detections_move_by_rounding(halved, exported, tmp_path, picture):
    (tmp_path / "half.onnx").write_bytes(halved)
    whole = OnnxPredictor(exported[0])(picture)["instances"]
    half = OnnxPredictor(tmp_path / "half.onnx")(picture)["instances"]
    # Scores around one half, of layers with some dozens of summands: some roundings of 2^-11.
    torch.testing.assert_close(half.scores, whole.scores, rtol=0, atol=16 * 2**-11)
    assert not torch.equal(half.scores, whole.scores)


@pytest.mark.parametrize(
    "precision, loss, message",
    [
        ("float16", 0.5, None),
        ("float16", -101, "AP falls by more than -101"),
        ("int8", 100, None),
        ("float32", 0.5, None),
        ("float32", -101, "AP falls by more than -101"),
    ],
)
def test_the_file_is_judged_by_ap(
    arguments, exported, tmp_path, monkeypatch, capsys, precision, loss, message
):
    content = exported[0].read_bytes()
    monkeypatch.setattr("detection_toolkit.export.trace", lambda *_, **__: None)
    monkeypatch.setattr("detection_toolkit.export.to_onnx", lambda *_: content)
    document = make_document()  # with the six classes that the detector has
    document["categories"] += [{"id": 100 + i, "name": f"other{i}"} for i in range(3)]
    image_set = data_overrides(*write_dataset(tmp_path / "data", document))
    output = tmp_path / "reduced.onnx"
    options = ["--precision", precision, "--max-ap-loss", str(loss), "--output", str(output)]
    expected = pytest.raises(SystemExit, match=message) if message else contextlib.nullcontext()
    with expected:
        tool.main([*arguments[:2], *options, *arguments[2:], *image_set])
    assert re.search(r"AP on .*: \d+\.\d\d, of the file \d+\.\d\d", capsys.readouterr().out)
    assert output.exists() == (message is None)
    if output.exists():
        written = output.read_bytes()
        if precision == "int8":
            assert written != content
        else:
            assert written == (to_float16(content) if precision == "float16" else content)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (3, 90, 120), dtype=np.uint8) for _ in range(3)]


def test_in_int8_products_with_weights_are_and_nothing_else(exported, images):
    content = exported[0].read_bytes()
    before, after = (onnx.load_from_string(x).graph for x in (content, to_int8(content, images)))
    weights = {x.name: x for x in after.initializer}
    makers = {name: node for node in after.node for name in node.output}
    count = {True: 0, False: 0}
    for node in after.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            maker = makers.get(node.input[1])
            of_int8 = maker is not None and maker.op_type == "DequantizeLinear"
            if of_int8:
                assert weights[maker.input[0]].data_type == onnx.TensorProto.INT8
                assert makers[node.input[0]].op_type == "DequantizeLinear"
            count[of_int8] += 1
    names = {x.name for x in before.initializer}
    products = [n for n in before.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert count[True] == sum(n.input[1] in names for n in products) > count[False] > 0
    assert [x.name for x in after.output] == [x.name for x in before.output]


def test_in_int8_detections_stay_near(exported, images, tmp_path, picture):
    content = to_int8(exported[0].read_bytes(), images)
    (tmp_path / "int8.onnx").write_bytes(content)
    whole = OnnxPredictor(exported[0])(picture)["instances"]
    small = OnnxPredictor(tmp_path / "int8.onnx")(picture)["instances"]
    assert small.image_size == whole.image_size
    # Scores are around one half here; a hundredth of their range is a few of 256 steps.
    assert (small.scores - whole.scores).abs().max() < 0.1
    assert not torch.equal(small.scores, whole.scores)


def test_int8_needs_images(exported):
    with pytest.raises(UserError, match="int8 needs some images"):
        to_int8(exported[0].read_bytes(), [])


def test_float16_is_for_onnx(arguments, capsys):
    with pytest.raises(SystemExit):
        tool.main(
            [*arguments, "--format", "torch_export", "--precision", "float16", "--output", "a"]
        )
    assert "--precision float16 is for --format onnx" in capsys.readouterr().err


def test_a_weight_beyond_float16_becomes_its_largest_number():
    values = np.array([[1e6, -1e6, 1.0]], dtype=np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = {"x": (1, 1), "y": (1, 3)}
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    weight = onnx.numpy_helper.from_array(values, "w")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [weight]))
    (stored,) = onnx.load_from_string(to_float16(model.SerializeToString())).graph.initializer
    assert onnx.numpy_helper.to_array(stored).tolist() == [[65504.0, -65504.0, 1.0]]


def test_a_file_is_evaluated_like_a_detector(exported, predictor):
    session, _ = open_onnx(exported[0])
    detector = ExportedDetector(partial(run_session, session))
    image = torch.randint(256, (3, 97, 130), dtype=torch.uint8)
    inputs = [{"image": image, "height": 194, "width": 260}]
    (found,), (expected,) = detector(inputs), predictor.model(inputs)
    parity = compare_detections(expected["instances"], found["instances"])
    assert parity.holds, parity
    assert found["instances"].image_size == (194, 260)


@pytest.mark.parametrize(
    "words, said",
    [
        (["m.engine"], "nothing is exported to .engine; there is ONNX .*torch_export"),
        (["m.pt2"], "--output m.pt2: this is --format torch_export"),
        (["m.onnx", "--format", "torch_export"], "--output m.onnx: this is --format onnx"),
        (["m.onnx", "format=onnx"], "format=onnx is no option, here it is --format onnx"),
    ],
)
def test_a_file_is_called_like_what_it_holds(words, said, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--config-file", "a.py", "--output", *words], "x")
    line, _ = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
