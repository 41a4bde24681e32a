"""AP and milliseconds where a detector ends."""

import json

import analyze_model
import pytest
import torch
from coco_files import make_document
from small_runs import make_batch, make_detector, run_overrides

from detection_toolkit.studies import stage_costs
from detection_toolkit.studies.stage_costs import StageCosts, stage_table, time_stages


def test_each_number_of_stages_is_timed_and_the_limit_is_as_before(monkeypatch):
    detector = make_detector().eval()
    detector.decoder.limit_stages_at_test(2)
    run, found = type(detector.decoder).forward, []

    def note(self, maps, queries):
        outputs = run(self, maps, queries)
        found.append(len(outputs))
        return outputs

    monkeypatch.setattr(type(detector.decoder), "forward", note)

    # Each pass takes as many seconds as stages: two batches of three images in all.
    def alternate(runs, **_):
        return {name: run() or float(name) for name, run in runs.items()}

    monkeypatch.setattr(stage_costs, "alternate", alternate)
    times = time_stages(detector, [make_batch([1, 1]), make_batch([1])])
    assert found == [1, 1, 2, 2, 3, 3]
    assert times == pytest.approx([1000 / 3, 2000 / 3, 1000])
    assert detector.decoder.num_stages_at_test == 2


def test_the_table_compares_with_all_stages():
    metrics = {"AP": 50.0, "AP50": 60.0, "AP75": None}
    text = stage_table([StageCosts(1, 5.0, metrics), StageCosts(2, 10.0, metrics)])
    first, last = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]
    )
    assert first == ["model.stages_at_test=1", "50.0", "60.0", "-", "5.00", "2.00"]
    assert last[0] == "model.stages_at_test=2" and last[-1] == "1.00"


@pytest.mark.slow
def test_the_tool_prints_a_row_for_each_number_of_stages(tmp_path, capsys):
    weights, path = tmp_path / "weights.pth", tmp_path / "costs.json"
    torch.save({"model": make_detector().float().state_dict()}, weights)
    document = make_document(2)
    document["categories"] += [{"id": i, "name": f"class {i}"} for i in (91, 92, 93)]
    overrides = run_overrides(tmp_path, document=document)
    config = ["--config-file", "stageinteractor/shapes_tiny.py"]
    options = ["--by-stage", *config, "--json", str(path)]
    assert analyze_model.main([*options, *overrides, f"train.init_checkpoint='{weights}'"]) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if "model.stages_at_test=" in x]
    assert len(rows) == 3
    costs = json.loads(path.read_text())
    assert [x["stages"] for x in costs] == [1, 2, 3]
    assert all(x["milliseconds"] > 0 and x["metrics"]["AP"] is not None for x in costs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stageinteractor/shapes_tiny.py", "adamixer/adamixer_shapes_tiny.py"], "one config"),
        (["dfvt/mask_rcnn_dfvt_tiny_1x.py", "train.init_checkpoint=x.pth"], "has no cascade"),
    ],
)
def test_what_has_no_single_cascade_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        analyze_model.main(["--by-stage", "--config-file", *arguments])
    assert message in f"{error.value} {capsys.readouterr().err}"
