"""Weights by name, from a hub that is a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time

import pytest
import torch
from torch import nn

from detection_toolkit.checkpoint import hub
from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.hub import local_file, local_model
from detection_toolkit.checkpoint.official_files import CheckpointFileError, write_safetensors
from detection_toolkit.engine import Predictor, user_errors

pytest.importorskip("safetensors")
huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = re.compile(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for a file: its facts (HEAD), then its content (GET)."""

    repositories: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []
    delays: list[float] = []  # in seconds, of requests to come

    def do_HEAD(self):
        self.respond(with_content=False)

    def do_GET(self):
        self.respond(with_content=True)

    def respond(self, *, with_content):
        match = PATH.fullmatch(self.path.partition("?")[0])
        self.asked.append(self.path)
        if self.delays:
            time.sleep(self.delays.pop())
        files = self.repositories.get(match["model"]) if match else None
        if match and match["model"] == "me/gated":
            return self.refuse(403, "GatedRepo")
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if match["revision"] not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        content = files.get(match["file"])
        if content is None:
            return self.refuse(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub; ``repositories[model][file]`` is what it has."""
    kind = type("OwnHub", (Hub,), {"repositories": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    download = huggingface_hub.hf_hub_download
    cache = tmp_path / "cache"

    def of_server(*arguments, **options):
        return download(*arguments, **options, endpoint=address, cache_dir=cache)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", of_server)
    monkeypatch.setattr(hub, "_endpoint", lambda: address)
    hub._download.cache_clear()
    yield kind
    server.shutdown()
    server.server_close()
    hub._download.cache_clear()


def weights_file(tmp_path, value=1.0):
    path = tmp_path / "made.safetensors"
    write_safetensors(path, {"weight": torch.full((1, 1), value), "bias": torch.zeros(1)})
    return path.read_bytes()


@pytest.mark.parametrize(
    "address, file",
    [
        ("hf://me/bolts", "model.safetensors"),
        ("hf://me/bolts/", "model.safetensors"),
        ("hf://me/bolts@v1", "model.safetensors"),
        ("hf://me/bolts/other/best.safetensors", "other/best.safetensors"),
        (f"hf://me/bolts@{COMMIT}/other/best.safetensors", "other/best.safetensors"),
    ],
)
def test_weights_are_downloaded_once_and_then_in_the_cache(server, tmp_path, address, file):
    server.repositories["me/bolts"] = {
        "model.safetensors": weights_file(tmp_path, 1.0),
        "other/best.safetensors": weights_file(tmp_path, 2.0),
        "config.yaml": b"model: {}\n",
    }
    model = nn.Linear(1, 1)
    Checkpointer(model, strict=True).load(address)
    assert model.weight.item() == (2.0 if "best" in file else 1.0)
    config, weights = local_model(address)
    assert weights.endswith(file) and config.endswith(f"{COMMIT}/config.yaml")
    # All files are of the version that the weights are of.
    assert any(f"/resolve/{COMMIT}/config.yaml" in path for path in server.asked)
    count = len(server.asked)
    assert local_file(address) == weights and len(server.asked) == count


def test_a_hub_that_has_gone_leaves_what_was_downloaded(server, tmp_path, monkeypatch):
    server.repositories["me/bolts"] = {
        "model.safetensors": weights_file(tmp_path),
        "config.yaml": b"model: {}\n",
    }
    first = local_model("hf://me/bolts")
    hub._download.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(server.asked)
    assert local_model("hf://me/bolts") == first and len(server.asked) == count
    with pytest.raises(CheckpointFileError, match="without a network a local folder") as error:
        local_file("hf://me/nuts")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a--b", "b.git", "-x", "x" * 97])
def test_names_that_the_hub_does_not_allow_are_one_line(server, name):
    with pytest.raises(CheckpointFileError, match=f"hf://me/{name} cannot be downloaded") as error:
        local_file(f"hf://me/{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"], ids=["refused", "unknown"]
)
def test_a_hub_that_is_not_reached_is_told_at_once(server, endpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(hub, "_endpoint", lambda: endpoint)
    with pytest.raises(CheckpointFileError, match=f"{endpoint} is not reached") as error:
        local_file("hf://me/bolts")
    assert not asked  # which would try five times
    assert "\n" not in str(error.value) and "a local folder serves" in str(error.value)


def test_what_is_in_the_cache_needs_no_hub(server, tmp_path, monkeypatch):
    server.repositories["me/bolts"] = {"model.safetensors": weights_file(tmp_path)}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    first = local_file("hf://me/bolts")
    hub._download.cache_clear()
    monkeypatch.setattr(hub, "_endpoint", lambda: pytest.fail("asked"))
    assert local_file("hf://me/bolts") == first


def test_a_hub_that_answers_late_is_waited_for(server, tmp_path, monkeypatch):
    server.repositories["me/bolts"] = {"model.safetensors": weights_file(tmp_path)}
    monkeypatch.setattr(hub, "_SECONDS_TO_CONNECT", 0.2)
    monkeypatch.setattr(server, "delays", [0.6])
    assert local_file("hf://me/bolts").endswith("model.safetensors")
    assert not server.delays  # the first request was late


@pytest.mark.parametrize(
    "address, said",
    [
        ("hf://me/nothing", "is not on the hub, or is private: check the name, or log in"),
        ("hf://me/gated", "is gated: accept its terms at https://huggingface.co/me/gated, and"),
        ("hf://me/bolts@v2", "has no revision v2: name a branch, a tag or a commit"),
        ("hf://me/bolts/none.pth", "has no none.pth: look at its files"),
        ("hf://me/empty", "has no model.safetensors or pytorch_model.bin: look at its files"),
        ("hf://bolts", "names no model of the hub: these are hf://OWNER/NAME"),
        ("hf://", "names no model of the hub"),
        ("hf://me/bolts@", "names no model of the hub"),
        ("hf://me/bo lts", "names no model of the hub"),
        ("hf://me/bolts\x1b", r"'hf://me/bolts\\x1b' names no model"),
        ("hf://me/bolts/../../x.pth", "leads upwards"),
        ("hf://me/bolts/model.pkl", "is a pickle, and opening it may run any code"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server, tmp_path, address, said):
    server.repositories["me/empty"] = {"README.md": b""}
    server.repositories["me/bolts"] = {
        "model.safetensors": weights_file(tmp_path),
        "model.pkl": b"cos\nsystem\n",
    }
    with pytest.raises(CheckpointFileError, match=said) as error:
        Checkpointer(nn.Linear(1, 1)).load(address)
    assert "\n" not in str(error.value)


def test_weights_without_a_config_need_one(server, tmp_path):
    server.repositories["me/plain"] = {"model.safetensors": weights_file(tmp_path)}
    with pytest.raises(SystemExit) as end, user_errors():
        Predictor.from_run("hf://me/plain")
    told = end.value.code  # printed, and the exit code is 1
    assert "has weights, but no config.yaml" in told and "--weights" in told and "\n" not in told


def test_a_strangers_config_may_not_run_code(server, tmp_path):
    server.repositories["me/evil"] = {
        "model.safetensors": weights_file(tmp_path),
        "config.yaml": b"model: {_target_: os.system, command: echo}\n",
    }
    with pytest.raises(ValueError, match="is no part of a detector"):
        Predictor.from_run("hf://me/evil")


def test_results_are_not_written_where_a_strangers_config_says(server, tmp_path, monkeypatch):
    from detection_toolkit.commands.train import get_parser, load_config
    from detection_toolkit.config import config_text, get_config
    from detection_toolkit.engine.arguments import parse_arguments

    cfg = get_config("stageinteractor/shapes_tiny.py")
    cfg.train.output_dir = str(tmp_path / "precious")
    server.repositories["me/bolts"] = {
        "model.safetensors": weights_file(tmp_path),
        "config.yaml": config_text(cfg).encode(),
    }
    for options in ([], ["--eval-only"]):
        words = ["--config-file", "hf://me/bolts@v1", *options]
        read = load_config(parse_arguments(get_parser(), words))
        assert read.train.output_dir == "output/bolts"
        assert str(read.train.init_checkpoint).endswith("model.safetensors") == bool(options)


@pytest.mark.parametrize(
    "labels, before",
    [
        ({"0": "cat", "1": "dog"}, ["cat", "dog"]),
        ({str(i): f"LABEL_{i}" for i in range(91)}, None),
        ({"a": "cat"}, None),
        ([1], None),
        (None, None),
    ],
)
def test_class_names_of_other_programs(labels, before):
    from detection_toolkit.checkpoint.official import class_names

    assert class_names({"description": {"id2label": json.loads(json.dumps(labels))}}) == before
    names = list(before or ["x"])
    assert class_names({"meta": {"CLASSES": tuple(names)}}) == names
    assert class_names({"meta": {"dataset_meta": {"classes": names}}}) == names
    assert class_names({"meta": "text"}) is None and class_names({"meta": {"CLASSES": [1]}}) is None
