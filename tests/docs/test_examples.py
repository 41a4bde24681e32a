"""The scripts of examples/ run as they are, and are what docs/extending.md shows."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_files import write_dataset
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from patience import PATIENCE
from small_runs import run_overrides
from tolerances import tolerance

from detection_toolkit.config import get_config
from detection_toolkit.data import SHAPES, generate_shapes
from detection_toolkit.data.shapes import render_image
from detection_toolkit.engine import Predictor, Trainer
from detection_toolkit.errors import UserError
from detection_toolkit.structures import GroundTruth
from detection_toolkit.visualization import select_confident

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of examples/ as ``python`` would, with a model and a run of seconds."""

    def run_script(name: str, *overrides: str) -> Path:
        common = [text.replace("'", "") for text in run_overrides(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *common, *overrides])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path / "output"

    return run_script


@pytest.fixture(scope="module")
def parts():
    """examples/my_parts.py as a module."""
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / "my_parts.py")))


def logged(output: Path, name: str) -> list[float]:
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_every_script_is_on_the_page():
    for path in EXAMPLES.glob("*.py"):
        assert f"(../examples/{path.name})" in PAGE, path.name


def test_code_on_the_page_is_that_of_the_scripts():
    code = "\n".join(path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py"))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) > 7
    for block in blocks:
        for part in block.split("\n\n"):
            assert part.strip("\n") in code, part


def test_hook(run):
    change = logged(run("hook.py"), "weight_change")
    assert len(change) >= 4 and 0 < change[0] < change[-1]


def test_writer(run):
    output = run("writer.py")
    with (output / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in rows] == [0, 1, 2, 3]
    losses = [float(row["total_loss"]) for row in rows]
    # metrics.json has medians of what was written before; the first one is of one value.
    assert losses[0] == pytest.approx(logged(output, "total_loss")[0])
    assert len(set(losses)) == 4 and min(losses) > 0


def test_detectron2s_loop(run):
    # A name that no other test has: the set of another one may be called as its file is.
    names = [f"dataloader.{part}.dataset.name=of_loop" for part in ("train", "test")]
    more = ("dataloader.evaluator.dataset_name=of_loop", "model.num_classes=3")
    output = run("detectron2_loop.py", *names, *more)
    assert len(set(logged(output, "total_loss"))) >= 4
    assert (output / "model_final.pth").is_file()
    assert "bbox/AP" in (output / "metrics.json").read_text()


def test_default_predictor(tmp_path, monkeypatch, capsys):
    generate_shapes(replace(SHAPES["shapes_val"], num_images=1), tmp_path / "one", title="one")
    picture = next((tmp_path / "one" / "images").iterdir())
    monkeypatch.setattr(sys, "argv", ["default_predictor.py", str(picture), "train.device=cpu"])
    runpy.run_path(str(EXAMPLES / "default_predictor.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    pattern = re.compile(r"(circle|square|triangle|star|cross|ring) [01]\.\d\d")
    assert lines and all(map(pattern.fullmatch, lines))


class Recorder:
    """A predictor that remembers how many pictures came together."""

    def __init__(self, predictor):
        self.predictor, self.metadata, self.batches = predictor, predictor.metadata, []

    def predict(self, images, *, batch_size):
        self.batches.append(len(images))
        return self.predictor.predict(images, batch_size=batch_size)


def test_concurrent_requests_to_the_server_get_what_the_predictor_finds():
    serve = runpy.run_path(str(EXAMPLES / "serve.py"))
    predictor = Predictor.from_config("stageinteractor/shapes_tiny.py", None, ["train.device=cpu"])
    pictures = [render_image(SHAPES["shapes_val"], i)[0] for i in range(9)]
    bodies = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    bodies[3] = b"no picture"
    recorder = Recorder(predictor)
    # A batch waits until it is full, so that two of them hold all that can be read.
    server = serve["make_server"](recorder, ("127.0.0.1", 0), batch_size=4, seconds=PATIENCE)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(body):
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with urllib.request.urlopen(url, body, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        with ThreadPoolExecutor(len(bodies)) as threads:
            answers = list(threads.map(ask, bodies))
    finally:
        server.shutdown()
        server.server_close()
    assert answers[3][0] == 400 and "cannot identify" in answers[3][1]["error"]
    assert recorder.batches == [4, 4]
    for i in (0, 1, 2, 4, 5, 6, 7, 8):
        expected = select_confident(predictor(pictures[i])["instances"], 0.3)
        status, found = answers[i]
        assert status == 200
        assert [r["category_id"] for r in found] == expected.pred_classes.tolist()
        scores = torch.tensor([r["score"] for r in found])
        torch.testing.assert_close(scores, expected.scores, **tolerance(torch.float32, 1.0, 1000))


def test_one_bad_picture_fails_alone():
    serve = runpy.run_path(str(EXAMPLES / "serve.py"))

    class Fails:
        def predict(self, images, *, batch_size):
            if any(image.sum() == 0 for image in images):
                raise UserError("too dark")
            return iter([image.shape for image in images])

    batcher = serve["Batcher"](Fails(), 3, PATIENCE)
    pictures = [np.full((2, 2 + i, 3), i) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        first, *others = [threads.submit(batcher.detect, picture) for picture in pictures]
        assert [other.result(PATIENCE) for other in others] == [(2, 3, 3), (2, 4, 3)]
        with pytest.raises(UserError, match="too dark"):
            first.result(PATIENCE)


def yaml_config():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "StageInteractor"
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("use", [build_model, DefaultPredictor, Predictor, Trainer])
def test_a_cfgnode_is_refused_with_what_to_do_instead(use):
    with pytest.raises(UserError, match=r"LazyConfig.*get_config.*Predictor\.from_config"):
        use(yaml_config())


def test_the_page_quotes_the_refusal():
    with pytest.raises(UserError) as caught:
        build_model(yaml_config())
    assert str(caught.value).split(" (")[0] in " ".join(PAGE.split())


@pytest.mark.slow
def test_the_config_trains_with_all_parts_and_its_run_is_evaluated(tmp_path):
    """Both in processes of their own, from another folder: what one finds is no other's luck."""
    overrides = [x for x in run_overrides(tmp_path) if "bottom_up" not in x]

    def call(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join(filter(None, [str(ROOT / "projects"), path]))
        return subprocess.run(
            [sys.executable, str(ROOT / "train_net.py"), *arguments],
            env={**os.environ, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = call("--config-file", str(EXAMPLES / "my_config.py"), *overrides)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "output"
    saved = (output / "config.yaml").read_text()
    for name in "NoisyMapper RandomGrey CountDetections PatchBackbone OverlapMatcher".split():
        assert f"_target_: my_parts.{name}" in saved
    assert len(logged(output, "detections/per_image")) == 1
    evaluation = ("--config-file", str(output / "config.yaml"), "--eval-only")
    unknown = call(*evaluation, path=str(EXAMPLES))
    assert unknown.returncode == 1
    assert "names 'my_parts." in unknown.stderr and "add --trust-config" in unknown.stderr
    evaluation += ("--trust-config",)
    lost = call(*evaluation)
    assert lost.returncode == 1 and "Traceback" not in lost.stderr
    assert "no module my_parts: put the folder that has it into PYTHONPATH" in lost.stderr
    again = call(*evaluation, path=str(EXAMPLES))
    assert again.returncode == 0, again.stderr


def test_a_module_beside_a_config_hides_no_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "yacs.py").write_text("raise AssertionError('the wrong module')\n")
    (tmp_path / "beside_the_config.py").write_text("NUMBER = 3\n")
    (tmp_path / "own.py").write_text(
        "import yacs\nfrom beside_the_config import NUMBER\nown = dict(number=NUMBER)\n"
    )
    assert get_config(str(tmp_path / "own.py")).own.number == 3
    get_config(str(tmp_path / "own.py"))
    assert sys.path.count(str(tmp_path)) == 1


def test_packaged_configs_add_nothing_to_the_search_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = list(sys.path)
    get_config("stageinteractor/shapes_tiny.py")
    assert sys.path == before


def test_noise_is_for_training_only(parts, tmp_path):
    image = next(Path(write_dataset(tmp_path)[1]).iterdir())
    sample = {"file_name": str(image), "height": 64, "width": 96, "annotations": []}
    plain, noisy, test = (
        parts.NoisyMapper(is_train, augmentations=[], noise=noise)(dict(sample))["image"]
        for is_train, noise in ((True, 0.0), (True, 4.0), (False, 4.0))
    )
    assert torch.equal(plain, test) and not torch.equal(plain, noisy)
    assert noisy.dtype == torch.uint8


def test_the_overlap_matcher_ignores_padding_and_far_boxes(parts):
    truth = GroundTruth.collate(
        [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.zeros(0, 4)],
        [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)],
        [(40, 40), (40, 40)],
    )
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 9, 10], [20, 20, 30, 31], [0, 0, 40, 40]])
    boxes = boxes.expand(1, 2, -1, -1)
    assignment = parts.OverlapMatcher()(torch.zeros(1, 2, 4, 3), boxes, truth)
    assert assignment.object_index.tolist() == [[[0, 0, 1, -1], [-1, -1, -1, -1]]]
