"""Recordings on a CPU, where what stands for a CUDA graph calls the function again."""

import copy
import pickle
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from detection_toolkit.modeling.constants import constants
from detection_toolkit.modeling.recording import Recordings


@pytest.fixture
def recordings(monkeypatch):
    """At most two; ``made`` counts."""
    made = Recordings(limit=2)
    made.made = 0

    def record(self, function, inputs):
        self.made += 1
        return lambda inputs: function(*inputs)

    monkeypatch.setattr(Recordings, "_record", record)
    return made


def double(x):
    return (2 * x,)


def test_each_size_is_recorded_once_and_the_one_unused_for_longest_is_forgotten(recordings):
    sizes = [(2, 3), (2, 4), (2, 3), (2, 5), (2, 3), (2, 4)]
    recorded = []
    for size in sizes:
        x = torch.rand(size)
        (result,) = recordings(double, [x], [])
        assert torch.equal(result, 2 * x)
        recorded.append(recordings.made)
    assert recorded == [1, 2, 2, 3, 3, 4]
    assert len(recordings) == 2


def test_all_is_recorded_anew_where_weights_have_moved_and_not_where_they_have_changed(recordings):
    layer = torch.nn.Linear(3, 3)
    x = torch.rand(2, 3)
    for _ in range(2):
        recordings(lambda x: (layer(x),), [x], layer.parameters())
        with torch.no_grad():
            layer.weight += 1
    assert recordings.made == 1
    layer.weight = torch.nn.Parameter(layer.weight.clone())
    recordings(lambda x: (layer(x),), [x], layer.parameters())
    assert (recordings.made, len(recordings)) == (2, 1)


def test_a_recording_is_of_one_precision(recordings):
    x = torch.rand(2, 3)
    with torch.autocast("cuda", torch.bfloat16, enabled=False):
        recordings(double, [x], [])
    torch.use_deterministic_algorithms(True)
    try:
        recordings(double, [x], [])
    finally:
        torch.use_deterministic_algorithms(False)
    assert recordings.made == 2


def test_copies_are_empty(recordings):
    recordings(double, [torch.rand(2)], [])
    assert len(copy.deepcopy(recordings)) == len(pickle.loads(pickle.dumps(recordings))) == 0


def test_a_recording_holds_the_constants_that_its_graph_reads(monkeypatch):
    for name in ("current_stream", "Stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    read = []

    def numbers(values):
        return constants(values, dtype=torch.long, device=torch.device("cpu"))

    def times(x):
        factor = numbers([7, 9])
        read.append(weakref.ref(factor))
        return (factor * x,)

    recordings = Recordings()
    recordings(times, [torch.ones(2)], [])
    for n in range(1000):  # of images of other sizes
        numbers([n])
    assert read[-1]() is not None
    assert numbers([7, 9]) is not read[-1]()
