"""``compare`` on evaluations of real runs: what it says, its page, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from small_runs import make_config
from user_commands import call

from detection_toolkit.commands import main
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.results import PREDICTIONS, read_results
from detection_toolkit.evaluation.stage_predictions import (
    STAGE_PREDICTIONS,
    read_stage_predictions,
)
from detection_toolkit.visualization.report_charts import chart_resamples

HEADINGS = ["Is B better than A?", "Classes", "Stages", "Images"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Output folder of a run that was evaluated by stage, on 24 images."""
    folder = tmp_path_factory.mktemp("run")
    cfg = prepare_config(make_config(folder, "train.stage_evaluation=true", num_images=24))
    model = Trainer.build_model(cfg).eval()
    Trainer.test(cfg, model)
    output = Path(cfg.train.output_dir)
    LazyConfig.save(cfg, str(output / "config.yaml"))
    return output


def add_right_ones(run, share):
    """So many of the objects are found, besides what the untrained detector says."""
    (path,) = run.glob(f"inference/*/{PREDICTIONS}")
    truth = json.loads((run.parent / "data" / "annotations.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    rng = np.random.default_rng(0)
    right = [{**{k: a[k] for k in keys}, "score": 0.99} for a in truth if rng.random() < share]
    path.write_text(json.dumps(json.loads(path.read_text()) + right))


@pytest.fixture
def runs(evaluated, tmp_path):
    """Two runs on one data set, of which the second finds more."""
    targets = []
    for name, share in (("worse", 0.4), ("better", 0.8)):
        shutil.copytree(evaluated.parent, tmp_path / name)
        target = tmp_path / name / "output"
        add_right_ones(target, share)
        targets.append(target)
    return targets


def compare(runs, output, *options):
    return main(["compare", *map(str, runs), "--output", str(output), *options])


def ended_by(runs, output, *options):
    with pytest.raises(SystemExit) as ended:
        compare(runs, output, *options)
    text = str(ended.value.code)
    assert text.startswith("error: ") and "\n" not in text
    assert not output.exists() and not output.with_suffix(".json").exists()
    return text


def test_the_better_run_is_named_in_the_terminal_on_the_page_and_in_the_numbers(
    runs, tmp_path, capsys
):
    output = tmp_path / "page.html"
    assert compare(runs, output, "--resamples", "200") == 0
    shown = capsys.readouterr().out
    assert "Yes: B is better than A on these 24 images: AP " in shown
    for word in ("A: ", "AP50", "AP, stage 3", "AP, bird", str(output)):
        assert word in shown
    page = output.read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == HEADINGS
    assert "Yes: B is better" in page
    sources = re.findall(r"(?:src|href)=['\"](.{11})", page)
    assert len(sources) >= 6 and set(sources) == {"data:image/"}
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["verdict"]["answer"] == "B" and numbers["images"] == 24
    assert numbers["overall"]["AP"]["interval"][0] > 0
    assert numbers["overall"]["APl"] is None  # there is no large object
    assert len(numbers["resampled"]) == 200
    # Both have the same stages: what was added is in neither of them.
    assert [row["AP"]["difference"] for row in numbers["stages"]] == [0, 0, 0]

    assert compare(runs[::-1], output, "--resamples", "200", "--images", "0") == 0
    assert "No: A is better than B" in capsys.readouterr().out
    back = json.loads(output.with_suffix(".json").read_text())["overall"]["AP"]
    there = numbers["overall"]["AP"]
    assert back["difference"] == -there["difference"]
    assert back["better"] == pytest.approx(1 - there["better"])


def test_the_same_run_twice_is_no_difference(runs, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert compare([runs[0], runs[0]], output) == 0
    assert "No difference: both have AP " in capsys.readouterr().out
    numbers = json.loads(output.with_suffix(".json").read_text())
    for row in (*numbers["overall"].values(), *(c["AP"] for c in numbers["classes"])):
        assert row is None or (row["difference"], row["better"]) == (0, 0.5)


def test_a_run_that_finds_all_where_the_other_finds_nothing(evaluated, tmp_path, capsys):
    """The difference is the same in all resamples, but for rounding."""
    runs = []
    for name, share in (("none", 0), ("all", 2)):
        shutil.copytree(evaluated.parent, tmp_path / name)
        runs.append(tmp_path / name / "output")
        (path,) = runs[-1].glob(f"inference/*/{PREDICTIONS}")
        path.write_text("[]")
        add_right_ones(runs[-1], share)
    first = read_results(next(runs[1].glob(f"inference/*/{PREDICTIONS}")))[0]
    (path,) = runs[0].glob(f"inference/*/{PREDICTIONS}")
    path.write_text(json.dumps([{**first, "bbox": [90, 60, 2, 2]}]))
    assert compare(runs, tmp_path / "page.html", "--images", "0") == 0
    assert "Yes: B is better than A" in capsys.readouterr().out


@pytest.mark.parametrize("differences", [[100.0, 100 - 1e-13, 100.0], [0.0, 0.0], [-3.0, 5.0]])
def test_the_chart_of_the_resamples_needs_no_spread(differences):
    chart = chart_resamples(differences, [differences[0], differences[-1]])
    assert chart.startswith("data:image/svg+xml")


def test_ap_is_that_of_the_evaluation(evaluated, tmp_path):
    output = tmp_path / "page.html"
    assert compare([evaluated, evaluated], output, "--images", "0") == 0
    numbers = json.loads(output.with_suffix(".json").read_text())
    (folder,) = evaluated.glob("inference/*")
    ap = json.loads((folder / "metrics.json").read_text())["results"]["bbox"]
    stages = json.loads((folder / "stage_metrics.json").read_text())["stages"]
    assert numbers["overall"]["AP"]["A"] == pytest.approx(ap["AP"], abs=1e-9)
    assert numbers["overall"]["APs"]["A"] == pytest.approx(ap["APs"], abs=1e-9)
    for ours, theirs in zip(numbers["stages"], stages):
        assert ours["AP"]["A"] == pytest.approx(theirs["AP"], abs=1e-9)
    # The last stage answers.
    last = read_stage_predictions(folder / STAGE_PREDICTIONS)[-1]
    key = lambda r: (r["image_id"], r["category_id"], r["score"], r["bbox"])  # noqa: E731
    assert sorted(map(key, last)) == sorted(map(key, read_results(folder / PREDICTIONS)))


@pytest.mark.slow
def test_a_run_without_an_evaluation_is_evaluated(runs, tmp_path):
    cfg = LazyConfig.load(str(runs[1] / "config.yaml"))
    shutil.rmtree(runs[1] / "inference")
    weights = runs[1] / "model_final.pth"
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, weights)
    (runs[1] / "last_checkpoint").write_text(weights.name)
    # In a process of its own, as users call it: evaluation sets up logs.
    output = tmp_path / "page.html"
    words = ["compare", *map(str, runs), "--output", str(output), "--images", "0"]
    done = call(["-m", "detection_toolkit", *words], tmp_path)
    assert f"{runs[1]} holds no evaluation: it is evaluated now" in done.stdout
    assert output.is_file() and list(runs[1].glob(f"inference/*/{PREDICTIONS}"))


def rewrite(run, change):
    """Change the annotations of a run's test set."""
    path = run.parent / "data" / "annotations.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    cfg = LazyConfig.load(str(run / "config.yaml"))
    for part in ("train", "test"):
        cfg.dataloader[part].dataset.json_file = str(path)
        cfg.dataloader[part].dataset.image_root = str(path.parent / "images")
    LazyConfig.save(cfg, str(run / "config.yaml"))


def drop_an_image(document):
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 1]
    del document["images"][0]


def renumber_classes(document):
    for entry in document["categories"]:
        entry["id"] += 100
    for annotation in document["annotations"]:
        annotation["category_id"] += 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renumber_classes, r"same classes have other ids in their data \(cat: 3 for A, 103 for B"),
        (drop_an_image, r"other images \(A on 24 of \w+, B on 23 of \w+, 23 in both"),
        (lambda d: d["annotations"].pop(), "1 annotations of their test sets differ"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, 4]), "annotations of their test sets"),
        (lambda d: d["categories"][0].update(name="c\x1b[2Jat"), r"classes are others \(bird, cat"),
    ],
)
def test_other_data_cannot_be_compared(runs, tmp_path, change, message):
    rewrite(runs[1], change)
    text = ended_by(runs, tmp_path / "page.html")
    assert re.search(message, text) and text.isprintable()


