"""The report of a device: at toy size on a CPU, and with processes that hang, crash and fail."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gpu_report
import patience
import pytest
import torch
from patience import PATIENCE, wait_until
from unpack_wheels import main as unpack_main
from unpack_wheels import misfit, unpack

from detection_toolkit.errors import UserError
from detection_toolkit.studies.environment import ROOT
from detection_toolkit.studies.gpu_report import (
    STAGES,
    GpuPlan,
    short_table,
    supervise,
    supervisor,
)
from detection_toolkit.studies.gpu_report.context import Row, rows_of
from detection_toolkit.studies.gpu_report.stages.correct import differences, sampled

PLANS = ROOT / "configs" / "gpu"


@pytest.mark.slow
def test_the_whole_report_at_toy_size_on_a_cpu(tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--minutes", "600", "--output", str(tmp_path)]
    status = gpu_report.main(arguments)
    printed = capsys.readouterr().out
    log = (tmp_path / "log.txt").read_text()
    assert status == 0, printed + log
    report = json.loads((tmp_path / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == list(gpu_report.NAMES)
    assert all(stage["status"] == "done" and stage["rows"] for stage in report["stages"])
    rows = {row["name"]: row for stage in report["stages"] for row in stage["rows"]}
    assert rows["tiny, gather, losses and gradients"]["ok"]
    assert rows["train_basic, gather"]["values"]["failing"] == 0
    assert rows["tiny, inference, batch 1, float32, gather"]["values"]["ms"] > 0
    assert rows["tiny, training step, batch 2, bfloat16, gather"]["values"]["memory (MiB)"] > 0
    assert rows["training from scratch, bfloat16"]["values"]["AP"] is not None
    assert rows["tiny, two runs with train.deterministic=true"]["values"]["different"] == 0
    page = (tmp_path / "report.md").read_text()
    assert all(name in page for name in rows)
    assert "| repeats | done | 1 of 1 hold |" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line():
    with pytest.raises(SystemExit, match=r"^error: PyTorch finds no GPU here[^\n]*$"):
        gpu_report.main([])


def test_the_command_and_the_package_name_the_same_stages():
    assert tuple(STAGES) == gpu_report.NAMES
    assert sum(stage.share for stage in STAGES.values()) == pytest.approx(1)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_can_be_read_and_their_configs_exist(path):
    plan = GpuPlan.read(path)
    assert plan.case_files()
    for named in (*plan.models, plan.training, plan.loop, plan.exported):
        assert named.load().model.execution.sampling == "auto"


@pytest.mark.parametrize(
    "change, message",
    [
        (("rounds: 1", "round: 1"), r"unknown keys \['round'\], missing keys \['rounds'\]"),
        (("config: stage", "configs: stage"), "needs a config"),
    ],
)
def test_a_plan_with_a_wrong_key_is_refused(change, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text((PLANS / "small.yaml").read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        GpuPlan.read(path)


# A process in the place of the worker, which tells of its stages as that does.
WORKER = """
import json, os, sys, time
stages, events, wanted = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
def tell(**content):
    with open(events, "a") as file:
        file.write(json.dumps(content) + "\\n")
for name in stages:
    tell(event="begin", stage=name)
    tell(event="row", stage=name, row=dict(name="a row", values={"ms": 1.5}, ok=True, note=""))
    what = wanted.get(name)
    if what == "hang":
        time.sleep(3600)
    if what == "crash":
        print("out of its mind")
        os._exit(3)
    if what == "fail":
        tell(event="end", stage=name, status="failed", reason="ValueError: no")
        sys.exit(1)
    tell(event="end", stage=name, status="done", reason="")
"""


def run_stages(folder, wanted, **kwargs):
    def command(names, seconds, events):
        assert seconds <= kwargs["seconds"]
        return [sys.executable, "-c", WORKER, json.dumps(names), str(events), json.dumps(wanted)]

    kwargs = {"seconds": 60, "output": folder, "facts": {"machine": "a test"}, **kwargs}
    return supervise(command, list(STAGES), **kwargs)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """The supervisor's: time passes while a stage hangs alone, however slow the machine is."""
    clock = SimpleNamespace(now=0.0, hanging=None)
    events = tmp_path / "events.jsonl"

    def sleep(seconds):
        time.sleep(seconds / 10)
        lines = events.read_text().splitlines() if events.exists() else []
        if (
            lines
            and lines[-1].startswith('{"event": "row"')
            and json.loads(lines[-1])["stage"] == clock.hanging
        ):
            clock.now += 1.0

    instead = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(supervisor, "time", instead)
    return clock


def test_what_hangs_crashes_or_fails_leaves_the_other_stages_alone(tmp_path, clock):
    wanted = {"correct": "crash", "fast": "hang", "repeats": "fail"}
    clock.hanging = "fast"
    reports = run_stages(tmp_path, wanted)
    assert reports[1].seconds == pytest.approx(reports[1].limit, abs=1)
    assert [report.status for report in reports] == [
        "crashed", "ended by its time limit", "done", "failed", "done",
    ]  # fmt: skip
    assert all(len(report.rows) == 1 for report in reports)
    assert "exit code 3: out of its mind" in reports[0].reason
    assert [report.passed for report in reports] == [False, False, True, False, True]
    document = json.loads((tmp_path / "report.json").read_text())
    assert [stage["status"] for stage in document["stages"]] == [r.status for r in reports]
    table = short_table(document["stages"])
    assert "| fast | ended by its time limit | 1 of 1 hold | 1 |" in table
    assert "repeats: ValueError: no" in table


