"""What a process does with memory that it has freed."""

import os
import platform
import subprocess
import sys

import pytest

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
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
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
