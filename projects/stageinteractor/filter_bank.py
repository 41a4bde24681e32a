"""The dynamic filter bank: what the stages share with one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["DynamicFilters", "FilterBank"]


class DynamicFilters(NamedTuple):
    """The filters that one stage generated from its queries.

    Letters: B images, N queries, G groups, e = channels of a group, O output points, P base
    points, Q sub-points of a base point.
    """

    channel: Tensor
    """(B, N, G, e, e) channel mixing filter M, applied as X M, before any adaptation."""
    spatial: Tensor
    """(B, N, G, O, P, Q) spatial mixing filters as finally applied."""


@dataclass(frozen=True)
class FilterBank:
    """Filters of earlier stages, oldest first.

    A bank is never changed in place: :meth:`deposit` returns the next bank. So a bank can be
    handed to several consumers, and each path through the stages keeps its own.
    """

    entries: tuple[DynamicFilters, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def deposit(self, filters: DynamicFilters) -> FilterBank:
        """The bank after a stage has added its filters."""
        return FilterBank((*self.entries, filters))

    def newest(self, count: int) -> tuple[DynamicFilters, ...]:
        """The ``count`` newest entries, oldest first.

        Raises:
            ValueError: the bank holds fewer.
        """
        if count > len(self):
            raise ValueError(
                f"a stage asks for {count} earlier filters, but the bank holds {len(self)}"
            )
        return self.entries[len(self) - count :]
