"""Checkpoints that no run has written: what is wrong with them is said, and nothing is run."""

import ast
import gzip
import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from detectron2.utils.file_io import PathManager
from fault_runs import ROOT, run_forked, run_overrides
from torch import nn

from detection_toolkit.checkpoint import checkpointer as checkpointer_module
from detection_toolkit.checkpoint import hub, official_files
from detection_toolkit.checkpoint.checkpointer import Checkpointer, inference_weights
from detection_toolkit.checkpoint.damage import RUNS_CODE, damage
from detection_toolkit.checkpoint.official_files import CheckpointFileError, read_checkpoint
from detection_toolkit.data.images import UnreadableImageError, read_image, shown_size
from detection_toolkit.errors import UserError


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mark(tmp_path):
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where Detectron2 keeps what it has downloaded; nothing can be."""
    folder = tmp_path / "cache"
    (folder / "detectron2").mkdir(parents=True)
    monkeypatch.setenv("FVCORE_CACHE", str(folder))
    monkeypatch.setattr(hub, "get_cache_dir", lambda: str(folder))
    return folder


def pickled(path, mark):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": {}, "__author__": "x", "note": Mark(mark)}
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "address",
    [
        "detectron2://../../evil.pkl",
        "detectron2://a/../../../evil.pkl",
        "detectron2://a/%2e%2e/%2e%2e/evil.pkl",
        "detectron2://..\\..\\evil.pkl",
        "https://dl.fbaipublicfiles.com/detectron2/../../evil.pkl",
        "detectron2://linked/evil.pkl",
        "DETECTRON2://evil.pkl",
        "https://example.org/detectron2/evil.pkl",
        "catalog://evil.pkl",
        "https://example.org/detectron2/#/evil.pkl",
        "https://example.org/detectron2/?/evil.pkl",
        "https://example.org/detectron2/#/evil.pk\nl\t",
    ],
)
def test_an_address_opens_no_pickle_but_those_of_the_storage(
    tmp_path, cache, mark, address, monkeypatch
):
    pickled(tmp_path / "evil.pkl", mark)
    pickled(cache / "evil.pkl", mark)
    os.symlink(tmp_path, cache / "detectron2" / "linked")
    monkeypatch.setattr(PathManager, "get_local_path", lambda p, **k: local(p, cache))
    with pytest.raises((CheckpointFileError, OSError)):
        Checkpointer(nn.Linear(1, 1)).load(address)


def local(address, cache):
    """As iopath has it: the path of the address, whatever its host."""
    address = address.replace("detectron2://", "https://host/detectron2/")
    path = address.split("://", 1)[1].split("/", 1)[1]
    return os.path.join(cache, path)


@pytest.mark.parametrize("end", ["evil.pkl", "#/evil.pkl", "?/evil.pkl", "#/evil.pkl\n", "a.pyth"])
def test_nothing_is_downloaded_to_where_pickles_of_the_storage_are(end, monkeypatch):
    """iopath keeps it by its path, whatever the host, and the next model would open it."""
    asked = []
    monkeypatch.setattr(PathManager, "get_local_path", lambda p, **k: asked.append(p))
    monkeypatch.setattr(PathManager, "open", lambda p, *a, **k: asked.append(p))
    address = f"https://example.org/detectron2/{end}"
    with pytest.raises(CheckpointFileError, match="is a pickle"):
        Checkpointer(nn.Linear(1, 1)).load(address)
    with pytest.raises(UnreadableImageError, match="address of a pickle"):
        read_image(address)
    assert shown_size(address) is None
    assert not asked


def test_a_pickle_of_the_storage_is_opened(cache, monkeypatch):
    weights = {"weight": torch.full((1, 1), 5.0).numpy(), "bias": torch.zeros(1).numpy()}
    path = cache / "detectron2" / "a.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "me"}))
    monkeypatch.setattr(PathManager, "get_local_path", lambda p, **k: local(p, cache))
    model = nn.Linear(1, 1)
    Checkpointer(model).load("detectron2://a.pkl")
    assert float(model.weight.detach()) == 5.0


def test_files_are_downloaded_where_it_is_looked_for_them():
    """iopath may have moved its folder: then no pickle of the storage would be opened."""
    assert checkpointer_module.is_downloaded(os.path.join(hub.get_cache_dir(), "detectron2/a.pkl"))
    assert not hub.is_downloaded("/etc/passwd")


@pytest.mark.parametrize("packed", ["w:", "w:gz"])
def test_tar_files_are_refused_whatever_pytorch_is_installed(tmp_path, mark, packed, monkeypatch):
    path = tmp_path / "old.pth"
    with tarfile.open(path, packed) as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(Mark(mark))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(torch, "load", None)  # is not even asked
    with pytest.raises(CheckpointFileError, match=r"is a tar file.*train\.allow_pickle=true"):
        read_checkpoint(path)
    assert damage(path).startswith(RUNS_CODE)
    with zipfile.ZipFile(path, "a") as archive:  # behind it: PyTorch looks at the beginning
        archive.writestr("model/data.pkl", b"")
    assert zipfile.is_zipfile(path)
    with pytest.raises(CheckpointFileError, match="is a tar file"):
        read_checkpoint(path)
    assert damage(path).startswith(RUNS_CODE)


def test_a_packed_file_that_ends_early_is_damaged(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(gzip.compress(b"weights" * 1000)[:14])
    with pytest.raises(CheckpointFileError, match="damaged"):
        read_checkpoint(path)
    assert "no complete archive" in damage(path)


def test_nothing_else_opens_files_of_pytorch():
    found = set()
    for folder in ("projects", "tools", "demo"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ):
                    found.add(path.name)
    assert found == {"official_files.py", "damage.py"}
    assert official_files.torch.load is torch.load


BLOCKED = {
    "a function": lambda mark: Mark(mark),
    "a class": lambda mark: nn.Linear(1, 1),
    "a name": lambda mark: os.mkdir,
}


@pytest.mark.parametrize("kind", BLOCKED)
def test_a_pickle_that_is_blocked_is_not_called_damaged(tmp_path, mark, kind, caplog):
    path = tmp_path / "model_0000001.pth"
    torch.save({"model": {"weight": torch.zeros(1, 1)}, "x": BLOCKED[kind](mark)}, path)
    with pytest.raises(CheckpointFileError, match="opening it would run code") as error:
        read_checkpoint(path)
    assert "damaged" not in str(error.value)
    assert damage(path).startswith("it holds more than tensors and plain values")
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(CheckpointFileError, match=r"kept as \*\.refused"):
        Checkpointer(nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)
    assert "is refused: it holds more than" in caplog.text
    assert (tmp_path / "model_0000001.pth.refused").is_file()


WEIGHTS = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}
MALFORMED = {
    "a list as model": ({"model": [1, 2]}, "no weights"),
    "a text as model": ({"model": "text"}, "no weights"),
    "a number as model": ({"model": 3, "weight": torch.ones(1, 1)}, "no weights under 'model'"),
    "nothing": ({}, "no weights"),
    "a list": ([1, 2], "holds a list"),
    "texts as weights": ({"model": {"weight": "a", "bias": "b"}}, "no weights"),
    "a list as ema": ({"model": WEIGHTS, "ema": [1]}, "no weights under 'ema', but a list"),
    "a text as ema": ({"model": WEIGHTS, "ema": "x"}, "no weights under 'ema', but a str"),
    "a sparse tensor": ({"model": {**WEIGHTS, "weight": torch.ones(1, 1).to_sparse()}}, "sparse"),
    "a tensor without values": (
        {"model": {**WEIGHTS, "weight": torch.ones(1, 1, device="meta")}},
        "without values",
    ),
    "a sparse average": (
        {"model": WEIGHTS, "ema": {**WEIGHTS, "weight": torch.ones(1, 1).to_sparse()}},
        "sparse",
    ),
    "an average without values": (
        {"model": WEIGHTS, "ema": {"weight": torch.ones(1, 1, device="meta")}},
        "without values",
    ),
    "a nested tensor": (
        {"model": {**WEIGHTS, "weight": torch.nested.nested_tensor([torch.ones(1)])}},
        "nested",
    ),
    "a number that is repeated": (
        {"model": {**WEIGHTS, "weight": torch.ones(1).expand(10**11, 1)}},
        "more values than the file holds",
    ),
    "one text among weights": ({"model": {**WEIGHTS, "weight": "a"}}, "missing: weight"),
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("prefer_ema", [False, True])
def test_what_is_malformed_is_named(tmp_path, kind, prefer_ema):
    content, message = MALFORMED[kind]
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        Checkpointer(nn.Linear(1, 1), strict=True, prefer_ema=prefer_ema).load(str(path))


def test_eight_bits_are_too_few(tmp_path):
    if not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("PyTorch 2.1 has them")
    weights = {**WEIGHTS, "weight": torch.ones(1, 1).to(torch.float8_e4m3fn)}
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(CheckpointFileError, match=r"weight \(of torch\.float8_e4m3fn\)"):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("value", ["text", 3, ["a"], {"classes": 3}, {"classes": [1, None]}])
def test_what_another_program_says_of_its_run_is_not_ours(tmp_path, value):
    torch.save({"model": WEIGHTS, "run": value}, tmp_path / "a.pth")
    rest = Checkpointer(nn.Linear(1, 1), strict=True).load(str(tmp_path / "a.pth"))
    assert rest.get("run", {}) in ({}, value)


def test_weights_that_are_nan_are_named(tmp_path, caplog):
    broken = {"weight": torch.full((1, 1), float("nan")), "bias": torch.zeros(1)}
    torch.save({"model": broken}, tmp_path / "a.pth")
    Checkpointer(nn.Linear(1, 1), strict=True).load(str(tmp_path / "a.pth"))
    assert "NaN or infinite, in 1 of 2 tensors: weight" in caplog.text
    assert inference_weights({"model": WEIGHTS}).keys() == WEIGHTS.keys()


OF_A_RUN = {
    "trainer": ["text", [1], {}, {"_trainer": 3}],
    "iteration": ["text", None],
    "ema": [{}, {"n_averaged": "x"}, {"module.x": torch.zeros(1)}],
    "random_states": ["text", [3], [{}], [{"torch": 3}]],
    "run": ["text", {"recipe": 3}, {"recipe": {"lr_multiplier": 3}}],
}


@pytest.mark.parametrize("key, value", [(k, v) for k, values in OF_A_RUN.items() for v in values])
def test_a_run_is_not_resumed_from_what_no_run_has_written(
    tmp_path, small_data, undisturbed, key, value
):
    """In words, or without what is of another kind."""
    output, log = tmp_path / "output", tmp_path / "console.txt"
    output.mkdir()
    content = torch.load(undisturbed / "model_0000017.pth", weights_only=True)
    torch.save({**content, key: value}, output / "model_0000017.pth")
    (output / "last_checkpoint").write_text("model_0000017.pth")
    overrides = run_overrides(output, small_data, "train.max_iter=19")
    code = run_forked(["--resume", *overrides], log=log)
    text = log.read_text()
    assert code in (0, 1)
    assert "Traceback" not in text, text
    if code:
        assert text.splitlines()[-1].startswith("error: ")
