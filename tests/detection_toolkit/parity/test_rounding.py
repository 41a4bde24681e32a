"""The closer look at rounding accepts what rounding explains, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.utils.registry import Registry

from detection_toolkit.parity import Case, CaseKind, Inputs, Quantity, Settings
from detection_toolkit.parity import runner as parity_runner
from detection_toolkit.parity.compare import gradient, value

KINK = float(np.float32(0.3))


class StepCase(CaseKind):
    """A "gradient" that jumps by ten percent where the input crosses 0.3, as at a kink."""

    title = "step"
    limit = gradient(1.0)

    @classmethod
    def matches(cls, case):
        return "x" in case.names

    def quantities(self):
        return [Quantity("y", self.limit, lambda y: y)]

    def compute(self, settings):
        x = Inputs(self.case, settings).tensor("x")
        return torch.where(x > KINK, 1.1, 1.0).to(x.dtype)


class NoisyCase(StepCase):
    """A value that amplifies the last bit of its input."""

    amplification = 1e4
    limit = value(1e-4)

    def compute(self, settings):
        x = Inputs(self.case, settings).tensor("x")
        return (x.double() - KINK) * self.amplification


@pytest.fixture
def only_kind(monkeypatch, tmp_path):
    def prepare(kind, y):
        kinds = Registry("CASE_KINDS")
        kinds.register(kind)
        monkeypatch.setattr(parity_runner, "CASE_KINDS", kinds)
        path = tmp_path / "case.npz"
        np.savez(path, x=np.float32(KINK), y=np.float32(y))
        return path

    return prepare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_side_of_a_kink_is_accepted_and_said(only_kind, dtype):
    report = parity_runner.check_case(only_kind(StepCase, 1.1), Settings(dtype=dtype))
    (row,) = report.rows
    assert row.ok and row.by_rounding
    assert "last bit of the inputs" in row.verdict
    assert row.max_abs == pytest.approx(0.1)  # of the run itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_bits_are_changed_in_float64_which_every_machine_rounds_alike(only_kind, dtype):
    looks = []

    class Watched(StepCase):
        def compute(self, settings):
            if settings.last_bit_seed is not None:
                looks.append(settings.dtype)
            return super().compute(settings)

    assert not parity_runner.check_case(only_kind(Watched, 1.2), Settings(dtype=dtype)).ok
    assert looks == [torch.float64] * parity_runner.LAST_BIT_RUNS


@pytest.mark.parametrize("y", [1.05, 1.2, 0.9])
def test_values_on_neither_side_of_a_kink_fail(only_kind, y):
    report = parity_runner.check_case(only_kind(StepCase, y), Settings())
    assert not report.ok
    assert report.rows[0].verdict == "FAIL"


def test_rounding_of_float32_alone_is_settled_in_float64(only_kind):
    class Float32Noise(StepCase):
        limit = value(1e-4)

        def compute(self, settings):
            noise = 1.0 if settings.dtype is torch.float32 else 0.0
            return super().compute(settings) + noise

    report = parity_runner.check_case(only_kind(Float32Noise, 1.0), Settings())
    assert report.ok
    assert report.rows[0].verdict.startswith("ok (float64:")


def test_a_limit_finer_than_rounding_is_said_to_be_so(only_kind):
    # One unit in the last place of 0.3 is 3e-8, so that the value scatters by 3e-4.
    report = parity_runner.check_case(only_kind(NoisyCase, 5e-4), Settings())
    assert report.ok
    assert "limits from float64, around which float32 scatters" in report.rows[0].verdict


@pytest.mark.parametrize("y", [2e-3, -2e-3, 5e-2])
def test_what_rounding_does_not_reach_fails(only_kind, y):
    assert not parity_runner.check_case(only_kind(NoisyCase, y), Settings()).ok


def test_even_wild_scatter_accepts_only_ten_limits(only_kind):
    class Wild(NoisyCase):
        amplification = 1e6

    assert not parity_runner.check_case(only_kind(Wild, 5e-3), Settings()).ok


def test_last_bit_changes_are_last_bit_changes(only_kind):
    path = only_kind(StepCase, 1.0)
    case = Case(path)
    found = {float(Inputs(case, Settings(last_bit_seed=seed)).tensor("x")) for seed in range(20)}
    neighbours = [np.nextafter(np.float32(KINK), np.float32(to)) for to in (0, 1)]
    assert found == {KINK, *map(float, neighbours)}
    assert float(Inputs(case, Settings(last_bit_seed=1)).tensor("x", exact=True)) == KINK
