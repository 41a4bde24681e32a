"""Cells are trained once, go on where they were stopped, fail alone; wrong plans are refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import patience
import pytest
import run_ablation
import torch
from patience import wait_until
from run_ablation import main

from detection_toolkit.config import config_text, find_config_file, get_config
from detection_toolkit.errors import UserError
from detection_toolkit.studies import costs, run
from detection_toolkit.studies.costs import measure, random_batch
from detection_toolkit.studies.environment import ROOT
from detection_toolkit.studies.plan import Plan, load_plan
from detection_toolkit.studies.results import check_results
from detection_toolkit.studies.steps import call_in_process
from detection_toolkit.studies.tables import render_for_page

CONFIG = "stageinteractor/shapes_hard.py"
VARIANTS = {"default": (), "more": ("train.log_period=1",)}
PLANS = sorted(Path(find_config_file("ablations/smoke.yaml")).parent.glob("*.yaml"))


def arguments(output, *, seeds=(1, 2, 3), variants=VARIANTS, opts=("train.max_iter=4",)):
    args = ["--config-file", CONFIG, "--output", str(output), "--seeds", *map(str, seeds)]
    for name, overrides in variants.items():
        args += ["--variant", name, *overrides]
    return args, ["--opts", *opts]


def call(output, *extra, **plan):
    before, after = arguments(output, **plan)
    return main([*before, *extra, *after])


@pytest.mark.parametrize(
    "argv",
    [
        ["a.b=1", "--variant", "x", "--variant", "y", "c.d=2", "e=3", "--seeds", "1", "f.g=4"],
        ["--variant=x", "--variant=y", "c.d=2", "e=3", "--seeds", "1", "a.b=1", "f.g=4"],
        [
            "--variant",
            "x",
            "--variant",
            "y",
            "c.d=2",
            "e=3",
            "--seeds",
            "1",
            "--opts",
            "a.b=1",
            "f.g=4",
        ],
    ],
)
def test_what_follows_a_variant_is_its_own_and_the_rest_the_base_configs(argv):
    args = run_ablation.parse_args(argv)
    assert args.variant == [["x"], ["y", "c.d=2", "e=3"]]
    assert args.opts == ["a.b=1", "f.g=4"] and args.seeds == [1]


def test_a_variant_has_a_name(capsys):
    with pytest.raises(SystemExit):
        run_ablation.parse_args(["--variant", "--report"])
    assert "--variant: expected a name" in capsys.readouterr().err


def calls(output):
    return {
        f"{file.parents[1].name}/{file.parent.name}": file.read_text().splitlines()
        for file in output.glob("*/*/calls.txt")
    }


def refuse(capsys, output, *extra, **plan):
    """What a refused call says: one line, exit code 1."""
    with pytest.raises(SystemExit) as error:
        call(output, *extra, **plan)
    assert str(error.value.code).startswith("error: ")
    assert not list(output.glob("*/*/calls.txt"))
    return str(error.value.code)


def test_cells_are_trained_once_and_compared(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, opts=("train.max_iter=4", "train.stage_evaluation=true")) == 0
    results = json.loads((output / "results.json").read_text())
    assert [(c["variant"], c["seed"], c["status"]) for c in results["cells"]] == [
        (name, seed, "finished") for name in VARIANTS for seed in (1, 2, 3)
    ]
    cell = results["cells"][0]
    assert cell["metrics"]["AP"] == 11 and cell["curve"] == [[2, 1.0], [4, 11.0]]
    assert cell["class_curves"] == {"cat": [[4, 5.5]]}
    assert cell["seconds_per_step"] == 0.375 and cell["peak_memory_mb"] > 0
    assert cell["commit"] and cell["versions"]["torch"] and cell["machine"]["cpu_cores"]

    summary = results["summary"]
    assert summary["variants"]["default"]["AP"] == {
        "mean": 12.0,
        "std": 1.0,
        "values": [11.0, 12.0, 13.0],
    }
    assert [s["mean"] for s in summary["variants"]["default"]["AP_by_stage"]] == [11.0, 12.0]
    (difference,) = summary["differences_of_AP"]
    assert (difference["from"], difference["to"]) == ("default", "more")
    assert difference["values"] == pytest.approx([2.1, 2.2, 2.3])
    low, high = difference["interval"]
    assert 2.0999 < low < 2.2 < high < 2.3001

    tables = (output / "tables.md").read_text()
    assert "| default |       3 | 12.00 ± 1.00 |" in tables
    assert "| more − default |  +2.20 |" in tables
    assert "APs" not in tables  # measured nowhere
    assert "| more    | 29.13 ± 16.41 | 28.40 ± 2.20 |" in tables.split("AP of each class:")[1]
    assert (output / "convergence.png").stat().st_size > 5000

    before = calls(output)
    assert call(output, opts=("train.max_iter=4", "train.stage_evaluation=true")) == 0
    assert calls(output) == before
    assert "0 cells trained, 6 were finished already" in capsys.readouterr().out


def test_seeds_and_variants_may_be_added(fake_training, tmp_path):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    assert call(output, seeds=[2], variants={**VARIANTS, "most": ("train.log_period=2",)}) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["plan"]["seeds"] == [1, 2]
    assert list(results["summary"]["variants"]) == ["default", "more", "most"]
    assert results["summary"]["variants"]["default"]["seeds"] == [1, 2]
    assert results["summary"]["variants"]["most"]["seeds"] == [2]
    assert results["summary"]["differences_of_AP"][1]["interval"] is None  # of a single seed


def test_the_command_of_a_cell_trains_that_cell(fake_training, tmp_path):
    output = tmp_path / "with space"
    assert call(output, seeds=[3], variants={"default": ("train.log_period=1",)}) == 0
    (cell,) = json.loads((output / "results.json").read_text())["cells"]
    threads, python, *typed = shlex.split(cell["command"])
    assert (threads, python) == ("OMP_NUM_THREADS=1", "python")
    (called,) = calls(output)["default/seed_3"]
    assert typed[1:] == shlex.split(
        called.replace("'", "\\'").replace("with space", "with\\ space")
    )


def test_a_failing_cell_is_reported_with_its_log_and_the_others_go_on(
    fake_training, tmp_path, capsys
):
    output = tmp_path / "out"
    variants = {"broken": ("train.log_period=666",), **VARIANTS}
    assert call(output, variants=variants, seeds=[1]) == 1
    printed = "".join(capsys.readouterr())
    assert "broken, seed 1: FAILED, the training ended with code 1" in printed
    assert f"{output / 'broken' / 'seed_1' / 'output.txt'}" in printed
    assert "no space left on device" in printed
    results = json.loads((output / "results.json").read_text())
    assert [c["status"] for c in results["cells"]] == ["failed", "finished", "finished"]
    assert list(results["summary"]["variants"]) == ["default", "more"]
    assert "**not finished**: broken seed 1" in (output / "tables.md").read_text()
    # Tried again the next time, from its checkpoint.
    assert call(output, variants=variants, seeds=[1]) == 1
    first, second = calls(output)["broken/seed_1"]
    assert second == f"--resume {first}"


def test_where_all_cells_fail_there_is_no_report(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, variants={"broken": ("train.log_period=666",)}, seeds=[1]) == 1
    assert not (output / "tables.md").exists()


def test_an_interrupted_cell_goes_on(fake_training, tmp_path, monkeypatch):
    output = tmp_path / "out"
    variants = {"slow": ("train.log_period=777",)}

    def interrupt(folder, steps_done=run._steps_done):
        if (folder / "last_checkpoint").exists():
            raise KeyboardInterrupt
        return steps_done(folder)

    monkeypatch.setattr(run, "_steps_done", interrupt)
    with pytest.raises(SystemExit) as ended:
        call(output, variants=variants, seeds=[1])
    assert ended.value.code == 130
    folder = output / "slow" / "seed_1"
    assert (folder / "ended.txt").read_text() == "SIGTERM"  # it did not sleep to its end
    assert json.loads((folder / "cell.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    monkeypatch.setattr(run, "ROOT", fake_training)
    assert call(output, variants=variants, seeds=[1]) == 0
    assert [c.startswith("--resume") for c in calls(output)["slow/seed_1"]] == [False, True]
    assert "interrupted and resumed: slow seed 1" in (output / "tables.md").read_text()


def test_ctrl_c_lets_the_training_write_its_checkpoint(fake_training, tmp_path):
    """A terminal sends the signal to every process of its foreground group."""
    output = tmp_path / "out"
    process = start_tool(output, fake_training)
    folder = output / "slow" / "seed_1"
    wait_for_training(folder, process)
    os.killpg(process.pid, signal.SIGINT)
    (text,) = patience.outputs(process)
    assert (folder / "ended.txt").is_file(), text
    assert (folder / "ended.txt").read_text() == "SIGTERM"
    assert json.loads((folder / "cell.json").read_text())["status"] == "interrupted"


def start_tool(output, root):
    """The tool in a process of its own, training a cell that takes an hour."""
    tool = (
        # As in a terminal: a shell lets background jobs ignore Ctrl-C, and the tests may be one.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from pathlib import Path; "
        "from detection_toolkit.studies import run; run.ROOT = Path(sys.argv[1]); "
        "from run_ablation import main; main(sys.argv[2:])"
    )
    before, after = arguments(output, variants={"slow": ("train.log_period=777",)}, seeds=[1])
    command = [sys.executable, "-c", tool, str(root), *before, *after]
    paths = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return patience.start(command, env=environment)


def wait_for_training(folder, process):
    """Until it can be interrupted."""
    path = folder / "last_checkpoint"
    wait_until(path.is_file, str(path), process=process, output=lambda: patience.killed(process))


def test_a_training_that_goes_on_alone_keeps_its_cell(fake_training, tmp_path, capsys):
    """As when the command itself is killed with SIGKILL: no second training in its folder."""
    output = tmp_path / "out"
    process = start_tool(output, fake_training)
    folder = output / "slow" / "seed_1"
    wait_for_training(folder, process)
    process.kill()
    process.wait()
    try:
        with pytest.raises(SystemExit, match="is finished: there is nothing to compare"):
            call(output, variants={"slow": ("train.log_period=777",)}, seeds=[1])
    finally:
        trainer = int((folder / "pid.txt").read_text())
        os.kill(trainer, signal.SIGKILL)
    printed = "".join(capsys.readouterr())
    assert "slow, seed 1: another process is training it, skipped" in printed
    assert len(calls(output)["slow/seed_1"]) == 1
    wait_until(lambda: not is_locked(folder), "the end of the training")
    assert call(output, variants={"slow": ("train.log_period=777",)}, seeds=[1]) == 0
    assert [c.startswith("--resume") for c in calls(output)["slow/seed_1"]] == [False, True]


def is_locked(folder):
    with run._locked(folder) as lock:
        return lock is None


def test_parts_share_the_cells(fake_training, tmp_path):
    output = tmp_path / "out"
    assert call(output, "--part", "1/2") == 0
    assert sorted(calls(output)) == ["default/seed_1", "default/seed_2", "default/seed_3"]
    assert call(output, "--part", "2/2") == 0
    assert len(calls(output)) == 6
    assert len(json.loads((output / "results.json").read_text())["cells"]) == 6


def test_a_cell_that_another_process_trains_is_left_to_it(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    with run._locked(output / "more" / "seed_1") as lock:
        assert lock is not None
        assert call(output, seeds=[1]) == 0
    assert list(calls(output)) == ["default/seed_1"]
    assert "1 are being trained elsewhere" in capsys.readouterr().out


def test_a_cell_that_evaluates_too_little_has_failed(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, seeds=[1], variants={"default": ()}, opts=("train.max_iter=9",)) == 1
    assert "ends before 9 iterations" in "".join(capsys.readouterr())


def test_a_rerun_compares_to_the_digit(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    assert call(output, "--rerun", "more", "1", seeds=[1]) == 0
    assert "AP 13.1, the stored figures to the digit" in capsys.readouterr().out
    record = output / "more" / "seed_1" / "cell.json"
    # Figures that a version before did not have are no difference.
    older = json.loads(record.read_text())
    del older["metrics"]["APl"]
    record.write_text(json.dumps(older))
    assert call(output, "--rerun", "more", "1", seeds=[1]) == 0
    record.write_text(record.read_text().replace('"AP": 13.1', '"AP": 13.1000001'))
    assert call(output, "--rerun", "more", "1", seeds=[1]) == 1
    assert "other metrics" in capsys.readouterr().out
    assert not list(output.glob("more/seed_1/rerun-*"))


def test_a_rerun_compares_with_the_figures_that_came_with_the_project(
    fake_training, tmp_path, monkeypatch, capsys
):
    """Nothing needs to be trained before."""
    plan, page = tmp_path / "mine.yaml", tmp_path / "docs" / "page.md"
    text = f"config: {CONFIG}\noverrides: [train.max_iter=4]\nseeds: [1, 2]\n"
    plan.write_text(text + "variants: {default: [], more: [train.log_period=1]}\n")
    page.parent.mkdir()
    page.write_text("<!-- begin mine -->\n<!-- end mine -->\n")
    options = ["--plan", str(plan), "--output"]
    assert main([*options, str(tmp_path / "first"), "--seeds", "1", "--into", str(page)]) == 0
    monkeypatch.setattr(run_ablation, "ROOT", tmp_path)
    output = tmp_path / "out"
    options.append(str(output))
    capsys.readouterr()
    assert main([*options, "--rerun", "more", "1"]) == 0
    assert "AP 13.1, the stored figures to the digit" in capsys.readouterr().out
    assert not list(output.glob("*/*/cell.json"))
    with pytest.raises(SystemExit, match="mine.json has no figures of it: train it first"):
        main([*options, "--rerun", "more", "2"])
    stored = page.parent / "ablations" / "mine.json"
    stored.write_text(stored.read_text().replace('"AP": 13.1', '"AP": 13.1000001'))
    assert main([*options, "--rerun", "more", "1"]) == 1
    plan.write_text(text + "variants: {default: [], more: [train.log_period=3]}\n")
    with pytest.raises(SystemExit, match=r"in .*mine.json the variant 'more' has the overrides"):
        main([*options, "--rerun", "more", "1"])


@pytest.fixture
def measured_costs(monkeypatch):
    """Costs as of --costs, without measuring."""

    def measured(plan, threads, steps, random_images):
        kinds = {"default": 1, "more": 3}
        facts = {"steps": 5, "threads": threads, "device": "cpu"}
        return {
            name: {"seconds": kinds[name] / 2, "memory_mb": 100 * kinds[name], **facts}
            for name in plan.variants
        }

    monkeypatch.setattr(costs, "measure_variants", measured)


def test_costs_of_the_variants_stand_beside_the_cells(fake_training, tmp_path, measured_costs):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    assert call(output, "--costs", seeds=[1]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["costs"]["more"]["memory_mb"] == 300 and results["costs"]["more"]["versions"]
    tables = (output / "tables.md").read_text()
    assert "(median of 5 steps)" in tables and "Processor seconds" in tables
    assert "| more    |     1.500 |        3.00 |  300 |        3.00 |" in tables
    assert call(output, seeds=[1, 2]) == 0  # stay there
    assert json.loads((output / "results.json").read_text())["costs"] == results["costs"]


def test_costs_need_no_trained_cell(fake_training, tmp_path, measured_costs, capsys):
    assert call(tmp_path / "out", "--costs", seeds=[1]) == 0
    assert "| more    |     1.500 |        3.00 |" in capsys.readouterr().out


def test_costs_that_cannot_be_compared_have_no_multiple(fake_training, tmp_path, measured_costs):
    """Of another number of threads, or of a system that cannot tell the memory of a step."""
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    assert call(output, "--costs", seeds=[1]) == 0
    assert call(output, "--costs", "--threads", "2", "--only", "more", seeds=[1]) == 0
    assert "| more    |     1.500 |           – |  300 |           – |" in (
        (output / "tables.md").read_text()
    )
    results = output / "results.json"
    results.write_text(results.read_text().replace('"memory_mb": 100', '"memory_mb": 0.0'))
    assert call(output, "--report", seeds=[1]) == 0
    assert "| default |     0.500 |        1.00 |    0 |           – |" in (
        (output / "tables.md").read_text()
    )


@pytest.mark.slow
def test_a_training_step_costs_time_and_memory():
    overrides = ["train.device=cpu", "dataloader.train.num_workers=0"]
    overrides.append("dataloader.train.dataset.names=shapes_val")
    overrides.append("dataloader.train.total_batch_size=2")
    costs = []
    for override in ("model.decoder.num_stages=1", "model.decoder.num_stages=4"):
        arguments = ("stageinteractor/shapes_tiny.py", [*overrides, override])
        cost, device = call_in_process(measure, *arguments, threads=1, steps=1)
        assert device == "cpu"
        costs.append(cost)
    assert 0 < costs[0].seconds < costs[1].seconds
    assert 0 < costs[0].memory < costs[1].memory


@pytest.mark.slow
def test_noise_in_place_of_the_data_costs_time_and_memory_too(tmp_path, capsys):
    """The data need not be there."""
    options = ["--costs", "--steps", "1", "--random-images", "1", "64", "96"]
    opts = ("train.device=cpu", "dataloader.train.dataset.names=nowhere")
    variants = {"one": ("model.decoder.num_stages=1",), "four": ()}
    assert call(tmp_path / "out", *options, variants=variants, opts=opts) == 0
    printed = capsys.readouterr().out
    assert "(median of 1 steps)" in printed and "1 random images of 64 x 96, cpu" in printed
    costs = json.loads((tmp_path / "out" / "results.json").read_text())["costs"]
    assert 0 < costs["one"]["seconds"] < costs["four"]["seconds"]
    assert 0 < costs["one"]["memory_mb"] < costs["four"]["memory_mb"]
    assert costs["one"]["random_images"] == [1, 64, 96]


def test_random_images_have_objects_within_them():
    (first, second) = random_batch(2, (64, 96), 5)
    assert first["image"].shape == (3, 64, 96) and not torch.equal(first["image"], second["image"])
    instances = first["instances"]
    boxes = instances.gt_boxes.tensor
    assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min() >= 0
    assert (boxes[:, 2:] <= torch.tensor([96, 64])).all()
    assert 0 <= instances.gt_classes.min() and instances.gt_classes.max() < 5


@pytest.mark.slow
def test_a_variant_that_cannot_be_measured_is_named(tmp_path):
    opts = ("train.device=cpu", "dataloader.train.dataset.names=shapes_val")
    with pytest.raises(SystemExit, match="variant 'none': num_stages must be at least 1, got 0"):
        call(
            tmp_path / "out",
            "--costs",
            variants={"none": ("model.decoder.num_stages=0",)},
            opts=opts,
        )


def test_a_measuring_process_that_is_killed_is_noticed():
    with pytest.raises(OSError, match="ended from outside"):
        call_in_process(os.abort)


def test_tables_find_their_place_in_a_page(fake_training, tmp_path):
    output, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Title\n\n<!-- begin shapes_hard -->\nold\n<!-- end shapes_hard -->\n\nend\n")
    assert call(output, "--into", str(page), seeds=[1]) == 0
    text = page.read_text()
    # The chart, the main table, and the others folded.
    chart = "![AP over the iterations](images/ablation_shapes_hard.png)"
    assert text.startswith(f"# Title\n\n<!-- begin shapes_hard -->\n\n{chart}\n\n|")
    folded = text[text.index("<details") :]
    assert folded.count('<details markdown="1">\n<summary>') == folded.count("</details>") > 3
    assert "\n|" not in re.sub("<details.*?</details>", "", folded, flags=re.DOTALL)
    assert text.endswith("<!-- end shapes_hard -->\n\nend\n") and "old" not in text
    assert (page.parent / "images" / "ablation_shapes_hard.png").is_file()
    stored = (page.parent / "ablations" / "shapes_hard.json").read_text()
    assert stored == (output / "results.json").read_text()
    assert call(output, "--report", "--into", str(page), seeds=[1]) == 0
    assert page.read_text() == text


def test_a_page_without_a_place_is_refused(fake_training, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="has no lines '<!-- begin shapes_hard -->'"):
        call(tmp_path / "out", "--into", str(page), seeds=[1])


def test_the_test_split_is_looked_at_once_and_last(fake_training, tmp_path):
    output, file = tmp_path / "out", tmp_path / "plan.yaml"
    file.write_text(
        f"config: {CONFIG}\noverrides: [train.max_iter=4]\nseeds: [1, 2]\n"
        "variants: {neither: [], both: [train.log_period=2]}\n"
        "test: [dataloader.test.dataset.names=shapes_val]\n"
    )
    plan = ["--plan", str(file), "--output", str(output)]
    assert main([*plan, "--only", "both"]) == 0
    with pytest.raises(SystemExit, match="2 cells are not finished .neither, seed 1."):
        main([*plan, "--test"])
    assert main(plan) == 0
    assert "evaluated once" not in (output / "tables.md").read_text()
    assert main([*plan, "--test"]) == 0
    results = json.loads((output / "results.json").read_text())
    cell = results["cells"][-1]
    assert (
        cell["test"]["dataset"] == "test_split"
        and cell["metrics"]["AP"] != cell["test"]["metrics"]["AP"]
    )
    for part in ("--eval-only", "names=shapes_val", "both/seed_2/model_final.pth"):
        assert part in cell["test"]["command"]
    assert "train.seed" not in cell["test"]["command"]
    assert results["summary"]["differences_of_test_AP"][0]["values"] == [4.0, 4.0]
    tables = (output / "tables.md").read_text()
    assert "AP on `test_split`, evaluated once" in tables and "AP after each stage" not in tables
    times = [f.stat().st_mtime_ns for f in sorted(output.glob("*/*/test/output.txt"))]
    assert main([*plan, "--test"]) == 0
    assert [f.stat().st_mtime_ns for f in sorted(output.glob("*/*/test/output.txt"))] == times


def test_other_test_overrides_are_another_evaluation(fake_training, tmp_path):
    output, file = tmp_path / "out", tmp_path / "plan.yaml"
    text = f"config: {CONFIG}\noverrides: [train.max_iter=4]\nseeds: [1]\nvariants: {{both: []}}\n"
    plan = ["--plan", str(file), "--output", str(output)]
    file.write_text(text + "test: [dataloader.test.dataset.names=shapes_val]\n")
    assert main(plan) == 0 and main([*plan, "--test"]) == 0
    file.write_text(text + "test: [dataloader.test.dataset.names=shapes_shifted_val]\n")
    assert main([*plan, "--test"]) == 0
    (cell,) = json.loads((output / "results.json").read_text())["cells"]
    assert cell["test"]["overrides"] == ["dataloader.test.dataset.names=shapes_shifted_val"]
    assert "names=shapes_shifted_val" in cell["test"]["command"]


def test_a_plan_without_a_test_split_says_so(fake_training, tmp_path, capsys):
    assert "the plan has no test split" in refuse(capsys, tmp_path / "out", "--test")


def test_a_dry_run_prints_commands_only(fake_training, tmp_path, capsys):
    assert call(tmp_path / "out", "--dry-run", seeds=[1]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ OMP_NUM_THREADS=1 python train_net.py --config-file") == 2
    assert calls(tmp_path / "out") == {}


def test_the_config_of_a_run_may_be_the_base_and_has_to_be_trusted_where_it_calls_code(
    tmp_path, capsys
):
    config = tmp_path / "config.yaml"
    config.write_text(
        config_text(get_config(CONFIG)) + "\nmine: {_target_: os.mkdir, path: anywhere}\n"
    )
    plan = ["--config-file", str(config), "--output", str(tmp_path / "out"), "--seeds", "1"]
    plan += ["--variant", "default", "--dry-run"]
    with pytest.raises(SystemExit, match=r"names 'os.mkdir'.* add --trust-config"):
        main(plan)
    assert main([*plan, "--trust-config"]) == 0
    assert f"train_net.py --trust-config --config-file {config}" in capsys.readouterr().out
    trusting = Plan(str(config), {"default": ()}, (1,), trust_config=True)
    (cell,) = trusting.cells(tmp_path / "out")
    assert "--trust-config" in cell.test_arguments(())
    with pytest.raises(UserError, match="os.mkdir"):
        measure(str(config), (), threads=1, steps=1)


def test_the_report_of_nothing_is_refused(fake_training, tmp_path, capsys):
    assert "there is nothing to compare" in refuse(capsys, tmp_path / "out", "--report")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"variants": {"a": ("train.max_itr=3",)}}, "variant 'a': .* no key 'train.max_itr'"),
        ({"opts": ("train.max_itr=3",)}, "no key 'train.max_itr'"),
        ({"variants": {"a": ("train.max_iter",)}}, "variant 'a': 'train.max_iter' does not set"),
        ({"opts": ("train.max_iter=abc",)}, "train.max_iter must be a positive .* not 'abc'"),
        ({"variants": {"a": ("train.max_iter=0",)}}, "variant 'a': train.max_iter .* not 0"),
        ({"seeds": (1, 2, 1)}, r"the seed 1 stands twice in \[1, 2, 1\]"),
        ({"seeds": (-1,)}, "seed -1 is negative"),
        ({"variants": {"a": ("train.seed=3",)}}, "each cell has its own train.seed"),
        ({"variants": {"a/b": ()}}, "variant 'a/b' names a folder"),
        ({"variants": {}}, "no variants"),
    ],
)
def test_wrong_plans_are_refused(fake_training, tmp_path, capsys, plan, message):
    with pytest.raises(SystemExit, match=message):
        call(tmp_path / "out", **plan)
    assert calls(tmp_path / "out") == {}


def test_variants_given_twice_or_beside_a_plan_are_refused(fake_training, tmp_path):
    before, after = arguments(tmp_path / "out")
    with pytest.raises(SystemExit, match="variant 'default' is given twice"):
        main([*before, "--variant", "default", *after])
    with pytest.raises(SystemExit, match="leave the other options out"):
        main(["--plan", "ablations/smoke.yaml", *before])
    with pytest.raises(SystemExit, match="give --plan"):
        main([])


def test_results_of_another_base_config_are_refused(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    before = calls(output)
    for opts, message in [
        (("train.max_iter=5",), "another base config: train.max_iter is 4 there and 5 here"),
        (("train.max_iter=4", "optimizer.lr=1"), "optimizer.lr is 0.0005 there and 1 here"),
    ]:
        with pytest.raises(SystemExit, match=message):
            call(output, seeds=[1], opts=opts)
    with pytest.raises(SystemExit, match="its config is .*shapes_hard.py, not .*shapes_tiny.py"):
        main(
            ["--config-file", "stageinteractor/shapes_tiny.py", "--variant", "default"]
            + ["--seeds", "1", "--output", str(output)]
        )
    with pytest.raises(SystemExit, match="the variant 'more' has the overrides"):
        call(output, seeds=[1], variants={"more": ("train.log_period=3",)})
    assert calls(output) == before


def test_cells_of_another_plan_are_not_taken_over(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    (output / "results.json").unlink()
    with pytest.raises(SystemExit, match="seed_1 holds a cell of .* choose another --output"):
        call(output, seeds=[1], opts=("train.max_iter=3",))


@pytest.mark.parametrize("content", ["{", "{}", '{"plan": 3}'])
def test_a_file_that_holds_no_results_is_refused(fake_training, tmp_path, capsys, content):
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text(content)
    assert "is no results file" in refuse(capsys, output)


@pytest.mark.parametrize("content", ["{", "[]", '{"variant": "more"}'])
def test_a_damaged_record_is_named(fake_training, tmp_path, content):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    record = output / "more" / "seed_1" / "cell.json"
    record.write_text(content)
    before = calls(output)
    for option in ([], ["--report"]):
        with pytest.raises(SystemExit, match=rf"{record} is damaged .* remove it"):
            call(output, *option, seeds=[1])
    assert calls(output) == before


def test_a_cell_of_an_unknown_variant_is_left_out(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert call(output, seeds=[1]) == 0
    (output / "results.json").unlink()
    assert call(output, seeds=[1], variants={"default": ()}) == 0
    left = output / "more" / "seed_1" / "cell.json"
    assert f"left out: {left}, as neither the plan nor" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert [cell["variant"] for cell in results["cells"]] == ["default"]


def test_calls_side_by_side_know_each_others_variants(fake_training, tmp_path, monkeypatch):
    """A call with another variant ends while a cell of this one is being trained."""
    output = tmp_path / "out"

    def train(cell, **options):
        if cell.variant == "default":
            assert call(output, seeds=[1], variants={"more": VARIANTS["more"]}) == 0
        return train_cell(cell, **options)

    train_cell = run.train_cell
    monkeypatch.setattr(run, "train_cell", train)
    assert call(output, seeds=[1], variants={"default": ()}) == 0
    results = json.loads((output / "results.json").read_text())
    assert {(c["variant"], c["status"]) for c in results["cells"]} == {
        ("default", "finished"),
        ("more", "finished"),
    }


@pytest.mark.parametrize("options", [["--costs", "--test"], ["--dry-run", "--rerun", "a", "1"]])
def test_one_thing_at_a_time(fake_training, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as error:
        call(tmp_path / "out", *options, seeds=[1])
    assert error.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["0", "-1", "x"])
def test_threads_must_be_positive(fake_training, tmp_path, capsys, threads):
    with pytest.raises(SystemExit) as error:
        call(tmp_path / "out", "--threads", threads, seeds=[1])
    assert error.value.code == 2 and "--threads" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_parts_that_do_not_exist_are_refused(fake_training, tmp_path, capsys, part):
    assert f"--part {part}: write i/n" in refuse(capsys, tmp_path / "out", "--part", part)


def test_unknown_variants_and_cells_are_named(fake_training, tmp_path, capsys):
    output = tmp_path / "out"
    assert "no variant 'less'; it has default, more" in refuse(capsys, output, "--only", "less")
    assert "no cell 'more' with seed 9" in refuse(capsys, output, "--rerun", "more", "9")
    assert "is not finished" in refuse(capsys, output, "--rerun", "more", "1")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_project_fit_their_configs(path):
    plan = load_plan(str(path))
    plan.check()
    assert plan.name == path.stem
    assert next(iter(plan.variants)) in ("neither", "float32", "none", "hybrid", "dynamic")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1]\nvariants: {a: []}", "no key 'config'"),
        ("config: x.py\nseeds: 3\nvariants: {a: []}", "seeds must be a list"),
        ("config: x.py\nseeds: [a]\nvariants: {a: []}", "seeds must be whole numbers"),
        ("config: x.py\nseed: [1]\nvariants: {a: []}", "unknown key 'seed'"),
        ("config: x.py\nseeds: [1]\nvariants: {a: b}", "overrides of 'a' must be a list"),
        ("- 1", "is no plan"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_plans_are_refused(tmp_path, text, message):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_plan(str(file))


def test_a_missing_plan_is_named():
    with pytest.raises(FileNotFoundError, match="no_such.yaml does not exist"):
        load_plan("ablations/no_such.yaml")


def test_base_values_leave_out_what_is_a_cells_or_a_machines_own():
    values = Plan(config=CONFIG, variants={"a": ()}, seeds=(1,)).base_values()
    assert values["train.max_iter"] > 0
    assert values["model.decoder._target_"].endswith("StageInteractorDecoder")
    assert not {"train.seed", "train.device", "train.output_dir"} & set(values)
    assert json.loads(json.dumps(values)) == values


STORED = sorted((ROOT / "docs" / "ablations").glob("*.json"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_those_of_their_plan_and_of_the_page(path):
    """Else --rerun would compare with figures of another config, or the page tell others."""
    results = json.loads(path.read_text())
    plan = load_plan(f"ablations/{path.stem}.yaml")
    check_results(path, plan)
    ours = {(cell.variant, cell.seed): cell for cell in plan.cells(Path("/nowhere"))}
    for record in results["cells"]:
        run.check_same_cell(ours[record["variant"], record["seed"]], record, place=path)
    page = (path.parents[1] / "results.md").read_text()
    assert render_for_page(results, f"images/ablation_{path.stem}.png") in page
    assert not re.search(r"[\"=']/[a-z]", path.read_text())  # no folder of a machine


def test_there_are_stored_results():
    unstored = {"smoke", "sqr_schedules", "dino_denoising"}  # but the first, for --costs
    assert {path.stem for path in STORED} == {path.stem for path in PLANS} - unstored
