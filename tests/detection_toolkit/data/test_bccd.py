"""BCCD from an archive in the layout of its repository, through a server on this machine."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import fetch_bccd as tool
import numpy as np
import pytest

from detection_toolkit.data import bccd
from detection_toolkit.data.bccd import bccd_folder, convert_bccd, fetch_bccd
from detection_toolkit.data.inspection import inspect_dataset
from detection_toolkit.errors import UserError

BOXES = {
    "BloodImage_00003": [("RBC", 5, 6, 25, 36), ("Platelets", 1, 1, 9, 8)],
    "BloodImage_00001": [("WBC", 10, 20, 40, 44), ("RBC", 7, 7, 7, 20)],  # the latter without area
    "BloodImage_00000": [("RBC", 1, 2, 3, 4)],
    "BloodImage_00002": [],
}
SPLITS = {
    "train": ["BloodImage_00003", "BloodImage_00001"],
    "val": ["BloodImage_00000"],
    "test": ["BloodImage_00002"],
}


def xml(boxes) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def make_archive(**changes: str | None) -> bytes:
    """The repository's ZIP; ``changes`` are files with other text, or None to leave one out."""
    files: dict[str, bytes] = {"LICENSE": b"MIT", "README.md": b"BCCD"}
    for split, names in SPLITS.items():
        # As in the repository, with and without a last line end.
        files[f"BCCD/ImageSets/Main/{split}.txt"] = "\n".join(names).encode()
    for i, (name, boxes) in enumerate(BOXES.items()):
        files[f"BCCD/Annotations/{name}.xml"] = xml(boxes).encode()
        files[f"BCCD/JPEGImages/{name}.jpg"] = jpeg(i)
    for name, text in changes.items():
        if text is None:
            del files[name]
        else:
            files[name] = text.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"BCCD_Dataset-master/{name}", content)
    return packed.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """Starts a server of one answer; returns its address, and notes what was asked for."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers = []

    def start(content: bytes, status: int = 200, length: int | None = None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/archive/master.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def read(folder: Path, split: str):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def test_images_boxes_and_ids(serve, tmp_path):
    _, url = serve(make_archive())
    folder = tmp_path / "new" / "bccd"
    assert fetch_bccd(folder, url) == {"train": (2, 3), "val": (1, 1), "test": (1, 0)}
    train = read(folder, "train")
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in train["images"]] == [
        (1, "BloodImage_00001.jpg", 64, 48),
        (2, "BloodImage_00003.jpg", 64, 48),
    ]
    assert [
        (a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"])
        for a in train["annotations"]
    ] == [
        (1, 1, 2, [10, 20, 30, 24], 720),
        (2, 2, 1, [5, 6, 20, 30], 600),
        (3, 2, 3, [1, 1, 8, 7], 56),
    ]
    val = read(folder, "val")
    assert val["images"][0]["id"] == 3 and val["annotations"][0]["id"] == 4
    assert [c["name"] for c in val["categories"]] == ["RBC", "WBC", "Platelets"]
    assert (folder / "LICENSE").read_text() == "MIT"
    assert (folder / "images" / "BloodImage_00002.jpg").read_bytes() == jpeg(3)
    assert list(folder.parent.iterdir()) == [folder]


def test_the_checker_finds_nothing_that_stops_training(tmp_path):
    convert_bccd(io.BytesIO(make_archive()), tmp_path / "bccd")
    json_file = str(tmp_path / "bccd" / "annotations" / "train.json")
    report = inspect_dataset(json_file, str(tmp_path / "bccd" / "images"))
    assert not [f for f in report.findings if f.harm], report.findings


def test_through_a_proxy_of_the_environment(serve, tmp_path, monkeypatch):
    proxy, url = serve(make_archive())
    monkeypatch.setenv("http_proxy", url.split("/archive")[0])
    fetch_bccd(tmp_path / "bccd", "http://nowhere.invalid/master.zip")
    assert proxy.asked == ["http://nowhere.invalid/master.zip"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", {"status": 404}, "cannot be fetched: Not Found"),
        (b"<html>log in</html>", {}, "is damaged or incomplete"),
        (make_archive()[:-40], {"length": len(make_archive())}, "is damaged or incomplete"),
    ],
    ids=["no such page", "a page of something else", "a connection that ends"],
)
def test_answers_that_are_no_archive_leave_nothing(serve, tmp_path, content, options, said):
    _, url = serve(content, **options)
    with pytest.raises(UserError, match=said):
        fetch_bccd(tmp_path / "bccd", url)
    assert list(tmp_path.iterdir()) == []


def test_no_network_names_proxy_and_archive(serve, tmp_path):
    server, url = serve(b"")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be fetched.*https_proxy.*--archive"):
        fetch_bccd(tmp_path / "bccd", url)


FIRST = "BCCD/Annotations/BloodImage_00001.xml"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"BCCD/ImageSets/Main/train.txt": None}, "not that of BCCD"),
        ({"BCCD/ImageSets/Main/val.txt": None}, r"no BCCD/ImageSets/Main/val\.txt"),
        ({"BCCD/ImageSets/Main/val.txt": "../../x"}, "no image"),
        ({FIRST: None}, "no BCCD/Annotations/BloodImage_00001.xml"),
        ({FIRST: "<annotation>"}, "BloodImage_00001.xml of the archive is damaged"),
        ({FIRST: xml([("Dog", 1, 2, 3, 4)])}, "class 'Dog'"),
        ({FIRST: xml([("RBC", 1, "a", 3, 4)])}, "bndbox/ymin is 'a'"),
        ({"BCCD/JPEGImages/BloodImage_00003.jpg": None}, "no BCCD/JPEGImages/BloodImage_00003"),
    ],
)
def test_another_archive_is_refused_with_the_file(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        convert_bccd(io.BytesIO(make_archive(**changes)), tmp_path / "bccd")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "bccd").mkdir()
    convert_bccd(io.BytesIO(make_archive()), tmp_path / "bccd")  # empty: fine
    with pytest.raises(UserError, match="is there already"):
        convert_bccd(io.BytesIO(make_archive()), tmp_path / "bccd")
    with pytest.raises(UserError, match="is there already"):  # before anything is fetched
        fetch_bccd(tmp_path / "bccd", "http://nowhere.invalid/master.zip")


def test_the_command_compares_with_the_results_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    archive = tmp_path / "bccd.zip"
    archive.write_bytes(make_archive())
    assert bccd_folder() == tmp_path / "bccd"
    assert tool.main(["--archive", str(archive)]) == 1
    captured = capsys.readouterr()
    assert "| train   |        2 |         3 |" in captured.out
    assert "train 205 and 2804" in captured.err
    monkeypatch.setattr(bccd, "BCCD_COUNTS", {"train": (2, 3), "val": (1, 1), "test": (1, 0)})
    assert tool.main(["--archive", str(archive), "--output", str(tmp_path / "again")]) == 0


def test_a_mistake_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        tool.main(["--archive", "nowhere.zip"])
    assert "nowhere.zip" in end.value.code and "\n" not in end.value.code
