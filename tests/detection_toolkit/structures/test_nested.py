from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detection_toolkit.structures import map_tensors


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class Entries:
    entries: tuple[Pair, ...]
    name: str = "bank"


def make(number):
    pair = Pair(torch.tensor([number]), None)
    return {"entries": Entries((pair, pair)), "rest": (torch.tensor(number), "text")}


def test_tensors_of_equal_places_are_combined_and_the_nesting_stays():
    result = map_tensors(lambda *x: torch.stack(x).sum(0), make(1), make(2), make(4))
    assert result["entries"].entries[1].first.tolist() == [7]
    assert isinstance(result["entries"].entries[0], Pair)
    assert result["entries"].entries[0].second is None and result["entries"].name == "bank"
    assert result["rest"][0].item() == 7 and result["rest"][1] == "text"


def test_nothing_is_changed_in_place():
    value = make(1)
    map_tensors(lambda x: x + 1, value)
    assert value["rest"][0].item() == 1
