"""What a process does with memory that it has freed.

glibc returns large blocks to the system at once, and the system fills them with zeros when they are
asked for again. A detector frees and asks for the same maps in each layer: on a CPU the zeros take
a third of its time or more. So the commands that detect or train keep it; a program that only
uses parts of this project decides for itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["keep_freed_memory", "keep_memory_on_cpu"]

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep what it frees for its own next use, unless the user has chosen.

    Its memory then stays at its peak. Linux with glibc only.

    Args:
        environ: with a ``MALLOC_...`` variable or ``GLIBC_TUNABLES`` in it, nothing is changed.

    Returns:
        whether it is so now.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):  # another C library
        return False


def keep_memory_on_cpu(model: nn.Module) -> None:
    """For a command whose model computes on a CPU: :func:`keep_freed_memory`."""
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
