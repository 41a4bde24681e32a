"""A report of a real evaluation: self-contained, and its numbers are the evaluation's."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import report
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from error_cases import make_mixed_case
from small_runs import make_config

from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.results import PREDICTIONS, register_dataset

TESTS = Path(__file__).resolve().parents[2]

HEADINGS = ["Summary", "Training", "Stages", "Classes and sizes", "Scores", "Errors"]
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
    assert "<td>1</td><td>10.0</td><td>–</td>" in page  # of the evaluations
    sources = re.findall(r"(?:src|href)=['\"](.{11})", page)
    assert len(sources) > 10 and set(sources) == {"data:image/"}

    numbers = json.loads((run / "report.json").read_text())
    assert numbers["weights"] == "plain"
    assert numbers["images"] == 4 and numbers["objects"] == 8
    assert numbers["coco"]["overall"]["AP"] > 50
    assert numbers["coco"]["overall"]["AP50"] == pytest.approx(numbers["ap50"])
    best = numbers["coco"]["best_threshold"]
    assert best["score"] == pytest.approx(0.8) and best["precision"] == 1
    assert best["recall"] == pytest.approx(7 / 8) and best["f1"] == pytest.approx(14 / 15)
    assert [c["class"] for c in numbers["coco"]["classes"]] == ["cat", "dog", "bird"]
    assert len(numbers["stages"]["stages"]) == 3
    assert sum(map(sum, numbers["confusion"][:-1])) == 8
    assert numbers["validation_loss"]["stage2/giou"] > 0


def test_without_stages_and_training_the_rest_is_reported(run):
    (stage_file,) = run.glob("inference/*/stage_metrics.json")
    stage_file.unlink()
    (metrics_file,) = run.glob("inference/*/metrics.json")
    metrics_file.unlink()
    assert report.main([str(run), "--images", "0"]) == 0
    page = (run / "report.html").read_text()
    assert "Not evaluated by stage" in page and "No training was recorded" in page
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["stages"] is None and numbers["validation_loss"] is None


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


def test_the_folder_of_runs_is_none_and_names_them(run):
    with pytest.raises(SystemExit, match=f"is not the folder of a run; those in it are {run}$"):
        report.main([str(run.parent)])


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
    pytest.importorskip("hotcoco", minversion="1.2")
    numbers = []
    for backend in ("pycocotools", "hotcoco"):
        assert report.main([str(run), "--backend", backend, "--images", "0"]) == 0
        numbers.append(json.loads((run / "report.json").read_text()))
    one, other = (n["coco"] for n in numbers)
    assert one["overall"] == pytest.approx(other["overall"], abs=1e-6)
    assert one["best_threshold"] == pytest.approx(other["best_threshold"])
    assert numbers[0]["worst_images"] == numbers[1]["worst_images"]


def test_without_hotcoco_the_report_says_what_is_left_out(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == HEADINGS
    assert page.count("Left out: hotcoco is not installed: pip install") == 2
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["ap50_gains"] is numbers["confusion"] is None
    assert numbers["coco"]["best_threshold"]["f1"] == pytest.approx(14 / 15)
    with pytest.raises(SystemExit, match="hotcoco is not installed: pip install"):
        report.main([str(run), "--backend", "hotcoco"])


@pytest.fixture
def mixed(tmp_path):
    """Output folder of an evaluation with errors of every kind."""
    output = tmp_path / "mixed"
    folder = output / "inference" / "mixed_errors"
    folder.mkdir(parents=True)
    truth, results = make_mixed_case()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (folder / PREDICTIONS).write_text(json.dumps(results))
    register_coco_instances("mixed_errors", {}, str(tmp_path / "truth.json"), str(tmp_path))
    yield output
    DatasetCatalog.remove("mixed_errors")
    MetadataCatalog.remove("mixed_errors")


def test_kinds_of_errors_are_those_of_hotcoco(mixed):
    hotcoco = pytest.importorskip("hotcoco", minversion="1.2")
    assert report.main([str(mixed), "--images", "0"]) == 0
    numbers = json.loads((mixed / "report.json").read_text())
    truth, results = make_mixed_case()
    objects = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(objects, objects.loadRes(results), "bbox")
    evaluation.evaluate()
    expected = evaluation.tide_errors()
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    assert list(numbers["ap50_gains"].values()) == pytest.approx(
        [100 * expected["delta_ap"][name] for name in names], abs=1e-3
    )
    assert all(expected["counts"].values())  # every kind is there
    assert numbers["calibration_error"] == pytest.approx(evaluation.calibration()["ece"])
    matrix = evaluation.confusion_matrix(min_score=numbers["score_threshold"])["matrix"]
    assert numbers["confusion"] == matrix.tolist()


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_as_many_detections_count_as_in_the_evaluation(mixed, backend):
    if backend == "hotcoco":
        pytest.importorskip("hotcoco", minversion="1.2")
    folder = mixed / "inference" / "mixed_errors"
    truth, results = make_mixed_case()
    first = truth["annotations"][0]
    wrong = {"image_id": 1, "category_id": first["category_id"], "bbox": [190, 190, 5, 5]}
    right = {**wrong, "bbox": first["bbox"], "score": 0.01}
    crowded = [{**wrong, "score": 0.99 - 1e-3 * i} for i in range(120)]
    (folder / PREDICTIONS).write_text(json.dumps([*crowded, right]))
    recalls = {}
    for limit in (None, 150):
        (folder / "metrics.json").write_text(json.dumps({"max_dets_per_image": limit}))
        assert report.main([str(mixed), "--images", "0", "--backend", backend]) == 0
        numbers = json.loads((mixed / "report.json").read_text())
        overall = numbers["coco"]["overall"]
        assert overall["AP50"] == pytest.approx(numbers["ap50"])
        recalls[limit] = overall[f"AR{limit or 100}"]
    assert recalls[None] == 0 < recalls[150]


def test_the_summary_says_what_was_evaluated_and_how_good_it_is(mixed):
    (mixed / "config.yaml").write_text(
        "# my/config.py optimizer.lr=1 'train.name=a\\nb<c>'\na: 1\n"
    )
    facts = {"checkpoint": "my/model.pth", "weights": "averaged", "date": "2026-01-02T03:04+00:00"}
    (mixed / "inference" / "mixed_errors" / "metrics.json").write_text(json.dumps(facts))
    assert report.main([str(mixed), "--images", "0"]) == 0
    page = (mixed / "report.html").read_text()
    for part in (
        "<dd>my/config.py optimizer.lr=1 &#x27;train.name=a\nb&lt;c&gt;&#x27;</dd>",
        "<dd>my/model.pth (the averaged ones)</dd>",
        "<dd>mixed_errors: 30 images, 120 objects, 155 detections</dd>",
        "<dd>2026-01-02 03:04+00:00</dd>",
    ):
        assert part in page
    (words,) = re.findall("<p class='words'>(.*?)</p>", page)
    numbers = json.loads((mixed / "report.json").read_text())
    overall, best = numbers["coco"]["overall"], numbers["coco"]["best_threshold"]
    assert f"the averaged weights have an AP of {overall['AP']:.1f}" in words
    assert f"{best['score']:.2f} suits best" in words
    assert "Most AP50 is lost to boxes that are badly placed (12.7 points)" in words


def test_without_facts_the_summary_says_so(mixed):
    assert report.main([str(mixed), "--images", "0"]) == 0
    page = (mixed / "report.html").read_text()
    assert "<dd>not written down</dd>" in page and "<dd>at a time not written down</dd>" in page
    numbers = json.loads((mixed / "report.json").read_text())
    assert [numbers[k] for k in ("config", "checkpoint", "weights", "date")] == [None] * 4
