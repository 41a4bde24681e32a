"""Comparison with numeric reference cases; the command line is ``tools/check_parity.py``.

A further kind of case is a subclass of :class:`CaseKind` with ``@register_kind``, in a module that
is imported here.
"""

from . import (  # noqa: F401
    adamixer_case,
    assigner_case,
    backbone_case,
    dfvt_case,
    sqr_case,
    stageinteractor_case,
)
from .case import Case, CaseError, Settings
from .compare import Limit, Measurement, Row
from .runner import CaseKind, Layout, Report, check_case, register_kind

__all__ = [
    "Case",
    "CaseError",
    "CaseKind",
    "Layout",
    "Limit",
    "Measurement",
    "Report",
    "Row",
    "Settings",
    "check_case",
    "register_kind",
]
