"""Limits, and the comparison of one quantity with its reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

__all__ = ["Limit", "Measurement", "PIXELS", "Row", "exact", "gradient", "loss", "pixels", "value"]

PIXELS = 5e-3
LOSS = 1e-5
GRADIENT = 2e-3
GRADIENT_FLOOR = 1e-4


@dataclass(frozen=True)
class Limit:
    """How far a quantity may lie from its reference.

    An element may differ by ``absolute`` (a number, or one a column) plus ``relative`` times the
    reference. With ``as_norm`` the arrays are compared as vectors, by L2 norm, where references
    shorter than ``floor`` count as ``floor``.
    """

    absolute: float | tuple[float, ...] = 0.0
    relative: float = 0.0
    as_norm: bool = False
    floor: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether nothing may differ."""
        return self == Limit()

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


def value(atol: float) -> Limit:
    """Logits, features, filters."""
    return Limit(absolute=atol)


def pixels() -> Limit:
    """Boxes, sampling points."""
    return Limit(absolute=PIXELS)


def geometry(atol: float, others: int) -> Limit:
    """x and y in pixels, then ``others`` columns that are logarithms."""
    return Limit(absolute=(PIXELS, PIXELS, *[atol] * others))


def loss() -> Limit:
    """Losses and what they are divided by."""
    return Limit(relative=LOSS)


def exact() -> Limit:
    """Indices, labels, targets."""
    return Limit()


def gradient(name: str, largest_norm: float) -> Limit:
    """Gradients and their norms.

    Args:
        name: official name of the parameter. The inputs of ``iof_tau`` reach log 1e-7, so its
            gradient is less certain.
        largest_norm: of all parameters; a share of it is the least norm to compare with.
    """
    relative = 1e-2 if name.endswith("iof_tau") else GRADIENT
    return Limit(relative=relative, as_norm=True, floor=GRADIENT_FLOOR * largest_norm)


@dataclass(frozen=True)
class Measurement:
    """Our value of a quantity, and the arrays of the case that are thereby compared."""

    quantity: str
    ours: Any
    reference: np.ndarray
    limit: Limit
    covers: tuple[str, ...] = ()
    """Names of the compared arrays; the quantity's own by default."""
    settled: str = ""
    """Verdict of a comparison that was made elsewhere, starting with "ok" or "FAIL"."""

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
    covers: tuple[str, ...] = ()
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
    covers = m.covers or (m.quantity,)
    ours, reference = to_array(m.ours), np.asarray(m.reference)
    if ours.shape != reference.shape:
        verdict = f"FAIL shape {ours.shape}, reference {reference.shape}"
        return Row(m.quantity, np.inf, np.inf, np.inf, str(m.limit), verdict, covers)
    if reference.dtype.kind not in "fiub":
        same = bool((ours == reference).all())
        distance = 0.0 if same else np.inf
        verdict = m.settled or ("ok" if same else "FAIL not identical")
        return Row(m.quantity, distance, distance, distance, "identical", verdict, covers)
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
    return Row(m.quantity, max_abs, max_rel, excess, str(m.limit), m.settled or verdict, covers)


def _excess(difference: np.ndarray, reference: np.ndarray, limit: Limit) -> float:
    if difference.size == 0 or not difference.any():
        return 0.0
    if not np.isfinite(difference).all() or limit.is_exact:
        return np.inf
    if limit.as_norm:
        allowed = limit.relative * max(float(np.linalg.norm(reference)), limit.floor)
        return float(np.linalg.norm(difference)) / allowed if allowed > 0 else np.inf
    allowed = np.asarray(limit.absolute) + limit.relative * np.abs(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(difference == 0, 0.0, difference / allowed)))


def to_array(x: Any) -> np.ndarray:
    """Tensor, number or array -> array; half precision as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    return np.asarray(x)
