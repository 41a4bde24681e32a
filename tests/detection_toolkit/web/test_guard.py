"""Names of the page, and what stays of files: without a server."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from detection_toolkit.web import guard, storage
from detection_toolkit.web.guard import Guard, ServedNames
from detection_toolkit.web.storage import UploadFolder


def test_a_page_of_this_machine_has_its_names_alone():
    names = ServedNames("127.0.0.1", ["Detector.Example"])
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.0.0.2", "[::1]:7860"):
        assert names.serves(host), host
    assert names.serves("detector.example:443")
    for host in ("192.168.1.5:7860", "x.localhost.example", "evil.example", "localhost:x", "[::1"):
        assert not names.serves(host), host
    assert not names.serves("localhost/evil.example") and not names.serves("localhost localhost")


def test_a_page_of_a_network_has_addresses_and_the_machines_name(monkeypatch):
    monkeypatch.setattr(guard.socket, "gethostname", lambda: "Box")
    names = ServedNames("0.0.0.0")
    for host in ("192.168.1.5:7860", "[fe80::1]", "box:7860", "box.local", "localhost"):
        assert names.serves(host), host
    for host in ("box.evil.example", "evil.example:7860", "192.168.1.5.evil.example"):
        assert not names.serves(host), host
    assert ServedNames("lab.example").serves("lab.example:7860")


@pytest.mark.parametrize(
    ("origin", "hosts", "own"),
    [
        ("http://localhost:7860", ["localhost:7860"], True),
        ("https://lab.example", ["127.0.0.1:7860", "lab.example"], True),
        ("https://lab.example", ["127.0.0.1:7860", "lab.example:443"], True),
        ("http://lab.example", ["lab.example:443"], False),
        ("http://localhost:7861", ["localhost:7860"], False),
        ("ftp://localhost:7860", ["localhost:7860"], False),
        ("https://named.example:8443", ["127.0.0.1:7860"], True),
        ("null", ["null"], False),
    ],
)
def test_the_page_is_its_own_origin(origin, hosts, own):
    assert ServedNames("127.0.0.1", ["named.example"]).is_own(origin, hosts) is own


def test_an_upload_is_answered_when_its_file_is_in_place(tmp_path):
    """Gradio answers first. A page that is quick would then ask for a file that is not there."""
    happened = []

    async def gradio(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"[]"})
        happened.append("the file is moved")

    async def receive():
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message):
        happened.append(message["type"])

    run(tmp_path, gradio, receive, send, length=1)
    assert happened == ["the file is moved", "http.response.start", "http.response.body"]


def run(folder, gradio, receive, send, *, length):
    """An upload of so many bytes, of which ten and a few are allowed."""
    app = Guard(
        gradio,
        names=ServedNames("127.0.0.1"),
        folder=UploadFolder(folder),
        max_upload=10,
        policy="",
    )
    headers = [(b"host", b"localhost"), (b"content-length", b"%d" % length)]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    asyncio.run(app(scope, receive, send))


def test_a_sender_that_is_slow_is_shown_why_it_is_refused_before_all_is_read(tmp_path):
    """A connection that is closed earlier would be an error of its own."""
    happened, answered = [], asyncio.Event()

    async def receive():
        await answered.wait()
        happened.append("the rest is read")
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def send(message):
        happened.append(message["type"] == "http.response.body" and message["body"])
        if message.get("more_body"):
            answered.set()

    run(tmp_path, None, receive, send, length=2**21)
    words = b"The upload exceeds the maximum allowed size."
    assert happened == [False, words, "the rest is read", b""]


def write(path, *, age=0.0, size=10):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_old_files_and_broken_off_uploads_are_deleted(tmp_path):
    example = write(tmp_path / "a" / "example.png", age=1e6)
    folder = UploadFolder(tmp_path)
    old = write(tmp_path / "b" / "old.png", age=storage.MAX_AGE + 5)
    broken = write(tmp_path / "tmp123", age=storage.BROKEN_AFTER + 5)
    recent = [write(tmp_path / "c" / "b.png", age=storage.BROKEN_AFTER + 5), write(tmp_path / "t")]
    folder.sweep()
    assert not broken.exists() and not old.parent.exists()
    assert example.exists() and all(path.exists() for path in recent)
    assert storage.BROKEN_AFTER > guard.IDLE_SECONDS


def test_the_oldest_files_give_way_to_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_BYTES", 10 * 2**20)
    folder = UploadFolder(tmp_path)
    files = [
        write(tmp_path / f"{n}" / "a.png", age=1000 - 100 * n, size=2 * 2**20) for n in range(6)
    ]
    folder.sweep()
    assert [path.exists() for path in files] == [False] + [True] * 5
    assert folder.reserve(5 * 2**20)  # two of the files, and the third to be sure of the room
    assert [path.exists() for path in files] == [False] * 4 + [True] * 2
    assert folder.reserve(5 * 2**20) and not folder.reserve(1)
    folder.release(5 * 2**20)
    recent = [write(tmp_path / f"new{n}" / "a.png", size=2 * 2**20) for n in range(3)]
    assert not folder.reserve(5 * 2**20)  # what somebody is about to look at stays
    assert all(path.exists() for path in recent)


def test_many_small_files_are_too_much_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_BYTES", 2**20)
    folder = UploadFolder(tmp_path)
    for number in range(100):
        write(tmp_path / f"{number}" / "a.png", age=100)
    folder.sweep()
    assert len(list(tmp_path.iterdir())) == 16


def test_links_are_not_followed(tmp_path):
    outside = write(tmp_path / "outside" / "a.png", age=1e6)
    inside = tmp_path / "inside"
    inside.mkdir()
    folder = UploadFolder(inside)
    (inside / "link").symlink_to(outside.parent)
    (inside / "file").symlink_to(outside)
    folder.sweep()
    assert outside.exists()


def test_paths_outside_are_not_the_pages(tmp_path):
    folder = UploadFolder(tmp_path / "a")
    assert folder.owns(f"{tmp_path}/a/b/c.png")
    for path in (
        f"{tmp_path}/a",
        f"{tmp_path}/ab/c.png",
        f"{tmp_path}/a/../b/c.png",
        f"{tmp_path}/a/\0",
        "a/b",
        "http://a/b",
        "",
    ):
        assert not folder.owns(path), path