def test_a_stage_has_what_earlier_ones_have_left_over(tmp_path, clock):
    reports = run_stages(tmp_path, {})
    assert reports[-1].limit == 60  # its own share would be four
    assert [report.status for report in reports] == ["done"] * 5


def test_a_run_that_is_ended_from_outside_still_reports(tmp_path):
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_gpu_report import run_stages
run_stages(Path({str(tmp_path)!r}), {{"fast": "hang"}}, seconds={100 * PATIENCE})
"""
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    process = patience.start([sys.executable, "-c", script], env=environment)
    report = tmp_path / "report.json"
    wait_until(
        report.exists,
        "the first stage",
        process=process,
        output=lambda: patience.killed(process),
    )
    process.send_signal(signal.SIGTERM)
    (text,) = patience.outputs(process)
    stages = json.loads(report.read_text())["stages"]
    assert len(stages) == 5, text
    assert stages[0]["status"] == "done" and stages[0]["rows"]
    assert [stage["status"] for stage in stages[1:]] == ["interrupted"] * 4


def test_a_measurement_that_fails_is_a_row_and_a_lost_device_an_error():
    def fails(message):
        yield Row("first")
        raise RuntimeError(message)

    first, second = rows_of("name", lambda: fails("out of\nmemory"))
    assert (first.name, second.name) == ("first", "name")
    assert second.ok is False and second.note == "RuntimeError: out of memory"
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(rows_of("name", lambda: fails("CUDA error: an illegal memory access")))


def test_differences_are_relative_and_see_what_is_not_a_number():
    reference = {"loss": torch.tensor(2.0), "gradient of w": torch.tensor([3.0, 4.0])}
    ours = {"loss": torch.tensor(2.0), "gradient of w": torch.tensor([3.0, 4.5])}
    assert differences(ours, reference) == (pytest.approx(0.1), "gradient of w")
    worst, where = differences({**ours, "loss": torch.tensor(float("nan"))}, reference)
    assert not worst <= 1 and where == "loss"
    with pytest.raises(ValueError, match="gradient of v"):
        differences({**ours, "gradient of v": torch.zeros(1)}, reference)


def test_gathered_and_plain_sampling_agree_in_the_reports_own_comparison():
    reference = sampled(torch.device("cpu"), "plain", torch.float32)
    worst, _ = differences(sampled(torch.device("cpu"), "gather", torch.float32), reference)
    assert 0 < worst < 1e-4


@pytest.mark.parametrize(
    "name, version, fits",
    [
        ("a-1.0-py3-none-any.whl", (3, 9), True),
        ("a-1.0-py3-none-manylinux2014_x86_64.whl", (3, 11), True),
        ("a-1.0-cp310-none-any.whl", (3, 12), True),  # Python files only
        ("a-1.0-cp312-abi3-manylinux_2_17_x86_64.whl", (3, 11), False),
        ("a-1.0-cp312-abi3-manylinux_2_17_x86_64.whl", (3, 12), True),
        ("a-1.0-cp312-abi3-manylinux_2_17_x86_64.whl", (3, 13), True),
        ("a-1.0-cp312-cp312-manylinux_2_17_x86_64.whl", (3, 13), False),
    ],
)
def test_wheels_that_python_cannot_load_are_known_by_their_names(name, version, fits):
    reason = misfit(Path(name), version)
    assert (reason is None) == fits
    assert fits or (name in reason and f"this is Python 3.{version[1]}" in reason)


def test_wheels_are_unpacked_and_nothing_else(tmp_path, capsys):
    wheels, folder = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name, files in {
        "good-1.0-py3-none-any.whl": ("good/__init__.py", "tools/train.py"),
        "other-1.0-cp312-cp312-win32.whl": ("other.py",),
    }.items():
        with zipfile.ZipFile(wheels / name, "w") as archive:
            for file in files:
                archive.writestr(file, "")
    version = sys.version_info[:2]
    left_out = unpack(wheels, folder)
    assert (folder / "good" / "__init__.py").is_file() and not (folder / "tools").exists()
    if version != (3, 12):
        assert len(left_out) == 1 and not (folder / "other.py").exists()
        assert unpack_main([str(wheels), str(tmp_path / "new")]) == 0
        assert "left out: other-1.0-cp312-cp312-win32.whl is for cp312" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no wheels"):
        unpack(tmp_path / "none", folder)


def test_the_command_empties_no_folder_that_holds_something(tmp_path, capsys):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "good-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("good.py", "")
    precious = tmp_path / "site" / "index.html"
    precious.parent.mkdir()
    precious.write_text("precious")
    assert unpack_main([str(tmp_path / "wheels"), str(precious.parent)]) == 1
    assert precious.read_text() == "precious"
    assert "is not an empty folder: name a new one" in capsys.readouterr().err
