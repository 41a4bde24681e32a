"""Ends of one line: Ctrl-C, with the exit code that shells give it; a config that lacks a key."""

import os
import signal

import pytest
from fault_runs import run_forked, run_overrides

from detection_toolkit.engine import Predictor, user_errors


def interrupting_inference():
    """In the first image that is evaluated."""
    from detection_toolkit.modeling import QueryDetector

    inference = QueryDetector.inference

    def interrupt(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return inference(self, *arguments, **options)

    QueryDetector.inference = interrupt


def interrupting_steps():
    """In the seventh step."""
    from detection_toolkit.engine.train_loop import DetectionTrainLoop

    update, count = DetectionTrainLoop._update, iter(range(1, 10**6))

    def interrupt(self, *arguments):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, *arguments)

    DetectionTrainLoop._update = interrupt


@pytest.mark.parametrize(
    "sabotage, arguments",
    [
        (
            interrupting_inference,
            ["--eval-only", "train.allow_partial=true", "train.init_checkpoint=''"],
        ),
        (interrupting_inference, ["train.eval_period=3"]),
        (interrupting_steps, []),
    ],
)
def test_ctrl_c_is_one_line_and_130(tmp_path, small_data, sabotage, arguments):
    output, log = tmp_path / "output", tmp_path / "console.txt"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell ignores it for us
    overrides = [*run_overrides(output, small_data), *arguments]
    assert run_forked(overrides, sabotage=sabotage, log=log) == 130
    text = log.read_text()
    assert text.splitlines()[-1] == "interrupted by Ctrl-C: what is complete is kept"
    assert "Traceback" not in text
    if "--eval-only" not in arguments:
        assert run_forked(["--resume", *overrides, "train.max_iter=8"], log=log) == 0
        assert "resumed: " in log.read_text() or sabotage is interrupting_inference


@pytest.mark.parametrize(
    "text, missing",
    [
        ("train: {}", r"Missing key device \(at train\.device\)"),
        ("train: {device: '${nothing.there}'}", r"'nothing\.there' not found \(at train\.device\)"),
    ],
)
def test_a_config_that_lacks_a_key_is_one_line(tmp_path, text, missing):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: the config cannot be used: .*{missing}$"):
        with user_errors():
            Predictor.from_config(str(tmp_path / "config.yaml"))
