"""Checks and measurements on a GPU, in stages with time limits, as one report.

A process of its own runs the stages (:mod:`.worker`), so that one that hangs or crashes can be
ended; :mod:`.supervisor` watches it and writes the report after each. The command line is
tools/gpu_report.py.
"""

from .plan import GpuPlan
from .stages import STAGES
from .supervisor import supervise
from .tables import short_table
from .worker import work

__all__ = ["STAGES", "GpuPlan", "short_table", "supervise", "work"]
