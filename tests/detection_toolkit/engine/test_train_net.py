"""The command line of train_net.py, as a user calls it."""

import json
import logging
import pydoc
import runpy
import shlex
import sys
from datetime import datetime
from pathlib import Path

import patience
import pytest
import torch
from coco_files import write_dataset
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from small_runs import run_overrides

from detection_toolkit.commands import train
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import UnreadableImageError
from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import parse_arguments
from detection_toolkit.engine.errors import is_user_error
from detection_toolkit.evaluation.results import read_facts
from detection_toolkit.modeling import QueryDetector

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "stageinteractor/shapes_tiny.py"


@pytest.fixture
def train_net():
    """What the script calls; takes its log handlers away again."""
    train._load_once.cache_clear()
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "detection_toolkit")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = []

    yield train
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate


@pytest.fixture
def run(train_net):
    """Runs one process of a job: this one."""

    def call(*arguments, config=CONFIG):
        args = ["--config-file", config, *arguments]
        train_net.run(train_net.get_parser().parse_args(args))

    return call


@pytest.fixture
def run_script(train_net):
    """Calls train_net.py as the command line does, with one process: in this one."""

    def call(*arguments, config=CONFIG):
        train_net.main(["--config-file", config, *arguments])

    return call


def test_train_resume_and_evaluate(run, tmp_path):
    overrides = run_overrides(tmp_path)
    run(*overrides, "train.max_iter=2")
    run("--resume", *overrides, "train.max_iter=3")
    output = tmp_path / "output"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 2]
    assert LazyConfig.load(str(output / "config.yaml")).model.num_classes == 3  # the data set's
    assert "effective batch: 2 images" in (output / "log.txt").read_text()
    assert "resumed: 2 of 3 iterations are done" in (output / "log.txt").read_text()

    (metrics,) = output.glob("inference/*/metrics.json")
    of_run = json.loads(metrics.read_text())
    assert of_run["checkpoint"] == "iteration 3 of the run"
    weights = f"train.init_checkpoint='{output / 'model_final.pth'}'"
    run("--eval-only", *overrides, weights)
    evaluated = json.loads(metrics.read_text())
    assert "AP" in evaluated["results"]["bbox"]
    assert evaluated["checkpoint"] == str(output / "model_final.pth")
    assert datetime.fromisoformat(evaluated["date"]) >= datetime.fromisoformat(of_run["date"])
    # What a report says about the run: what the last training was begun with.
    facts = read_facts(output, metrics.parent)
    assert facts["config"] == shlex.join([CONFIG, *overrides, "train.max_iter=3"])
    run("--eval-only", "--resume", *overrides)
    assert json.loads(metrics.read_text())["checkpoint"] == str(output / "model_final.pth")


def test_evaluation_uses_averaged_weights_where_they_are_enabled(run, tmp_path):
    overrides = run_overrides(tmp_path)
    run(*overrides, "train.max_iter=1", "train.ema.enabled=true")
    output = tmp_path / "output"
    (path,) = output.glob("inference/*/metrics.json")
    weights = f"train.init_checkpoint='{output / 'model_final.pth'}'"
    for enabled, expected in (("true", "averaged"), ("false", "plain")):
        run("--eval-only", *overrides, weights, f"train.ema.enabled={enabled}")
        assert json.loads(path.read_text())["weights"] == expected
    log = (output / "log.txt").read_text()
    assert log.count("using the averaged (EMA) weights of the checkpoint") == 1
    assert log.count("using the plain weights of the checkpoint, not the averaged") == 1
    # Without averaged weights in the file, what is evaluated are the plain ones, and it is said.
    run(*overrides, "train.max_iter=1")
    run("--eval-only", *overrides, weights, "train.ema.enabled=true")
    assert json.loads(path.read_text())["weights"] == "plain"


def test_a_run_is_evaluated_by_its_config_alone(run, run_script, tmp_path):
    output = tmp_path / "output"
    run(*run_overrides(tmp_path), "train.max_iter=2", "train.eval_period=2")
    before = (output / "config.yaml").read_text()
    for named in ("config.yaml", ""):
        run("--eval-only", config=str(output / named))
        log = (output / "log.txt").read_text()
        assert f"Loading from {output / 'model_best.pth'}" in log
    # A checkpoint of it, by the whole command, which reads the config twice.
    run_script("--eval-only", config=str(output / "model_final.pth"))
    log = (output / "log.txt").read_text()
    assert f"Loading from {output / 'model_final.pth'}" in log
    assert f"config of {output / 'model_final.pth'}: {output / 'config.yaml'}" in log
    # It still says what the run began with.
    assert (output / "config.yaml").read_text() == before


