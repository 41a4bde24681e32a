"""File systems of their own, which fill up or take nothing."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, kilobytes, *, read_only=False):
    """A file system of its own in ``folder``; skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=10)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=10)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)