def test_names_that_a_training_set_had_before(runs, tmp_path):
    """As where each split is in a folder of its own, in files of one name."""
    (folder,) = runs[0].glob("inference/*")
    folder.rename(folder.with_name("annotations_0123abcd"))
    rewrite(runs[0], lambda document: None)
    rewrite(runs[1], lambda document: None)
    assert compare(runs, tmp_path / "page.html", "--images", "0") == 0
    assert main(["report", str(runs[0]), "--images", "0"]) == 0


def test_copies_of_the_same_data_can_be_compared(runs, tmp_path):
    rewrite(runs[1], lambda document: None)
    assert compare(runs, tmp_path / "page.html", "--images", "0") == 0


def test_what_else_is_refused(runs, tmp_path):
    output = tmp_path / "page.html"
    assert "no folder" in ended_by([runs[0], tmp_path / "nowhere"], output)
    assert "must be at least 100" in ended_by(runs, output, "--resamples", "3")
    assert "--seed must be 0 or more" in ended_by(runs, output, "--seed", "-1")
    assert "has no results of other" in ended_by(runs, output, "--dataset", "other")
    with pytest.raises(SystemExit, match="must end in .html"):
        compare(runs, tmp_path / "page.png")
    (results,) = runs[0].glob("inference/*")
    shutil.copytree(results, results.with_name("second"))
    assert "no folder" in ended_by([runs[0], tmp_path / "nowhere"], output)
    shutil.copytree(results, results.with_name("third"))
    shutil.move(results, tmp_path / "results")
    said = "has results of second, third, and .* of .*: evaluate both on the same data, .* --data P"
    assert re.search(said, ended_by(runs, output))
    shutil.rmtree(results.parent)
    shutil.move(tmp_path / "results", results)
    (metrics,) = runs[1].glob("inference/*/metrics.json")
    document = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({**document, "max_dets_per_image": 300}))
    assert "100 detections an image counted for" in ended_by(runs, output)
    metrics.write_text(json.dumps(document))
    (path,) = runs[1].glob(f"inference/*/{PREDICTIONS}")
    path.write_text("[")
    assert "is damaged" in ended_by(runs, output)


def test_damaged_predictions_of_stages_are_named(runs, tmp_path):
    (path,) = runs[0].glob(f"inference/*/{STAGE_PREDICTIONS}")
    with np.load(path) as file:
        arrays = dict(file)
    for key, value in (
        ("stages", arrays["stages"] + 1),
        ("image", arrays["image"] + 1000),
        ("score", arrays["score"] * np.nan),
        ("box", arrays["box"][1:]),
        ("images", np.array(["{"] * len(arrays["images"]))),
        ("images", np.array([object()])),
    ):
        np.savez(path, **{**arrays, key: value})
        text = ended_by(runs, tmp_path / "page.html")
        assert f"{STAGE_PREDICTIONS} is damaged" in text, key
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is damaged"):
        read_stage_predictions(path)


def test_names_of_strangers_do_no_harm(runs, tmp_path, capsys):
    for run in runs:
        rewrite(run, lambda d: d["categories"][0].update(name="<script>x\x1b[2J</script>"))
    output = tmp_path / "page.html"
    assert compare(runs, output, "--images", "0") == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "<script>" not in output.read_text()
