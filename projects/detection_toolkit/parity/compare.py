"""What is compared, within which limits, and the comparison itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = [
    "EXACT",
    "LOSS",
    "NORMALIZER",
    "PIXELS",
    "Limit",
    "Measurement",
    "Quantity",
    "Row",
    "Table",
    "expand",
    "geometry",
    "gradient",
    "not_finite",
    "of_part",
    "value",
]


@dataclass(frozen=True)
class Limit:
    """How far a quantity may lie from its reference.

    An element may differ by ``absolute`` (a number, or one a column) plus ``relative`` times the
    reference. With ``as_norm`` the arrays are compared as vectors, by L2 norm, where references
    shorter than ``floor`` count as ``floor``. Where the reference of a relative limit is infinite
    or no number, as without any object in the batch, when it divides by zero, ours must be finite.
    """

    absolute: float | tuple[float, ...] = 0.0
    relative: float = 0.0
    as_norm: bool = False
    floor: float = 0.0
    settle: Callable[[np.ndarray, np.ndarray], str] | None = field(default=None, compare=False)
    """(ours, reference) -> a verdict that needs no comparison, starting with "ok" or "FAIL"; empty
    if there is none."""

    @property
    def is_exact(self) -> bool:
        """Whether nothing may differ."""
        return self == EXACT

    def __str__(self) -> str:
        if self.is_exact:
            return "identical"
        if self.as_norm:
            return f"{self.relative:g} rel"
        columns = (self.absolute,) if isinstance(self.absolute, float) else self.absolute
        parts = []
        if any(columns):
            parts.append("/".join(f"{x:g}" for x in dict.fromkeys(columns)) + " abs")
        if self.relative:
            parts.append(f"{self.relative:g} rel")
        return " + ".join(parts)


def _no_object(ours: np.ndarray, reference: np.ndarray) -> str:
    same = reference == 0 and ours == 1
    return "ok (no object: the reference divides by 0, we by 1)" if same else ""


def _no_gradient(ours: np.ndarray, reference: np.ndarray) -> str:
    # In place of a norm, -1 says that there is no gradient.
    none = reference.ndim == 0 and reference == -1 and ours == 0
    return "ok (no gradient on either side)" if none else ""


EXACT = Limit()
"""Indices, labels, targets."""
PIXELS = Limit(absolute=5e-3)
"""Boxes, sampling points."""
LOSS = Limit(relative=1e-5)
"""Losses."""
NORMALIZER = replace(LOSS, settle=_no_object)
"""What losses are divided by."""


def value(atol: float) -> Limit:
    """Logits, features, filters."""
    return Limit(absolute=atol)


def geometry(atol: float, logarithms: int = 2) -> Limit:
    """x and y in pixels, then columns that are logarithms."""
    pixels = float(np.max(PIXELS.absolute))
    return Limit(absolute=(pixels, pixels, *[atol] * logarithms))


def gradient(largest_norm: float, relative: float = 2e-3) -> Limit:
    """Gradients and their norms.

    Args:
        largest_norm: of all parameters; a share of it is the least norm to compare with.
        relative: share of the norm that the difference may have.
    """
    return Limit(relative=relative, as_norm=True, floor=1e-4 * largest_norm, settle=_no_gradient)


AnyLimit = Limit | Callable[[float], Limit]  # or how it follows from ``Settings.atol``
Table = Mapping[str, tuple[AnyLimit, Callable[..., Any]]]
"""Name of an array -> its limit, and how a run of the case has ours: (run, *indices) -> value."""


@dataclass(frozen=True)
class Quantity:
    """An array of a case, and what it is compared with."""

    name: str
    limit: AnyLimit
    ours: Callable[[Any], Any]
    """run of the case -> our value."""
    optional: bool = False
    """Compared if the case has it; otherwise a case without it is incomplete."""


def expand(
    table: Table, prefix: str = "", *indices: int, optional: bool = False
) -> Iterator[Quantity]:
    """The quantities of a table at one place.

    Args:
        table: names and how to get them.
        prefix: of the place, before each name.
        indices: of the place, for each entry's function.
        optional: see :class:`Quantity`.
    """
    for name, (limit, ours) in table.items():
        yield Quantity(prefix + name, limit, partial(_call, ours, indices), optional)


def of_part(part: Any, quantities: Iterable[Quantity]) -> Iterator[Quantity]:
    """The quantities of one of several runs: each is then given a mapping of runs."""
    for quantity in quantities:
        ours = quantity.ours
        yield replace(quantity, ours=lambda runs, ours=ours: ours(runs[part]))


def _call(ours: Callable[..., Any], indices: tuple[int, ...], run: Any) -> Any:
    return ours(run, *indices)


@dataclass(frozen=True)
class Measurement:
    """Our value of a quantity, and the reference."""

    quantity: str
    ours: Any
    reference: np.ndarray
    limit: Limit

    def row(self) -> Row:
        """Compare."""
        return _compare(self)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantity: str
    max_abs: float
    max_rel: float
    excess: float
    """Largest difference in units of the limit; above 1 is out of tolerance."""
    limit: str
    verdict: str
    by_rounding: bool = False
    """Accepted only after a closer look at rounding."""

    @property
    def ok(self) -> bool:
        """Within tolerance."""
        return self.verdict.startswith("ok")

    def accepted(self, verdict: str) -> Row:
        """The same row, accepted for a reason."""
        return replace(self, verdict=verdict, by_rounding=True)


def _compare(m: Measurement) -> Row:
    ours, reference = to_array(m.ours), np.asarray(m.reference)
    if ours.shape != reference.shape:
        verdict = f"FAIL shape {ours.shape}, reference {reference.shape}"
        return Row(m.quantity, np.inf, np.inf, np.inf, str(m.limit), verdict)
    settled = m.limit.settle(ours, reference) if m.limit.settle else ""
    if m.limit.relative:
        settled = not_finite(ours, reference) or settled
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    # Equal infinities have no difference; any other non-finite number can only fail.
    with np.errstate(invalid="ignore"):
        difference = np.where(ours == reference, 0.0, np.abs(ours - reference))
    difference = np.where(np.isnan(difference), np.inf, difference)
    largest = float(np.max(np.abs(reference), initial=0.0))
    max_abs = float(np.max(difference, initial=0.0))
    max_rel = max_abs / largest if largest > 0 else (0.0 if max_abs == 0 else np.inf)
    excess = _excess(difference, reference, m.limit)
    verdict = "ok" if excess <= 1 else "FAIL"
    if m.limit.as_norm:
        length = max(float(np.linalg.norm(reference)), m.limit.floor)
        max_rel = float(np.linalg.norm(difference)) / length if length > 0 else max_rel
    return Row(m.quantity, max_abs, max_rel, excess, str(m.limit), settled or verdict)


def _excess(difference: np.ndarray, reference: np.ndarray, limit: Limit) -> float:
    if difference.size == 0 or not difference.any():
        return 0.0
    if not np.isfinite(difference).all() or limit.is_exact:
        return np.inf
    if limit.as_norm:
        allowed = limit.relative * max(float(np.linalg.norm(reference)), limit.floor)
        return float(np.linalg.norm(difference)) / allowed if allowed > 0 else np.inf
    tolerance = np.asarray(limit.absolute) + limit.relative * np.abs(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(difference == 0, 0.0, difference / tolerance)))


def not_finite(ours: np.ndarray, reference: np.ndarray) -> str:
    """Verdict where the reference is infinite or no number: ours must be finite. Empty if the
    reference is finite."""
    if np.isfinite(reference).all():
        return ""
    if np.isfinite(ours).all():
        return "ok (reference not finite, ours finite)"
    return "FAIL ours is not finite either"


def to_array(x: Any) -> np.ndarray:
    """Tensor, number or array -> array; half precision as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    return np.asarray(x)
