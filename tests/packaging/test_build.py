"""Wheel, sdist and editable install, and the wheel at work in another folder."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import patience
import pytest
import trove_classifiers
from format_files import make_splits, write_coco, write_yolo
from small_runs import SMALL_MODEL

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "stageinteractor/shapes_tiny.py"
NOT_SOURCES = (
    *(".venv", ".git", ".hypothesis", ".*_cache", "__pycache__"),
    *("*.egg-info", "build", "dist", "output", "datasets"),
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = patience.run(command, cwd=cwd, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source: Path, target: Path, hook: str) -> Path:
    """Call a hook of the build backend, as pip does, and return the file that it made."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"from hatchling import build; print(build.{hook}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


def shipped_files() -> set[str]:
    """What a wheel must carry, as names inside the package's folder."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in ("configs", "checkpoints")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    for left in ("projects/stageinteractor.egg-info/PKG-INFO", "configs/__pycache__/a.pyc"):
        (source / left).parent.mkdir(exist_ok=True)
        (source / left).touch()
    return build(source, source / "dist", "build_wheel")


def test_the_wheel_carries_configs_and_checkpoints_and_nothing_left_from_before(wheel):
    prefix = "detection_toolkit/"
    carried = {
        name[len(prefix) :]
        for name in names_in_wheel(wheel)
        if name.startswith((f"{prefix}configs/", f"{prefix}checkpoints/"))
    }
    assert "configs/stageinteractor/shapes_tiny.py" in carried
    assert carried == shipped_files()


def test_the_wheel_carries_every_project_and_only_projects(wheel):
    packages = {
        path.parent.relative_to(ROOT / "projects").as_posix()
        for path in (ROOT / "projects").rglob("__init__.py")
    }
    names = names_in_wheel(wheel)
    assert {f"{package}/__init__.py" for package in packages} <= names
    assert "detection_toolkit/web/page.css" in names
    assert {f"{name}/py.typed" for name in packages if "/" not in name} <= names
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {package for package in packages if "/" not in package}


def test_the_wheel_requires_nothing_that_could_replace_pytorch_or_detectron2(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    required = {re.match(r"[\w.-]+", line).group().lower() for line in plain}
    assert not {name for name in required if re.search("torch|detectron2|opencv", name)}
    assert {"omegaconf", "fvcore", "pycocotools", "scipy"} <= required
    (omegaconf,) = [line for line in plain if line.startswith("omegaconf")]
    assert "<2.4" in omegaconf and ">=2.1" in omegaconf
    assert metadata["Version"] == __import__("stageinteractor").__version__


def test_an_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    sdist = build(source, tmp_path / "sdist", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.name[: -len(".tar.gz")]
    assert (unpacked / "tests" / "packaging" / Path(__file__).name).is_file()
    again = build(unpacked, tmp_path / "wheel", "build_wheel")
    assert names_in_wheel(again) == names_in_wheel(wheel)


def test_the_metadata_are_ready_for_an_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        names = archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# StageInteractor")
    assert metadata["Requires-Python"] == ">=3.10" and metadata["Keywords"]
    assert set(metadata.get_all("Classifier")) <= trove_classifiers.classifiers


def test_setup_py_says_where_it_went():
    done = subprocess.run(
        [sys.executable, "setup.py", "install"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install .")


def test_an_editable_install_refers_to_the_checkout_and_copies_nothing(source, tmp_path):
    editable = build(source, tmp_path, "build_editable")
    with zipfile.ZipFile(editable) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [name.endswith(".pth") for name in names] == [True], names
        assert archive.read(names[0]).decode().strip() == str(source / "projects")


def test_an_installed_wheel_finds_its_configs_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", "--target", str(site), str(wheel)),
        cwd=elsewhere,
    )
    code = """
import stageinteractor
from detection_toolkit.config import find_config_file
from detectron2.config import instantiate
print(stageinteractor.__file__)
for name in ("stageinteractor/shapes_tiny.py", "stageinteractor/stageinteractor_r50_100q_1x.py"):
    print(find_config_file(name))
cfg = stageinteractor.get_config("stageinteractor/shapes_tiny.py")
print(type(instantiate(cfg.model)).__module__)
"""
    output = run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()
    module, *configs, detector = output[-4:]
    assert module == str(site / "stageinteractor" / "__init__.py")
    assert configs == [
        str(site / "detection_toolkit" / "configs" / "stageinteractor" / name)
        for name in ("shapes_tiny.py", "stageinteractor_r50_100q_1x.py")
    ]
    assert detector == "stageinteractor.detector"


# -- a clean environment --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(source, tmp_path_factory) -> Path:
    """A virtual environment with the wheel of the sdist, and nothing of the checkout.

    PyTorch, Detectron2 and the other requirements are those of this process: added to the path, not
    installed, so that no network is needed.
    """
    folder = tmp_path_factory.mktemp("clean")
    sdist = build(source, folder / "sdist", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    wheel = build(folder / sdist.name[: -len(".tar.gz")], folder / "wheel", "build_wheel")
    run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder)
    python = str(folder / "venv" / "bin" / "python")
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", purelib, cwd=folder).strip())
    # Paths alone: a .pth file within them, as an editable install has, is not read.
    others = [p for p in sys.path if os.path.isdir(p) and not Path(p).is_relative_to(ROOT)]
    installed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "requirements.pth").write_text("\n".join([*others, *installed]) + "\n")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    run(python, *install, cwd=folder, PYTHONPATH="")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A user's folder, with data of the same images as YOLO and as COCO files."""
    folder = tmp_path_factory.mktemp("work")
    splits = make_splits()
    write_yolo(folder / "yolo", splits)
    write_coco(folder / "coco", splits)
    return folder


@pytest.fixture(scope="module")
def call(clean, work):
    """Runs a program of the environment in the user's folder."""

    def run_program(command: str, *arguments: str) -> str:
        quiet = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return run(str(clean / "venv" / "bin" / command), *arguments, cwd=work, **quiet)

    return run_program


@pytest.fixture(scope="module")
def runs(call) -> dict[str, str]:
    """Runs of a few steps by their folders, and what they printed."""
    settings = [*SMALL_MODEL, "train.device=cpu", "train.eval_period=0", "train.log_period=1"]
    settings += ["dataloader.train.total_batch_size=2"]
    printed = {}
    for name, data, seed, steps in (
        ("yolo_run", "yolo", 1, 2),
        ("coco_run", "coco", 1, 2),
        ("other_run", "coco", 2, 3),
    ):
        words = ("--config-file", CONFIG, "--data", data, f"train.output_dir={name}")
        length = (f"train.seed={seed}", f"train.max_iter={steps}")
        printed[name] = call("stageinteractor", "train", *words, *settings, *length)
    return printed


@pytest.fixture(scope="module")
def evaluated(call, runs, work) -> Path:
    """Folder of what the command ``eval`` wrote of a run."""
    stages = "train.stage_evaluation=true"
    call("stageinteractor", "eval", "--config-file", "coco_run/config.yaml", stages)
    return work / "coco_run" / "inference" / "coco_val"


def read(path: Path):
    return json.loads(path.read_text())


def read_detections(path: Path) -> dict[str, list[dict]]:
    """What ``predict --save-json`` wrote, by the names of the pictures."""
    found: dict[str, list[dict]] = {}
    for detection in read(path):
        found.setdefault(Path(detection["image_id"]).name, []).append(detection)
    return found


ALL = ("--confidence-threshold", "0")  # a detector of two steps is sure of nothing


@pytest.mark.slow
def test_the_command_is_that_of_the_environment(call, clean):
    where = "import detection_toolkit; print(detection_toolkit.__file__)"
    assert call("python", "-c", where).startswith(str(clean / "venv"))
    assert CONFIG in call("stageinteractor", "configs").splitlines()


@pytest.mark.slow
def test_a_yolo_folder_and_coco_files_of_the_same_images_have_the_same_losses(runs, work):
    losses = {}
    for name in ("yolo_run", "coco_run"):
        assert f"stageinteractor report {name}" in runs[name]
        lines = (work / name / "metrics.json").read_text().splitlines()
        steps = [step for step in map(json.loads, lines) if "total_loss" in step]
        losses[name] = [{k: v for k, v in s.items() if "loss" in k} for s in steps]
    assert len(losses["coco_run"]) == 2 and len(losses["coco_run"][0]) > 3
    assert losses["yolo_run"] == losses["coco_run"]  # to the last digit


@pytest.mark.slow
def test_an_installed_eval_writes_metrics_of_the_run_and_its_stages(evaluated):
    metrics = read(evaluated / "metrics.json")
    assert metrics["classes"] == ["cat", "dog", "bird"]
    assert metrics["checkpoint"] == "coco_run/model_final.pth"
    assert {"AP", "AP50", "AP-bird"} <= set(metrics["results"]["bbox"])
    assert len(read(evaluated / "stage_metrics.json")["stages"]) == 3
    assert len(read(evaluated / "coco_instances_results.json")) == 2 * 6  # images, queries


@pytest.mark.slow
def test_an_installed_predict_finds_what_the_evaluation_found(call, evaluated, work):
    words = ("--input", "coco/images/val", "--output", "drawn", "--save-json", "found.json", *ALL)
    call("stageinteractor", "predict", "--config-file", "coco_run/config.yaml", *words)
    pictures = [cv2.imread(str(path)) for path in sorted((work / "drawn").iterdir())]
    assert len(pictures) == 2 and all(picture is not None for picture in pictures)
    truth = read(work / "coco" / "annotations" / "instances_val2017.json")
    names = {c["id"]: c["name"] for c in truth["categories"]}
    expected = read(evaluated / "coco_instances_results.json")
    found = read_detections(work / "found.json")
    for image in truth["images"]:
        ours = found.pop(image["file_name"])
        theirs = [d for d in expected if d["image_id"] == image["id"]]
        assert len(ours) == 6
        assert [(d["category_name"], d["bbox"], d["score"]) for d in ours] == [
            (names[d["category_id"]], d["bbox"], d["score"]) for d in theirs
        ]
    assert not found


@pytest.mark.slow
def test_an_installed_export_writes_files_that_run(call, evaluated, work):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    of_run = ("--config-file", "coco_run/config.yaml")
    program = ("--format", "torch_export", "--output", "model.pt2")
    assert "wrote model.pt2" in call("stageinteractor", "export", *of_run, *program)
    done = call("stageinteractor", "export", *of_run, "--output", "model.onnx")
    assert "compared on" in done and "wrote model.onnx" in done
    session = onnxruntime.InferenceSession(
        str(work / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    assert "bird" in str(session.get_modelmeta().custom_metadata_map)
    words = ("--input", "coco/images/val", "--output", "by_onnx", "--save-json", "onnx.json", *ALL)
    call("stageinteractor", "predict", "--onnx", "model.onnx", *words)
    found = read_detections(work / "onnx.json")
    expected = read(evaluated / "coco_instances_results.json")
    assert len(found) == 2 and {len(of_picture) for of_picture in found.values()} == {6}
    best = max(d["score"] for of_picture in found.values() for d in of_picture)
    assert best == pytest.approx(max(d["score"] for d in expected), rel=1e-3)


@pytest.mark.slow
def test_an_installed_check_reads_both_data_sets_and_asks_a_model(call, runs, work):
    counted = {}
    for data in ("yolo", "coco"):
        assert "Ready to train" in call("stageinteractor", "check", "--data", data)
        counted[data] = read(work / "output" / "check_dataset" / "report.json")
    assert counted["yolo"] == counted["coco"]
    assert (counted["coco"]["images"], counted["coco"]["boxes"]) == (4, 8)
    words = ("--model", "coco_run", "--min-score", "0.0001", "--output", "asked")
    printed = call("stageinteractor", "check", "coco", *words)
    suspects = read(work / "asked" / "val_label_errors.json")
    assert suspects and f"{len(suspects)} suspects" in printed
    assert {s["file_name"] for s in suspects} <= {"val1.png", "val2.png"}
    assert "Suspect annotations" in (work / "asked" / "val_label_errors.html").read_text()


@pytest.mark.slow
def test_an_installed_report_tells_what_was_evaluated(call, evaluated, work):
    printed = call("stageinteractor", "report", "coco_run", "--images", "1")
    assert "report.html" in printed
    report = read(work / "coco_run" / "report.json")
    metrics = read(evaluated / "metrics.json")
    assert report["dataset"] == "coco_val" and report["config"].startswith(CONFIG)
    assert (report["images"], report["objects"], report["detections"]) == (2, 4, 12)
    assert report["coco"]["overall"]["AP"] == pytest.approx(metrics["results"]["bbox"]["AP"])
    page = (work / "coco_run" / "report.html").read_text()
    assert "coco_run/model_final.pth" in page and "data:image/" in page


@pytest.mark.slow
def test_an_installed_compare_writes_a_page_of_both_runs(call, evaluated, work):
    truth = read(work / "coco" / "annotations" / "instances_val2017.json")["annotations"]
    keys = ("image_id", "category_id", "bbox")
    right = [{**{key: a[key] for key in keys}, "score": 0.99} for a in truth]
    # As if this run had learnt something.
    path = work / "other_run" / "inference" / "coco_val" / "coco_instances_results.json"
    path.write_text(json.dumps(read(path) + right))
    words = ("--output", "compared.html", "--resamples", "100")
    printed = call("stageinteractor", "compare", "coco_run", "other_run", *words)
    numbers = read(work / "compared.json")
    assert [Path(numbers[key]["folder"]).name for key in "AB"] == ["coco_run", "other_run"]
    assert (numbers["images"], numbers["objects"]) == (2, 4)
    ap = numbers["overall"]["AP"]
    assert ap["A"] < 50 and ap["B"] == pytest.approx(100)
    assert numbers["answer"].startswith("Yes: B is better") and numbers["answer"] in printed
    page = (work / "compared.html").read_text()
    assert "coco_run, coco_run/model_final.pth" in page and "other_run, iteration 3" in page
    assert "Yes: B is better" in page


@pytest.mark.slow
def test_an_installed_view_draws_what_training_sees(call, runs, work):
    words = ("--config-file", "yolo_run/config.yaml", "--number", "3", "--output", "seen")
    assert "index.html shows them all" in call("stageinteractor", "view", "data", *words)
    names = {path.name for path in (work / "yolo" / "images" / "train").iterdir()}
    drawn = sorted(path.name for path in (work / "seen").glob("*.png"))
    assert len(drawn) == 3 and {name.partition("_")[2] for name in drawn} <= names
    page = (work / "seen" / "index.html").read_text()
    assert page.count("data:image/") == 3 and "2 objects" in page


@pytest.mark.slow
def test_an_installed_convert_writes_the_same_boxes(call, work):
    printed = call("stageinteractor", "convert", "data", "yolo", "converted", "--to", "coco")
    assert "4 train images, 2 val images with 12 boxes of 3 classes" in printed
    for split, name in (("train", "instances_train2017"), ("val", "instances_val2017")):
        ours = read(work / "converted" / "annotations" / f"instances_{split}.json")
        theirs = read(work / "coco" / "annotations" / f"{name}.json")
        boxes = []
        for document in (ours, theirs):
            classes = {c["id"]: c["name"] for c in document["categories"]}
            files = {image["id"]: image["file_name"] for image in document["images"]}
            boxes.append(
                sorted(
                    (Path(files[a["image_id"]]).name, classes[a["category_id"]], *a["bbox"])
                    for a in document["annotations"]
                )
            )
        assert [b[:2] for b in boxes[0]] == [b[:2] for b in boxes[1]]
        for box, expected in zip(*boxes):
            assert box[2:] == pytest.approx(expected[2:], abs=1e-3)
        assert (work / "converted" / "images" / split / f"{split}1.png").is_file()
