"""What a process does with memory that it has freed."""

import os
import platform
import sys
from argparse import Namespace
from types import SimpleNamespace

import cv2
import patience
import pytest
from small_runs import draw_blocks, make_config, run_overrides, save_untrained_detector

from detection_toolkit import memory
from detection_toolkit.commands import check, figures, main
from detection_toolkit.engine import Predictor, Trainer, prepare_config
from detection_toolkit.engine.shipped import shipped_config
from detection_toolkit.memory import keep_freed_memory

MEGABYTES = 400

# Blocks of a few megabytes each, as maps of features are.
PROGRAM = f"""
from detection_toolkit.memory import keep_freed_memory
from detection_toolkit.studies.timing import resident_memory
import sys
kept = keep_freed_memory() if "keep" in sys.argv else False
before = resident_memory(peak=False)
blocks = [bytearray(4 * 2**20) for _ in range({MEGABYTES // 4})]
for block in blocks:
    block[::4096] = b"x" * len(block[::4096])
del blocks, block
print(kept, (resident_memory(peak=False) - before) // 2**20)
"""


def megabytes_left(*arguments: str, **environ: str) -> tuple[bool, int]:
    """Whether memory was to be kept, and what is left of 400 MB that were freed."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = patience.run(command, check=True, env=environ)
    kept, left = done.stdout.split()
    return kept == "True", int(left)


@pytest.fixture
def environ() -> dict[str, str]:
    """Without what a user may have set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_with_the_process(environ):
    kept, left = megabytes_left("keep", **environ)
    assert kept
    assert left > 0.9 * MEGABYTES
    assert megabytes_left(**environ)[1] < 0.1 * MEGABYTES


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_is_left_alone(name):
    assert not keep_freed_memory({name: "65536"})


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory({})


@pytest.fixture
def calls(monkeypatch):
    """One entry for each time that memory would be kept."""
    made = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: made.append(1))
    return made


def test_a_program_that_uses_a_part_decides_for_itself(tmp_path, calls):
    Predictor.from_config(shipped_config(), save_untrained_detector(tmp_path), ["train.device=cpu"])
    Trainer(prepare_config(make_config(tmp_path)))
    assert not calls


@pytest.mark.parametrize("command", ["predict", "train", "eval", "export", "web"])
def test_commands_keep_memory(tmp_path, monkeypatch, calls, command):
    config = ["--config-file", shipped_config()]
    weights, opts = ["--weights", save_untrained_detector(tmp_path)], ["train.device=cpu"]
    cv2.imwrite(str(tmp_path / "a.png"), draw_blocks())
    picture = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "drawn")]
    if command == "train":
        opts = [*run_overrides(tmp_path), "train.max_iter=1", "train.validation_loss=false"]
        weights = []
    elif command == "eval":
        opts = [*run_overrides(tmp_path), "train.allow_partial=true"]
        opts = [o for o in opts if not o.startswith("model.")]
        weights = [*weights, "train.validation_loss=false"]
    elif command == "web":
        serving = SimpleNamespace(serve=lambda *args, **kwargs: True)
        monkeypatch.setitem(sys.modules, "detection_toolkit.web.serving", serving)
    options = {
        "predict": [*picture, *config, *weights, "--opts", *opts],
        "train": [*config, *opts],
        "eval": [*config, *weights, *opts],
        "export": [*config, *weights, "--hub-folder", str(tmp_path / "published")],
        "web": [*config, *weights],
    }
    main([command, *options[command]])
    assert calls == [1]


def test_so_do_those_that_check_data_and_draw(tmp_path, calls):
    weights = save_untrained_detector(tmp_path)
    names = {"config_file": shipped_config(), "trust_config": False}
    check.build_predictor(Namespace(**names, model=weights))
    assert calls == [1]
    opts = [f"train.init_checkpoint={weights}", "train.device=cpu"]
    figures.open_detector(Namespace(**names, opts=opts))
    assert calls == [1, 1]
