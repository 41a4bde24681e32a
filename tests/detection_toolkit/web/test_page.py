"""The functions that the page calls, and the command that starts it; without a browser."""

from __future__ import annotations

import html
import itertools
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import patience
import pytest
from gradio import http_server, networking

from detection_toolkit.data import SHAPES
from detection_toolkit.data.shapes import render_image
from detection_toolkit.engine.inspection import build_inspected_detector
from detection_toolkit.engine.shipped import shipped_config
from detection_toolkit.web import ExampleImages, StageViewer, __main__, serving
from detection_toolkit.web.page import Page


@pytest.fixture(scope="module")
def page():
    viewer = StageViewer(build_inspected_detector(shipped_config(), ["train.device=cpu"]))
    page = Page(viewer, ExampleImages(SHAPES["shapes_val"], (8, 2)), max_upload=2**20)
    page.build("title", "subtitle")
    return page


def test_a_new_picture_begins_at_the_last_stage_with_no_query(page):
    update = page.open_first(0.3)
    assert update[page.viewed].name == "000008.png"
    assert update[page.stage]["value"] == page.viewer.num_stages
    assert update[page.query]["value"] == -1
    assert not update[page.strip]["visible"]
    assert "000008.png, 160×120 pixels: 4 detections after stage 4 of 4." in update[page.status]
    assert update[page.table].count("<tr>") == 1 + 4
    assert 'download="000008_stage4_detections.json"' in update[page.download]


def test_a_bad_upload_changes_nothing_but_the_message(page, tmp_path):
    path = tmp_path / "<b>notes.txt"
    path.write_text("no picture")
    update = page.take_upload(str(path), 0.3)
    assert set(update) == {page.upload, page.status}
    assert html.escape(path.name) in update[page.status] and "<b>" not in update[page.status]
    assert 'role="alert"' in update[page.status]


def test_two_users_may_upload_the_same_picture_at_once(page, tmp_path):
    # Gradio stores both under one path, which follows from the content.
    path = tmp_path / "000008.png"
    cv2.imwrite(str(path), render_image(SHAPES["shapes_val"], 8)[0])
    for _ in range(2):
        assert page.take_upload(str(path), 0.3)[page.viewed].name == path.name


def test_a_mistake_of_the_program_is_a_message_too(page, tmp_path, monkeypatch, caplog):
    def fail(path):
        raise RuntimeError(f"secret of {path}")

    monkeypatch.setattr(page.viewer, "view_file", fail)
    update = page.take_upload(str(tmp_path / "a.png"), 0.3)
    assert "the server&#x27;s log says what" in update[page.status]
    assert "secret" not in update[page.status] and "secret" in caplog.text


def test_no_detection_is_said_with_the_best_score(page):
    viewed = page.open_first(0.3)[page.viewed]
    update = page.redraw(viewed, 1, 0.95, -1)
    best = float(viewed.traces[0].detections.scores.max())
    assert "no detection after stage 1 has a score of 0.95 or more" in update[page.status]
    assert f"the best one has {best:.2f}." in update[page.status]
    assert update[page.table] == ""
    assert "base64,W10=" in update[page.download]  # []


def test_a_picture_that_is_no_longer_kept_is_asked_for_again(page):
    for update in (page.redraw(None, 2, 0.3, -1), page.change_confidence(None, 2, 0.3, 4)):
        assert list(update) == [page.status]
        assert "Choose a picture first." in update[page.status]
    assert not page.follow_query(None, 3)[page.strip]["visible"]


def test_names_of_classes_cannot_write_html(page, monkeypatch):
    viewed = page.open_first(0.3)[page.viewed]
    monkeypatch.setattr(page.viewer, "class_name", lambda label: "<img src=x>")
    table = page.redraw(viewed, 4, 0.3, -1)[page.table]
    assert "&lt;img src=x&gt;" in table and "<img" not in table


def test_without_gradio_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from detection_toolkit.web.__main__ import main; main([])"
    )
    result = patience.run([sys.executable, "-c", code])
    assert result.returncode == 1
    assert "error: the page needs Gradio 6" in result.stderr
    assert "pip install 'gradio>=6'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture()
def own_environment(monkeypatch):
    """The command sets what Gradio reads from the environment; it is put back afterwards."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights", "missing.pth"], "error: checkpoint missing.pth does not exist"),
        (["--config-file", "shapes_tny.py"], "stageinteractor/shapes_tiny.py"),
        (
            ["--config-file", "stageinteractor/stageinteractor_r50_100q_1x.py"],
            "error: no trained weights for stageinteractor/stageinteractor_r50_100q_1x.py",
        ),
        (["--port", "99999"], "error: --port 99999: must be between 1 and 65535"),
        (["--opts", "train.devise=cpu"], "error: the config has no key 'train.devise'"),
    ],
)
def test_bad_commands_end_with_one_line(argv, message):
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert message in caught.value.code


@pytest.mark.usefixtures("own_environment")
def test_a_port_that_is_taken_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            __main__.main(["--port", str(port)])
    assert f"cannot listen at 127.0.0.1:{port}: " in caught.value.code


def test_uploads_are_read_at_their_full_resolution(page, tmp_path):
    path = tmp_path / "large.png"
    image = cv2.resize(render_image(SHAPES["shapes_val"], 8)[0], (2300, 1725))
    cv2.imwrite(str(path), image)
    viewed = page.take_upload(str(path), 0.3)[page.viewed]
    assert viewed.original_size == (1725, 2300)
    assert viewed.image.shape == (960, 1280, 3)
    assert float(viewed.detections(-1, 0.3).pred_boxes.tensor.max()) > 1280


def start_and_end(monkeypatch):
    """Start the page, which ends as soon as it waits for a signal to do so."""
    stopped = []
    monkeypatch.setattr(serving._Signals, "wait", lambda self: stopped.append(True))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    try:
        assert __main__.main(["--port", str(port)]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_proxies_of_the_environment_do_not_keep_the_page_from_starting(proxy, monkeypatch):
    """Gradio asks its own page for a sign of life, and httpx would ask the proxy."""
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    start_and_end(monkeypatch)
    assert os.environ["ALL_PROXY"] == proxy


def test_a_signal_that_another_thread_is_given_ends_the_page():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = serving._Signals()
    try:
        # A moment later, as it matters where this thread waits already.
        timer = threading.Timer(
            0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        )
        timer.start()
        signals.wait()
        timer.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.usefixtures("own_environment")
def test_a_slow_machine_does_not_keep_the_page_from_starting(monkeypatch):
    """Gradio would give up after five seconds, and where its page takes three to answer."""
    clock = SimpleNamespace(time=itertools.count(0, 10).__next__, sleep=time.sleep)
    monkeypatch.setattr(http_server, "time", clock)
    monkeypatch.setattr(networking, "url_ok", lambda address: False)
    before = http_server.Server.run_in_thread
    start_and_end(monkeypatch)
    assert http_server.Server.run_in_thread is before
