"""Class names in other scripts, with signs that mean something to matplotlib, or without a font."""

import base64
import logging

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure

from detection_toolkit.visualization import draw_detections, fonts
from detection_toolkit.visualization.fonts import DEFAULT_FONT, drawable, find_fonts, use_fonts
from detection_toolkit.visualization.report_charts import chart_classes, chart_confusion

NOBODYS = "\U0010f0f0"  # for private use, and of no font


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """What was found out about fonts is found out anew, and anew after the test."""

    def forget():
        for function in (fonts._font_of, fonts._installed, fonts._characters):
            function.cache_clear()

    forget()
    monkeypatch.setattr(fonts, "_warned", set())
    yield
    forget()


@pytest.fixture
def own_font(tmp_path, monkeypatch):
    """A font with one character, which no other has: a square."""
    pen = TTGlyphPen(None)
    for move, *points in [((100, 0), (100, 700), (800, 700), (800, 0))]:
        pen.moveTo(move)
        for point in points:
            pen.lineTo(point)
        pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(NOBODYS): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "square": (900, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Test Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    path = tmp_path / "squares.ttf"
    builder.save(path)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(str(path))
    return "Test Squares"


def draw(name):
    instances = Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 50.0, 40.0]])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([0]),
    )
    image = np.full((60, 80, 3), 120, np.uint8)
    return draw_detections(image, instances, Metadata(thing_classes=[name]), scale=4)


def test_a_font_that_has_the_character_is_taken(own_font, caplog):
    assert find_fonts(["круг", "étoile"]) == [DEFAULT_FONT]
    assert find_fonts([f"a {NOBODYS}", "b"]) == [DEFAULT_FONT, own_font]
    assert drawable(f"a {NOBODYS}") == f"a {NOBODYS}"
    draw(f"a {NOBODYS}")
    assert not caplog.records


def test_all_texts_of_a_figure_get_the_font(own_font):
    figure = Figure()
    axis = figure.subplots()
    axis.set_yticks([0, 1], [NOBODYS, "b"])
    axis.set_title("plain")
    use_fonts(figure)
    (family,) = {tuple(t.get_fontfamily()) for t in (axis.title, *axis.get_yticklabels())}
    assert family == (DEFAULT_FONT, own_font)


def test_what_no_font_has_is_written_as_its_number_and_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert drawable(f"a{NOBODYS}") == "a\\U0010f0f0"
        drawable(f"b{NOBODYS}")
        draw(f"c{NOBODYS}")
    (record,) = caplog.records
    message = record.getMessage()
    assert "the characters \\U0010f0f0 of" in message and "fonts-noto-cjk" in message


@pytest.mark.parametrize(
    "name, expected",
    [
        ("x%s{0}", "x%s{0}"),
        ('<b>sq & "x"</b>', '<b>sq & "x"</b>'),
        ("$a and $b", r"\$a and \$b"),
        ("two\nlines\tand \u202eturned", "two lines and turned"),
    ],
)
def test_signs_that_mean_something_elsewhere(name, expected):
    assert drawable(name) == expected
    draw(name)


def test_charts_of_a_report_have_any_class_name():
    names = ["$a and $b", "круг", f"c{NOBODYS}"]
    for chart in (
        chart_classes(names, [1.0, 2.0, None]),
        chart_confusion(np.eye(4, dtype=int), names),
    ):
        assert base64.b64decode(chart.partition(",")[2]).startswith(b"<?xml")
