"""The command line, as a user calls it."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser
from small_runs import run_overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "stageinteractor/shapes_tiny.py"


@pytest.fixture
def run():
    """Calls ``main`` of train_net.py in this process, and takes its log handlers away again."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    train_net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "stageinteractor")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]

    def call(*arguments, config=CONFIG):
        args = ["--config-file", config, *arguments]
        train_net.main(default_argument_parser().parse_args(args))

    yield call
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate


def test_train_resume_and_evaluate(run, tmp_path):
    overrides = run_overrides(tmp_path)
    run(*overrides, "train.max_iter=2")
    run("--resume", *overrides, "train.max_iter=3")
    output = tmp_path / "output"
    iterations = [
        json.loads(line)["iteration"] for line in (output / "metrics.json").read_text().splitlines()
    ]
    assert iterations == [0, 1, 2]
    assert (output / "config.yaml").is_file()

    run("--eval-only", *overrides, f"train.init_checkpoint='{output / 'model_final.pth'}'")
    (metrics,) = output.glob("inference/*/metrics.json")
    assert "AP" in json.loads(metrics.read_text())["results"]["bbox"]


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
        (["train.init_checkpoint=/no/such.pth"], "checkpoint /no/such.pth does not exist"),
        (["dataloader.train.dataset.json_file=/no/such.json"], "/no/such.json"),
        (["dataloader.train.dataset.image_root=/no/such/folder"], "/no/such/folder"),
        (["dataloader.train.total_batch_size=0"], "total_batch_size=0"),
        (["train.amp.enabled=true"], "float16 needs a GPU"),
        (["model.num_classes=4"], "model.num_classes=4"),
    ],
)
def test_what_a_user_can_mend_is_one_line(run, tmp_path, overrides, message):
    assert message in refuse(run, *run_overrides(tmp_path), *overrides)


def test_a_missing_config_is_one_line(run):
    message = refuse(run, config="stageinteractor/no_such.py")
    assert "config file stageinteractor/no_such.py does not exist" in message


def test_evaluating_weights_of_another_model_is_one_line(run, tmp_path):
    overrides = run_overrides(tmp_path)
    run(*overrides, "train.max_iter=1")
    other = [*overrides, "model.initial_queries.num_queries=9"]
    message = refuse(run, "--eval-only", "--resume", *other)
    assert "initial_queries.content.weight" in message
