"""A report of a real evaluation: self-contained, and its numbers are the evaluation's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import report
from detectron2.config import LazyConfig
from small_runs import make_config

from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.results import PREDICTIONS, register_dataset

TESTS = Path(__file__).resolve().parents[2]

HEADINGS = ["Metrics", "Training", "Stages", "Fading and growing", "Label instability"]
HEADINGS += ["Classes and sizes", "Precision and recall", "Errors", "Confusion", "Calibration"]
HEADINGS += ["Worst images", "Best images"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Output folder of an evaluation by stage, with some detections that are right."""
    folder = tmp_path_factory.mktemp("run")
    cfg = prepare_config(make_config(folder, "train.stage_evaluation=true"))
    Trainer.test(cfg, Trainer.build_model(cfg).eval())
    output = Path(cfg.train.output_dir)
    LazyConfig.save(cfg, str(output / "config.yaml"))
    (path,) = output.glob(f"inference/*/{PREDICTIONS}")
    truth = json.loads((folder / "data" / "annotations.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    right = [{**{k: a[k] for k in keys}, "score": 0.8} for a in truth[:-1]]
    path.write_text(json.dumps(json.loads(path.read_text()) + right))
    return output


@pytest.fixture
def run(evaluated, tmp_path):
    target = tmp_path / "output"
    shutil.copytree(evaluated, target)
    return target


def test_the_page_needs_nothing_else_and_has_every_part(run):
    lines = [
        {"iteration": i, "total_loss": 5.0 - i, "loss_cls": 1.0, "bbox/AP": 10.0 * i}
        for i in range(3)
    ]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == HEADINGS
    assert "No training was recorded" not in page
    sources = re.findall(r"(?:src|href)=['\"](.{11})", page)
    assert len(sources) > 10 and set(sources) == {"data:image/"}

    numbers = json.loads((run / "report.json").read_text())
    assert numbers["weights"] == "plain" and "Of the plain weights." in page
    assert numbers["images"] == 4 and numbers["objects"] == 8
    assert numbers["coco"]["overall"]["AP"] > 50
    assert numbers["coco"]["overall"]["AP50"] == pytest.approx(numbers["ap50"])
    assert [c["class"] for c in numbers["coco"]["classes"]] == ["cat", "dog", "bird"]
    assert len(numbers["stages"]["stages"]) == 3
    assert sum(map(sum, numbers["confusion"][:-1])) == 8


def test_without_stages_and_training_the_rest_is_reported(run):
    (stage_file,) = run.glob("inference/*/stage_metrics.json")
    stage_file.unlink()
    assert report.main([str(run), "--images", "0"]) == 0
    page = (run / "report.html").read_text()
    assert "Not evaluated by stage" in page and "No training was recorded" in page
    assert json.loads((run / "report.json").read_text())["stages"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "is empty: the detector found nothing"),
        ("[{", "is damaged"),
        ('[{"image_id": 99, "category_id": 3, "bbox": [0,0,1,1], "score": 1}]', "does not belong"),
        ('{"a": 1}', "is no list of detections, each with image_id"),
        ('[{"image_id": 1}]', "is no list of detections"),
        ('[{"image_id": 1, "category_id": 3, "bbox": [0,0,1,NaN], "score": 1}]', "is no list of"),
        (None, "holds no evaluation"),
    ],
)
def test_a_bad_evaluation_is_one_line_and_nothing_is_written(run, content, message):
    (path,) = run.glob(f"inference/*/{PREDICTIONS}")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SystemExit, match=message) as ended:
        report.main([str(run)])
    assert "\n" not in str(ended.value)
    assert not list(run.glob("report.*"))


def test_config_of_an_older_run_is_understood(tmp_path):
    """Its names of what was moved are followed; it just has another data set."""
    shutil.copy(TESTS / "data" / "older_run" / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="no_such_set is not registered, and .* not describe it"):
        register_dataset(tmp_path, "no_such_set")


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": []}'])
def test_damaged_metrics_by_stage_are_named(run, content):
    (path,) = run.glob("inference/*/stage_metrics.json")
    path.write_text(content)
    with pytest.raises(SystemExit, match="stage_metrics.json is no evaluation by stage"):
        report.main([str(run)])


def test_wrong_names(run, tmp_path):
    with pytest.raises(SystemExit, match="no folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="has no results of coco"):
        report.main([str(run), "--dataset", "coco"])
    (path,) = run.glob("inference/*")
    shutil.copytree(path, run / "inference" / "other")
    with pytest.raises(SystemExit, match="choose one with --dataset"):
        report.main([str(run)])


def test_hotcoco_agrees_where_it_is_installed(run):
    pytest.importorskip("hotcoco")
    numbers = []
    for backend in ("pycocotools", "hotcoco"):
        assert report.main([str(run), "--backend", backend, "--images", "0"]) == 0
        numbers.append(json.loads((run / "report.json").read_text())["coco"])
    assert numbers[0]["overall"] == pytest.approx(numbers[1]["overall"], abs=1e-6)
