"""Comparison with numeric reference cases; the command line is ``tools/check_parity.py``.

A further kind of case is a subclass of :class:`CaseKind` with ``@CASE_KINDS.register()``. That of a
detector stands in the module ``parity`` of the detector's package, which is imported when a case is
checked.
"""

from . import backbone  # noqa: F401  (registers its kind of case)
from .case import Case, CaseError, Inputs, Settings
from .compare import Limit, Measurement, Quantity, Row, expand
from .runner import CASE_KINDS, CaseKind, Report, check_case

__all__ = [
    "CASE_KINDS",
    "Case",
    "CaseError",
    "CaseKind",
    "Inputs",
    "Limit",
    "Measurement",
    "Quantity",
    "Report",
    "Row",
    "Settings",
    "check_case",
    "expand",
]
