"""The table of DFvT's costs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The command lines in tools/ are no package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import analyze_dfvt  # noqa: E402


@pytest.fixture
def small_images(monkeypatch):
    monkeypatch.setattr(analyze_dfvt, "HEIGHT", 64)
    monkeypatch.setattr(analyze_dfvt, "WIDTH", 96)


def test_table_holds_the_published_numbers(small_images, capsys):
    assert analyze_dfvt.main(["--variants", "tiny", "--skip-detector"]) == 0
    cells = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    rows = {row.strip(): value.strip() for row, value in cells}
    assert rows["classifier: parameters"] == "3,967,627"
    assert rows["classifier: convolutions and linear layers, G"] == "0.2968"
    assert rows["classifier: the authors print, G"] == "0.2714"
    assert rows["backbone: parameters"] == "3,680,067"
    assert rows["backbone: of these the output convolutions"] == "96,768"


def test_output_convolutions_by_hand(capsys):
    backbone = analyze_dfvt.DFvTBackbone(**analyze_dfvt.VARIANTS["tiny"])
    images = analyze_dfvt.torch.zeros(1, 3, 64, 96)
    macs, fusion = analyze_dfvt.count_macs(backbone, (images,), part="fuse")
    # 2 C to C channels at strides 4, 8 and 16.
    places = [(64 // s) * (96 // s) for s in (4, 8, 16)]
    assert fusion.flops == sum(n * 2 * c * c for n, c in zip(places, (48, 96, 192)))
    assert 0 < fusion.flops / 1e9 < macs["conv"]