def test_the_console_is_short_and_the_file_has_everything(run, tmp_path, capfd):
    run(*run_overrides(tmp_path), "train.max_iter=1")
    console, log = capfd.readouterr().out, (tmp_path / "output" / "log.txt").read_text()
    for text in ("environment:", "command line:", "num_queries: 6", "StageInteractor("):
        assert text in log and text not in console, text
    before = console[: console.index("Starting training")].splitlines()
    assert len(before) < 12, before
    assert "\x1b" not in console  # colour is for terminals
    assert f"python tools/report.py {tmp_path / 'output'}" in console
    assert "weights: " in console
    assert "Evaluation results for bbox" in console and "Per-category bbox AP" in console
    for text in (" Average Precision  (AP)", "copypaste: AP,AP50", "Fast COCO eval"):
        assert text in log and text not in console, text
    # What is found out before anything is built as well.
    for text in (console, log):
        assert "model.num_classes is set to 3" in text


def test_a_new_run_in_a_used_folder_is_refused_or_the_old_one_renamed(
    run_script, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "output"
    overrides = [*run_overrides(tmp_path), "train.max_iter=1"]
    run_script(*overrides)
    content = sorted(p.name for p in output.rglob("*"))
    with pytest.raises(SystemExit, match="holds a run already: go on with it by --resume") as error:
        run_script(*overrides)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in output.rglob("*")) == content
    run_script("--resume", *overrides)
    run_script("--eval-only", "--weights", str(output / "model_final.pth"), *overrides)
    # One process of many has the say.
    with monkeypatch.context() as patch:
        patch.setattr("detection_toolkit.engine.processes.launch", lambda *args, **kwargs: None)
        run_script("--machine-rank", "1", *overrides)
    run_script("--move-aside", *overrides)
    assert (tmp_path / "output.1" / "model_final.pth").is_file()
    assert (output / "model_final.pth").is_file()
    assert "is now in" in capsys.readouterr().out


