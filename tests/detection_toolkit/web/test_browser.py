"""The page in a real browser: a server as users start it, and a headless Chromium.

Skipped where there is no Chromium, except in continuous integration.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from browsers import chromium, open_tab
from patience import PATIENCE
from PIL import Image
from playwright.sync_api import expect

from detection_toolkit.data import SHAPES
from detection_toolkit.data.shapes import render_image

# Starts the page, and notes every address outside of the machine that the server looks up or
# connects to.
SERVER = """
import runpy, sys
log = open(sys.argv.pop(1), "a", buffering=1)
def watch(event, args):
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else ""
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0] or ""
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in ("", "localhost", "::1", "::", "0.0.0.0") and not host.startswith("127."):
        log.write(f"{event} {host}\\n")
sys.addaudithook(watch)
runpy.run_module("detection_toolkit.web", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """(address, file with the addresses that it contacted)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    contacted = folder / "contacted.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(contacted), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = []
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            output.append(line)
            if "The page is at" in line:
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}:\n{''.join(output)}")
    finally:
        watchdog.cancel()
    # Read on, or the server would wait when the pipe is full.
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    reader.start()
    yield f"http://127.0.0.1:{port}", contacted
    process.terminate()
    assert process.wait(PATIENCE) == 0, "".join(output)
    reader.join(PATIENCE)
    assert "Traceback" not in "".join(output), "".join(output)


class OpenPage:
    """The page in one tab, as a user has it before them."""

    def __init__(self, browser, address):
        self.tab = open_tab(browser, viewport={"width": 1280, "height": 900})
        self.requests, self.errors = [], []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(address)
        self.picture = self.tab.locator("#picture img")
        self.status = self.tab.locator("#status")
        self.rows = self.tab.locator("#table tbody tr")
        self.expect_status("000005.png, 151×160 pixels: 5 detections after stage 4 of 4.")

    def expect_status(self, text):
        expect(self.status).to_contain_text(text)

    def upload(self, path):
        self.tab.locator("#upload input[type=file]").set_input_files(path)

    def drag(self, slider, key, times):
        self.tab.locator(f"#{slider} input[type=range]").focus()
        for _ in range(times):
            self.tab.keyboard.press(key)

    def pixels(self):
        """(H, W, 3) of the picture as the browser shows it."""
        answer = self.tab.request.get(self.picture.get_attribute("src"))
        return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))

    def table(self):
        """The texts of all rows."""
        return [row.locator("td").all_inner_texts() for row in self.rows.all()]


@pytest.fixture(scope="module")
def shared_page(server, browser):
    return OpenPage(browser, server[0])


@pytest.fixture()
def page(shared_page, server, picture):
    """With the picture uploaded; afterwards nothing may have gone to another machine."""
    # Another picture first: what the page says then is about this one.
    shared_page.tab.locator("#examples button").nth(1).click()
    shared_page.expect_status("000002.png")
    if shared_page.tab.locator("#confidence input[type=number]").input_value() != "0.3":
        shared_page.drag("confidence", "Home", 1)
        shared_page.drag("confidence", "ArrowRight", 5)
    shared_page.upload(picture)
    shared_page.expect_status("000000000139.png, 160×120 pixels: 4 detections after stage 4")
    expect(shared_page.rows).to_have_count(4)
    yield shared_page
    elsewhere = [
        url
        for url in shared_page.requests
        if urlsplit(url).hostname != "127.0.0.1" and urlsplit(url).scheme not in ("data", "blob")
    ]
    assert shared_page.requests and not elsewhere
    assert not shared_page.errors
    assert server[1].read_text() == "", "the server contacted another machine"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A PNG of four objects."""
    path = tmp_path_factory.mktemp("uploads") / "000000000139.png"
    cv2.imwrite(str(path), render_image(SHAPES["shapes_val"], 8)[0])
    return path


def test_boxes_of_an_upload_are_shown_and_follow_stage_and_confidence(page, picture):
    last, last_source, table = page.pixels(), page.picture.get_attribute("src"), page.table()
    plain = cv2.resize(cv2.imread(str(picture)), last.shape[1::-1], interpolation=cv2.INTER_CUBIC)[
        :, :, ::-1
    ]
    scale = last.shape[1] / 160
    changed = np.abs(last.astype(int) - plain).max(-1) > 40
    for row in table:
        x, y, width, height = (scale * float(value) for value in row[3:7])
        right = min(round(x + width), last.shape[1] - 3)
        edge = changed[round(y) + 5 : round(y + height) - 5, right - 2 : right + 3].any(1)
        assert edge.mean() > 0.8, row
    assert changed.mean() < 0.2  # nothing but boxes and labels

    page.drag("stage", "ArrowLeft", 2)
    page.expect_status(": 8 detections after stage 2 of 4.")
    expect(page.rows).to_have_count(8)
    expect(page.picture).not_to_have_attribute("src", last_source)
    second = page.pixels()
    assert second.shape == last.shape and (second != last).mean() > 0.002

    page.drag("stage", "ArrowRight", 2)
    page.expect_status(": 4 detections after stage 4 of 4.")
    expect(page.picture).to_have_attribute("src", last_source)
    expect(page.rows).to_have_count(4)

    page.drag("confidence", "End", 1)
    page.expect_status("no detection after stage 4 has a score of 0.95 or more; the best one has")
    expect(page.rows).to_have_count(0)
    page.drag("confidence", "Home", 1)
    page.expect_status("detections after stage 4 of 4.")
    expect(page.rows).not_to_have_count(0)
    many = page.table()
    assert len(many) > len(table) and many[: len(table)] == table
    assert all(float(row[2]) >= 0.05 for row in many)
    page.drag("confidence", "ArrowRight", 5)
    page.expect_status(": 4 detections after stage 4 of 4.")
    expect(page.rows).to_have_count(4)
    assert page.table() == table


def test_a_query_is_followed_by_list_and_by_click(page):
    source = page.picture.get_attribute("src")
    best = page.table()[0]
    page.tab.locator("#query input").click()
    page.tab.get_by_role("option").nth(1).click()
    strip = page.tab.locator("#strip img")
    expect(strip).to_be_visible()
    expect(page.picture).not_to_have_attribute("src", source)
    expect(page.tab.locator("#legend")).to_contain_text("sampling point at a level of stride")
    expect(page.tab.locator("#table tr.followed td").last).to_have_text(best[7])
    assert page.tab.locator("#query input").input_value().startswith(f"{best[7]}: {best[1]} ")
    figure = strip.get_attribute("src")

    other = page.table()[1]
    x, y, width, height = (float(value) for value in other[3:7])
    shown = page.picture.bounding_box()
    scale = shown["width"] / 160
    page.picture.click(position={"x": (x + width / 2) * scale, "y": (y + height / 2) * scale})
    expect(page.tab.locator("#table tr.followed td").last).to_have_text(other[7])
    expect(strip).not_to_have_attribute("src", figure)

    page.tab.locator("#query input").click()
    page.tab.get_by_role("option").nth(0).click()
    expect(strip).to_be_hidden()
    expect(page.picture).to_have_attribute("src", source)


def test_the_download_is_the_table_in_cocos_format(page):
    with page.tab.expect_download() as download:
        page.tab.locator("#download a").click()
    assert download.value.suggested_filename == "000000000139_stage4_detections.json"
    results = json.loads(Path(download.value.path()).read_text())
    table = page.table()
    assert len(results) == len(table) == 4
    names = SHAPES["shapes_val"].classes
    for result, (_, name, score, *box, _query) in zip(results, table):
        assert set(result) == {"image_id", "category_id", "bbox", "score"}
        assert result["image_id"] == 139
        assert names[result["category_id"] - 1] == name
        assert result["score"] == pytest.approx(float(score), abs=6e-4)
        assert result["bbox"] == pytest.approx([float(value) for value in box], abs=0.06)


def test_files_that_are_no_pictures_are_named_and_the_page_goes_on(page, server, tmp_path):
    table = page.table()
    text = tmp_path / "notes.txt"
    text.write_text("just a text\n")
    page.upload(text)
    page.expect_status("notes.txt is not a picture that can be read.")
    expect(page.status.get_by_role("alert")).to_be_visible()
    assert page.table() == table

    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(21 * 2**20)
    page.upload(large)
    expect(page.tab.get_by_text("exceed the maximum allowed size of 20")).to_be_visible()
    assert page.table() == table
    # The browser's check is for its user; the server has its own.
    part = {"name": "a.png", "mimeType": "image/png", "buffer": large.read_bytes()}
    answer = page.tab.request.post(f"{server[0]}/gradio_api/upload", multipart={"files": part})
    assert answer.status == 413
    page.tab.locator("#examples button").nth(3).click()
    page.expect_status("000004.png, 137×160 pixels: 5 detections after stage 4 of 4.")


def test_users_have_pictures_of_their_own(page, server, browser):
    table = page.table()
    other = OpenPage(browser, server[0])
    other.tab.locator("#examples button").nth(3).click()
    other.expect_status("000004.png")
    page.drag("stage", "ArrowLeft", 1)
    page.expect_status("after stage 3 of 4.")
    page.expect_status("000000000139.png, 160×120 pixels")
    page.drag("stage", "ArrowRight", 1)
    page.expect_status("after stage 4")
    expect(page.rows).to_have_count(4)
    assert page.table() == table
    other.drag("stage", "ArrowLeft", 1)
    other.expect_status("000004.png, 137×160 pixels: 5 detections after stage 3")
    other.tab.close()


def test_nothing_is_wider_than_a_narrow_window(page):
    page.tab.set_viewport_size({"width": 420, "height": 900})
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 420
    page.tab.set_viewport_size({"width": 1280, "height": 900})


FOREIGN_PAGE = b"""<!doctype html><title>foreign</title>
<iframe src="ADDRESS/"></iframe>
<form method="post" enctype="multipart/form-data" action="ADDRESS/gradio_api/upload" target="into">
<input name="files" value="x"></form><iframe name="into"></iframe>
<script>
async function ask(path, options) {
  try { return (await fetch("ADDRESS" + path, options)).status } catch (error) { return "nothing" }
}
</script>"""


def test_a_page_of_another_port_can_neither_use_nor_frame_the_page(server, browser):
    address = server[0]

    class Foreign(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(FOREIGN_PAGE.replace(b"ADDRESS", address.encode()))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        tab = open_tab(browser)
        with tab.expect_response(f"{address}/") as framed:
            tab.goto(f"http://127.0.0.1:{foreign.server_address[1]}")
        assert framed.value.status == 403
        assert tab.evaluate("ask('/')") == "nothing"
        post = "ask('/gradio_api/upload', {method: 'POST', body: new FormData(document.forms[0])})"
        assert tab.evaluate(post) == "nothing"
        assert tab.evaluate("ask('/gradio_api/app_id', {mode: 'no-cors'})") in (0, "nothing")
        with tab.expect_response(f"{address}/gradio_api/upload") as form:
            tab.evaluate("document.forms[0].submit()")
        assert form.value.status == 403
        # A link is how one comes to the page.
        with tab.expect_navigation():
            tab.evaluate(f"location.href = '{address}/'")
        expect(tab.locator("#status")).to_contain_text("5 detections after stage 4 of 4.")
        tab.close()
        foreign.shutdown()


def test_pictures_can_be_downloaded(page):
    page.picture.hover()
    with page.tab.expect_download() as download:
        page.tab.locator("#picture").get_by_role("button", name="Download").click()
    saved = np.asarray(Image.open(download.value.path()).convert("RGB"))
    assert np.array_equal(saved, page.pixels())
