"""The benchmark of the attention layer, on a small image."""

import pytest
from benchmarks import deformable_attention


def test_both_forms_are_timed_and_weighed(monkeypatch, capsys):
    monkeypatch.setattr(deformable_attention, "SIZE", (96, 160))
    deformable_attention.main(["--rounds", "1"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines] == ["forward", "and backward"]
    for line in lines:
        plain, _, ours, _, ratio, memory = line[14:].split()
        assert float(ratio) > 0 and 0 < float(memory) < 2
        if float(plain) and float(ours):
            assert float(ratio) == pytest.approx(float(plain) / float(ours), rel=0.5, abs=2)