def refuse(run, *arguments, config=CONFIG):
    """What a refused call says; it must be a line for the user, with exit code 1."""
    with pytest.raises(SystemExit) as error:
        run(*arguments, config=config)
    message = str(error.value)
    assert message.startswith("error: ")  # sys.exit with a text exits with code 1
    return message


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.max_itr=2"], "no key 'train.max_itr'; the nearest keys are train.max_iter"),
        (["+train.max_itr=2"], "train.max_itr is no setting of a run; the nearest keys are"),
        (["train.max_iter=0"], "train.max_iter must be >= 1, got 0"),
        (["train.init_checkpoint=/no/such.pth"], "checkpoint /no/such.pth does not exist"),
        (["dataloader.train.dataset.json_file=/no/such.json"], "/no/such.json"),
        (["dataloader.train.dataset.image_root=/no/such/folder"], "/no/such/folder"),
        (["dataloader.train.total_batch_size=0"], "total_batch_size=0"),
        (["train.amp.enabled=true"], "float16 needs a GPU"),
        (["model.num_classes=4"], "model.num_classes=4"),
        (
            [
                *("optimizer.lr=1e30", "train.clip_grad.enabled=false"),
                "train.max_skipped_steps=0",
            ],
            "bad_batch",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(run, tmp_path, overrides, message):
    assert message in refuse(run, *run_overrides(tmp_path), *overrides)


def test_a_schedule_of_recollection_that_does_not_fit_is_one_line(run, tmp_path):
    overrides = ["train.max_iter=1", "+model.decoder.route.schedule.late_start=3"]
    overrides += [x for x in run_overrides(tmp_path) if not x.startswith("model.")]
    message = refuse(run, *overrides, config="sqr/stageinteractor_sqr_shapes_tiny.py")
    assert "with late_start=3 recollection begins at stage 4, but the last stage is 3" in message


def test_a_renamed_run_is_evaluated_in_its_own_folder(train_net, tmp_path):
    run = tmp_path / "renamed"
    run.mkdir()
    cfg = get_config("stageinteractor/shapes_tiny.py")
    cfg.train.output_dir = str(tmp_path / "as_it_was_called")
    LazyConfig.save(cfg, str(run / "config.yaml"))
    (run / "model_best.pth").touch()

    def load(*overrides):
        arguments = ["--eval-only", "--config-file", str(run), *overrides]
        return train_net.load_config(parse_arguments(train_net.get_parser(), arguments)).train

    assert load().output_dir == str(run)
    assert load().init_checkpoint == str(run / "model_best.pth")
    assert load("train.output_dir=other").output_dir == "other"
    for spelling in ("train.init_checkpoint=x.pth", "+train.init_checkpoint=x.pth"):
        assert load(spelling).init_checkpoint == "x.pth"


def test_a_missing_config_is_one_line(run):
    message = refuse(run, config="stageinteractor/no_such.py")
    assert "config file stageinteractor/no_such.py does not exist" in message


def test_evaluating_weights_of_another_model_is_one_line(run, tmp_path):
    overrides = run_overrides(tmp_path)
    run(*overrides, "train.max_iter=1")
    other = [*overrides, "model.initial_queries.num_queries=9"]
    message = refuse(run, "--eval-only", "--resume", *other)
    assert "initial_queries.content.weight" in message


def test_the_script_itself_ends_with_one_line_and_code_1():
    done = patience.run(
        [sys.executable, str(ROOT / "train_net.py"), "--num-gpus", "2", "--config-file", "no.py"]
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert line.startswith("error: config file no.py does not exist")


def raise_in(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_mistakes_of_a_program_keep_their_traceback():
    assert is_user_error(raise_in(lambda: open("/no/such/file")))
    assert is_user_error(raise_in(lambda: get_config("no.py")))
    assert is_user_error(raise_in(lambda: apply_overrides(get_config(CONFIG), ["a=1"])))
    for mistake in (
        lambda: int("x"),
        lambda: {}["x"],
        lambda: torch.ones(2).expand(3),
        lambda: 1 / 0,
    ):
        assert not is_user_error(raise_in(mistake))


@pytest.mark.parametrize("options", [[], ["--eval-only"]])
def test_a_mistake_of_a_program_keeps_its_traceback_through_the_script(
    run, tmp_path, monkeypatch, options
):
    """Also where it is a ValueError, as the errors of a user are."""
    mistake = ValueError("not enough values to unpack")

    def forward(self, batched_inputs, **kwargs):
        raise mistake

    monkeypatch.setattr(QueryDetector, "forward", forward)
    with pytest.raises(ValueError) as error:
        run(*options, *run_overrides(tmp_path), "train.allow_partial=true")
    assert error.value is mistake
    assert error.traceback[-1].name == "forward"


def test_what_a_loader_process_raises_is_shortened():
    original = UnreadableImageError("x.png cannot be decoded")
    text = f"Caught UnreadableImageError in process 0.\nOriginal Traceback:\n  ...\n{original!r}"
    text = text.replace(
        repr(original), f"detection_toolkit.data.mapper.UnreadableImageError: {original}"
    )
    with pytest.raises(SystemExit, match=r"^error: x\.png cannot be decoded$"), user_errors():
        raise UnreadableImageError(text)


def test_a_target_without_its_module_is_a_users_mistake_and_a_broken_module_is_none(
    tmp_path, monkeypatch
):
    (tmp_path / "broken_parts.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match="names lost_parts.Mapper, .* no module lost_parts: "):
        with user_errors():
            instantiate(DictConfig({"_target_": "lost_parts.Mapper"}))
    with pytest.raises(pydoc.ErrorDuringImport, match="no_such_module"), user_errors():
        instantiate(DictConfig({"_target_": "broken_parts.Mapper"}))


def broken(size):
    return dict(size=size).get(nonsense=3)


def takes_nothing():
    pass


def hands_it_on(size):
    return takes_nothing(size=size)


def test_a_wrong_argument_of_a_node_is_one_line_and_one_deeper_down_is_none():
    node = get_config(CONFIG).model
    node.num_clases = 1  # handed on to the base class
    said = r"^error: the config gives stageinteractor\S* an argument num_clases, which it does not "
    with pytest.raises(SystemExit, match=said + "take: the nearest are num_classes") as ended:
        with user_errors():
            instantiate(node)
    assert "\n" not in ended.value.code
    with pytest.raises(SystemExit, match="the config lacks what .*DetectionMapper needs: "):
        with user_errors():
            instantiate(DictConfig({"_target_": "detection_toolkit.data.DetectionMapper"}))
    for mistaken in (broken, hands_it_on):  # a mistake of a program
        node = DictConfig({"_target_": mistaken, "size": 1}, flags={"allow_objects": True})
        with pytest.raises(TypeError), user_errors():
            instantiate(node)
    with pytest.raises(TypeError), user_errors():
        dict(1, nonsense=2)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs train_net.py itself in this process; returns its exit code, or text, and its output."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
        try:
            runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return None, capsys.readouterr()

    train._load_once.cache_clear()
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "detection_toolkit")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    yield call
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate


def test_without_a_config_the_script_says_which_there_are(script):
    code, shown = script()
    assert code.startswith("error: nothing to train on: ") and "--list-configs" in code
    assert "\n" not in code and shown.out == shown.err == ""
    code, shown = script("--list-configs")
    assert not code and CONFIG in shown.out.splitlines()


def test_the_config_is_printed_with_its_overrides(script, tmp_path):
    overrides = ["train.output_dir=2024_11_26", "--weights", "a, b.pth", "optimizer.lr=0.5"]
    code, shown = script("--config-file", CONFIG, "--print-config", *overrides)
    assert not code
    (tmp_path / "config.yaml").write_text(shown.out)
    cfg = get_config(str(tmp_path / "config.yaml"))
    assert cfg.train.output_dir == "2024_11_26" and cfg.train.init_checkpoint == "a, b.pth"
    assert cfg.optimizer.lr == 0.5


def test_more_gpus_than_there_are_is_one_line(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _ = script("--config-file", CONFIG, "--num-gpus", "3")
    assert code.startswith("error: --num-gpus 3, but PyTorch sees no GPU here")


def test_a_config_that_registers_its_data_is_executed_once(script, tmp_path):
    json_file, image_root = write_dataset(tmp_path / "data")
    name = f"registered_in_{tmp_path.name}"
    (tmp_path / "mine.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        "from detection_toolkit.config import get_config\n"
        f"register_coco_instances({name!r}, {{}}, {str(json_file)!r}, {str(image_root)!r})\n"
        f"base = get_config({CONFIG!r})\n"
        "dataloader, lr_multiplier, model = base.dataloader, base.lr_multiplier, base.model\n"
        "optimizer, train = base.optimizer, base.train\n"
        f"dataloader.train.dataset.names = dataloader.test.dataset.names = {name!r}\n"
    )
    overrides = [x for x in run_overrides(tmp_path) if "json_file" not in x]
    overrides = [x for x in overrides if "image_root" not in x]
    config = str(tmp_path / "mine.py")
    code, shown = script("--config-file", config, *overrides, "train.max_iter=1")
    assert not code, shown.err
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.parametrize("weights", [[], ["--weights", "WEIGHTS"]])
def test_an_evaluation_of_weights_that_do_not_fit_is_refused(script, tmp_path, weights):
    torch.save({"state_dict": {"backbone.x": torch.ones(1)}}, tmp_path / "a.pth")
    weights = [str(tmp_path / "a.pth") if x == "WEIGHTS" else x for x in weights]
    arguments = ["--config-file", CONFIG, "--eval-only", *run_overrides(tmp_path), *weights]
    code, _ = script(*arguments)
    assert code.startswith("error: ") and code.endswith("instead") and "\n" not in code
    assert "--allow-partial goes on with random values" in code
    if not weights:
        code, _ = script(*arguments, "--allow-partial")
        assert not code
        assert list(tmp_path.glob("output/inference/*/metrics.json"))


def test_what_is_said_of_a_missing_compiler_for_gpus_is_left_out(caplog):
    noisy = logging.getLogger("torch.utils.cpp_extension")
    with user_errors():
        noisy.warning("No CUDA runtime is found, using CUDA_HOME=%r", "/usr/local/cuda")
        noisy.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_several_processes_take_a_free_port():
    assert train.get_parser().parse_args([]).dist_url == "auto"
