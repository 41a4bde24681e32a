"""Finds out what kind of case a file holds, computes it and makes the table.

Rounding. References are float32 results, and some quantities depend on the last bit: errors grow
from stage to stage, and bilinear sampling, ReLU and the absolute value have kinks, at which a
gradient jumps although the value does not. So a row that is out of tolerance gets a closer look,
and its verdict reports what was found:

1. A float32 case is repeated in float64. The row is accepted if it is within the same limit there:
   only the rounding of our own float32 run was in the way.
2. The case is computed with every weight and feature changed by at most one unit in the last place
   of float32, several times; in float64, so that the verdict does not depend on how a machine
   rounds. If one of these runs meets the reference within the same limit, rounding alone decides
   between that result and ours: the reference took the other side of a kink.
3. These runs also show how far rounding scatters a quantity around its float64 value. If the
   reference is not more than twice as far from that value, and the limit not exceeded more than
   tenfold, the limit is finer than what float32 can tell, and the row is accepted.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.utils.registry import Registry

from ..errors import UserError
from ..modeling.products import Products
from ..projects import project_names
from .case import Case, CaseError, Settings
from .compare import Limit, Measurement, Quantity, Row, to_array

__all__ = ["CASE_KINDS", "CaseKind", "Report", "check_case"]

LAST_BIT_RUNS = 8
MAX_SCATTER = 10.0  # limits

CASE_KINDS = Registry("CASE_KINDS")
CASE_KINDS.__doc__ = "Kinds of cases: subclasses of :class:`CaseKind`."


class CaseKind(ABC):
    """One layout of case files. An instance belongs to one case."""

    title: ClassVar[str]
    information: Collection[str] = ("config", "meta")
    """Arrays that describe the case without being part of the computation."""

    def __init__(self, case: Case):
        self.case = case

    @classmethod
    @abstractmethod
    def matches(cls, case: Case) -> bool:
        """Whether the case has this layout, judged by marks that no other kind has."""

    @abstractmethod
    def quantities(self) -> Iterable[Quantity]:
        """Every array that a complete case has a reference for."""

    @abstractmethod
    def compute(self, settings: Settings) -> Any:
        """Run the case: what the functions of the quantities are given."""


@dataclass(frozen=True)
class Report:
    """All rows of a case."""

    case: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is within tolerance."""
        return all(row.ok for row in self.rows)


def check_case(path: str | Path, settings: Settings) -> Report:
    """Compute a case and compare everything that it holds.

    Raises:
        FileNotFoundError, CaseError: see :class:`Case`; also for a missing array.
    """
    case = Case(path)
    kind = find_kind(case)(case)
    quantities = list(kind.quantities())
    missing = sorted({q.name for q in quantities if not q.optional} - case.names)
    if missing:
        raise CaseError(f"{case.path} ({kind.title}) lacks {len(missing)} arrays: {_some(missing)}")
    rows = [measurement.row() for measurement in _measure(kind, settings)]
    if settings.autocast is not None:
        # Half precision has no limits: what is of interest is how far it drifts.
        rows = [replace(row, verdict="ok (drift)", limit="-") for row in rows]
    elif not all(row.ok for row in rows):
        rows = _look_closer(kind, settings, rows)
    # What the case is fed with was read; what it is compared with is among the quantities.
    known = {*case.read, *kind.information, *(q.name for q in quantities)}
    rows += [
        Row(name, np.nan, np.nan, np.inf, "-", "FAIL not compared: no array of this name is known")
        for name in sorted(case.names - known)
    ]
    return Report(case.name, tuple(rows))


def find_kind(case: Case) -> type[CaseKind]:
    """The kind of a case.

    Raises:
        CaseError: no kind has this layout.
    """
    for name in project_names():
        if find_spec(f"{name}.parity"):
            import_module(f"{name}.parity")
    kinds = [kind for _, kind in CASE_KINDS]
    for kind in kinds:
        if kind.matches(case):
            return kind
    known = ", ".join(kind.title for kind in kinds)
    hint = "" if "config" in case.names else "; it has no array 'config'"
    raise CaseError(
        f"{case.path} has none of the known layouts ({known}){hint}; "
        f"its arrays are {_some(sorted(case.names))}"
    )


def _measure(kind: CaseKind, settings: Settings) -> list[Measurement]:
    case = kind.case
    autocast = contextlib.nullcontext()
    if settings.autocast is not None:
        autocast = torch.autocast(torch.device(settings.device).type, settings.autocast)
    try:
        # Parts of detectors are too small for auto.
        products = Products(settings.execution.products, parameters=0)
        with autocast, products.forward(torch.device(settings.device).type):
            run = kind.compute(settings)
            return [
                Measurement(q.name, q.ours(run), case.array(q.name), _limit(q, settings.atol))
                for q in kind.quantities()
                if q.name in case.names
            ]
    except CaseError:
        raise
    except UserError as error:
        raise CaseError(f"{case.path}: {error}") from error
    except (ArithmeticError, IndexError, RuntimeError) as error:
        # What names and converter let through may still be of the wrong shape or out of range.
        raise CaseError(f"{case.path} cannot be computed: {error}") from error


def _limit(quantity: Quantity, atol: float) -> Limit:
    return quantity.limit if isinstance(quantity.limit, Limit) else quantity.limit(atol)


def _look_closer(kind: CaseKind, settings: Settings, rows: list[Row]) -> list[Row]:
    rows = list(rows)
    double = _measure(kind, replace(settings, dtype=torch.float64))
    in_double = [measurement.row() for measurement in double]
    for i, other in enumerate(in_double):
        if not rows[i].ok and other.ok:
            rows[i] = rows[i].accepted(
                f"ok (float64: {other.max_abs:.1e} abs, {other.max_rel:.1e} rel; float32 rounding)"
            )
    scatter = [0.0] * len(rows)
    for seed in range(LAST_BIT_RUNS):
        failing = [i for i, row in enumerate(rows) if not row.ok and _may_be_rounding(row)]
        if not failing:
            return rows
        nearby = _measure(kind, replace(settings, dtype=torch.float64, last_bit_seed=seed))
        for i in failing:
            other = nearby[i].row()
            if other.ok:
                rows[i] = rows[i].accepted(
                    f"ok (last bit of the inputs: {other.max_abs:.1e} abs, "
                    f"{other.max_rel:.1e} rel; rounding)"
                )
            limit = replace(nearby[i].limit, settle=None)
            to_double = replace(nearby[i], reference=to_array(double[i].ours), limit=limit)
            scatter[i] = max(scatter[i], to_double.row().excess)
    for i, row in enumerate(rows):
        distance = in_double[i].excess
        if not row.ok and distance <= min(2 * scatter[i], MAX_SCATTER):
            rows[i] = row.accepted(
                f"ok ({distance:.2g} limits from float64, around which float32 scatters by "
                f"{scatter[i]:.2g}; rounding)"
            )
    return rows


def _may_be_rounding(row: Row) -> bool:
    # A kink moves a gradient by some percent; what is a hundred limits away is simply different.
    return row.excess <= 100 or row.limit == "identical"


def _some(names: Sequence[str], count: int = 12) -> str:
    more = f", ... and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
