"""Names and pictures of strangers: classes, files, formats."""

import ast
import io
import json
import logging

import numpy as np
import pytest
from coco_files import make_document, write_dataset
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from fault_runs import ROOT, load_tool
from PIL import Image
from torch import tensor

from detection_toolkit.data.images import (
    PICTURE_FORMATS,
    PICTURE_SUFFIXES,
    UnreadableImageError,
    read_image,
    shown_size,
)
from detection_toolkit.engine import user_errors
from detection_toolkit.errors import UserError
from detection_toolkit.studies.tables import _classes
from detection_toolkit.texts import Printable, in_markdown, printable, shown
from detection_toolkit.visualization import draw_detections, plot_convergence, plot_loss_curves
from detection_toolkit.visualization.fonts import drawable
from detection_toolkit.visualization.report_charts import format_table, render_page

Image.init()
OTHER_FORMATS = sorted(set(Image.SAVE) & set(Image.OPEN) - {*PICTURE_FORMATS, "DIB"})
HEADERS = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(400),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(80),
}


def encoded(kind):
    buffer = io.BytesIO()
    for mode in ("RGB", "L", "1", "P", "F"):
        try:
            Image.new(mode, (32, 32)).save(buffer, format=kind)
            return buffer.getvalue()
        except Exception:  # the format has other modes, or needs a library
            buffer = io.BytesIO()
    return None


def test_there_are_formats_to_refuse():
    assert len(OTHER_FORMATS) > 8


@pytest.mark.parametrize("kind", [*OTHER_FORMATS, *HEADERS])
def test_formats_of_no_picture_are_refused_under_any_name(tmp_path, kind):
    content = HEADERS.get(kind) or encoded(kind)
    if content is None:
        pytest.skip(f"this Pillow writes no {kind}")
    for suffix in (".png", ".eps", ""):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match="cannot identify it as one of JPEG"):
            read_image(path)
        assert shown_size(path) is None


@pytest.mark.parametrize("kind", PICTURE_FORMATS)
def test_formats_of_pictures_are_read_under_any_name(tmp_path, kind):
    content = encoded(kind)
    if content is None:
        pytest.skip(f"this Pillow writes no {kind}")
    (tmp_path / "a.eps").write_bytes(content)
    assert read_image(tmp_path / "a.eps").shape == (32, 32, 3)


def test_what_is_taken_for_a_picture_by_its_name_can_be_one():
    kinds = {Image.registered_extensions()[suffix] for suffix in PICTURE_SUFFIXES}
    assert kinds <= set(PICTURE_FORMATS)


def test_nothing_else_opens_pictures():
    found = set()
    for folder in ("projects", "tools", "demo"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "Image.open",
                    "PIL.Image.open",
                    "cv2.imread",
                    "plt.imread",
                    "utils.read_image",
                ):
                    found.add(path.name)
    assert found == {"images.py"}


NAMES = [
    r"$\frac{$",
    "$",
    "$$",
    "a$b$c",
    r"\$x$",
    r"\\$\alpha$",
    r"$\undefined$",
    "^_{}",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb\rc\td\0e",
    "\u202egnp.exe",
    "\ud800",
    "x" * 100_000,
    "<script>alert(1)</script>",
    "| a | b |\n|---|",
    "[a](javascript:alert(1)) ![](http://example.org)",
    "`code` *bold* #",
    "=1+1",
    "",
    " ",
    "_hidden",
    "%s %d {} {0}",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_drawn(name, tmp_path):
    metadata = Metadata(thing_classes=[name])
    instances = Instances(
        (60, 90),
        pred_boxes=Boxes(tensor([[10.0, 10.0, 80.0, 50.0]])),
        scores=tensor([0.9]),
        pred_classes=tensor([0]),
    )
    picture = draw_detections(np.zeros((60, 90, 3), np.uint8), instances, metadata)
    assert picture.shape[2] == 3
    assert len(drawable(name)) < 2500
    assert drawable(name).isprintable()
    plot_convergence({name: [[(1, 2.0), (2, 3.0)]]}, tmp_path / "a.png", title=name)
    (tmp_path / "metrics.json").write_text(
        "\n".join(
            json.dumps({"iteration": i, "total_loss": 1.0, f"loss_{name}_stage0": 1.0})
            for i in range(3)
        )
    )
    plot_loss_curves(tmp_path / "metrics.json", tmp_path / "b.png")


def is_safe(text, but="\n"):
    return all(c.isprintable() or c in but for c in text)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_printed(name, capfd):
    assert is_safe(shown(name), but="")
    assert is_safe(printable(f"a\n{name}"), but="\n\t")
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.addFilter(Printable())
    record = logging.LogRecord("a", logging.INFO, "", 1, "class %s\x1b[32m.", (name,), None)
    if handler.filter(record):
        handler.emit(record)
    assert is_safe(stream.getvalue().replace("\x1b[32m", ""), but="\n\t")
    with pytest.raises(SystemExit) as ended, user_errors():
        raise UserError(f"class {name} is wrong")
    assert is_safe(ended.value.code, but="\n\t")


def test_what_is_printable_is_left_as_it_is():
    for text in ("cat", "Straße", "二輪車", "a b", "50 %", "🐈"):
        assert shown(text) == printable(text) == text
    record = logging.LogRecord("a", logging.INFO, "", 1, "%d %s", (3, "cat"), None)
    assert Printable().filter(record) and record.args == (3, "cat")
    assert printable("a\n\tb") == "a\n\tb"


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_cell_of_markdown_and_html(name):
    text = in_markdown(name)
    assert "\n" not in text
    assert not set(text.replace("\\" + "|", "")) & {"|"}
    for mark in "`*[]<#":
        assert text.count(mark) == text.count(f"\\{mark}")
    measures = {"AP_by_class": {name: {"mean": 1.0, "std": 0.0}, "cat": {"mean": 1.0, "std": 0.0}}}
    table = _classes({"a": measures})
    assert {line.replace("\\|", "").count("|") for line in table.splitlines()} == {4}
    assert "<script" not in table
    page = render_page(name, [(name.strip() or "a", [("html", format_table([name], [[name]]))])])
    assert "<script" not in page


def test_the_checker_prints_any_class_and_file(tmp_path, capsys):
    document = make_document()
    for category, name in zip(document["categories"], NAMES[8:11]):
        category["name"] = name
    document["images"][0]["file_name"] = "a\x1b[2J.png"
    json_file, root = write_dataset(tmp_path / "data", document)
    load_tool("check_dataset").main([json_file, root, "--output", str(tmp_path / "out")])
    text = capsys.readouterr()
    assert is_safe(text.out, but="\n\t")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 4
