"""README's way from a clone to detections on one's own images, as far as it needs no network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import user_commands
from coco_files import write_dataset

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## From `git clone`")[1]
(BLOCK, *_) = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)
COMMANDS = BLOCK.replace("\\\n", " ").splitlines()


def test_it_takes_five_commands():
    assert len(COMMANDS) == 5
    assert COMMANDS[0].startswith("git clone ") and "setup_env.py" in COMMANDS[1]


@pytest.fixture
def checkout(tmp_path):
    """What the commands use of a clone, with small data in my/."""
    for name in ("tools", "demo", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "train_net.py").symlink_to(ROOT / "train_net.py")
    _, images = write_dataset(tmp_path / "my", num_images=9)
    assert Path(images) == tmp_path / "my" / "images"
    return tmp_path


@pytest.mark.slow
def test_the_last_three_end_with_pictures(checkout):
    for command in COMMANDS[2:]:
        words = shlex.split(command)[1:]
        if "train_net.py" in words:
            words.append("train.eval_period=0")  # of ten evaluations the last is enough here
        done = user_commands.call(words, checkout)
        if "check_dataset" in command:
            assert "Ready to train" in done.stdout
    drawn = sorted(path.name for path in (checkout / "drawn").iterdir())
    assert drawn == sorted(path.name for path in (checkout / "my" / "images").iterdir())
