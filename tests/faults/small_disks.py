"""File systems of their own, which fill up or take nothing."""

import contextlib

import patience
import pytest


@contextlib.contextmanager
def small_disk(folder, kilobytes, *, read_only=False):
    """A file system of its own in ``folder``; skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = patience.run(mount)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        if read_only:
            patience.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
    finally:
        patience.run(["umount", "-l", str(folder)], check=True)
