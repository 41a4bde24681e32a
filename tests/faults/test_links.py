"""Links that somebody else has put where the project writes."""

import ast
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import patience
import pytest
from fault_runs import ROOT, load_tool, run_forked, run_overrides

from detection_toolkit.data import documents
from detection_toolkit.durable import (
    make_folder,
    open_log,
    private_folder,
    refuse_links,
    remove_partial_files,
    write_durably,
    write_text,
)
from detection_toolkit.engine.logs import set_up_logs
from detection_toolkit.errors import UserError
from detection_toolkit.visualization import save_picture


@pytest.fixture
def secret(tmp_path):
    """A file of somebody's that nothing may change."""
    path = tmp_path / "secret"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"
    assert not path.is_symlink()


def plant(place, secret):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(secret)


@pytest.mark.parametrize(
    "name, write",
    [
        ("report.json", lambda path: write_text(path, "{}")),
        ("model.pth", lambda path: write_durably(path, lambda file: file.write(b"x"))),
        ("a.png", lambda path: save_picture(np.zeros((4, 4, 3), np.uint8), path)),
    ],
)
def test_a_link_in_the_place_of_an_output_is_replaced(tmp_path, secret, name, write):
    place = tmp_path / "output" / name
    plant(place, secret)
    # What a writer with one temporary name would write to.
    plant(place.with_name(f".{name}.partial"), secret)
    write(place)
    assert place.is_file() and not place.is_symlink()


def test_the_temporary_name_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(20):
        write_durably(tmp_path / "a.json", lambda file: names.add(Path(file.name).name))
    assert len(names) == 20
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_has_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    class Killed(BaseException):
        pass

    def die(file):
        os.link(file.name, tmp_path / ".a.0123.partial.json")  # stays when it is unlinked
        raise Killed

    with pytest.raises(Killed):
        write_durably(tmp_path / "a.json", die)
    assert os.listdir(tmp_path) == [".a.0123.partial.json"]
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_names_as_long_as_a_name_may_be(tmp_path):
    for name in ("a" * 251 + ".txt", "ü" * 125 + ".txt"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_errors_name_the_file_that_was_meant(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder"):
        write_text(tmp_path / "folder", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.json", "")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        write_text(tmp_path / "pipe", "")


def test_streams_that_a_user_names_are_written_to(tmp_path):
    """Not renamed to: that would put a file in the place of the system's own link."""
    before = os.readlink("/dev/stdout")
    script = "from detection_toolkit.durable import write_text; write_text('/dev/stdout', 'text')"
    for stdout in (subprocess.PIPE, (tmp_path / "out").open("wb")):
        patience.run([sys.executable, "-c", script], stdout=stdout, check=True)
    assert (tmp_path / "out").read_text() == "text"
    assert os.readlink("/dev/stdout") == before
    write_text("/dev/null", "text")
    assert not Path("/dev/null").is_file()


def test_logs_refuse_links(tmp_path, secret):
    plant(tmp_path / "log", secret)
    with pytest.raises(UserError, match=r"log is a link, to .*secret"):
        open_log(tmp_path / "log")
    plant(tmp_path / "broken", tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link"):
        open_log(tmp_path / "broken")
    assert not (tmp_path / "nowhere").exists()
    for text in (b"a", b"b"):
        with open_log(tmp_path / "plain") as file:
            file.write(text)
    assert (tmp_path / "plain").read_bytes() == b"ab"


@pytest.mark.parametrize(
    "name", ["log.txt", "log.txt.rank1", "metrics.json", "events.out.tfevents.1.host.2.0"]
)
def test_a_run_refuses_links_in_the_place_of_its_logs(tmp_path, secret, name):
    plant(tmp_path / "output" / name, secret)
    handlers = list(logging.getLogger("detection_toolkit").handlers)
    with pytest.raises(UserError, match=rf"{name} is a link"):
        set_up_logs(str(tmp_path / "output"))
    assert logging.getLogger("detection_toolkit").handlers == handlers


def test_a_run_and_its_evaluation_follow_no_link(tmp_path, secret, small_data):
    """All that is written in one piece, Detectron2's files among it."""
    output, log = tmp_path / "output", tmp_path / "console.txt"
    names = ["config.yaml", "last_checkpoint", "model_final.pth", "model_best.json"]
    results = ["metrics.json", "coco_instances_results.json", "instances_predictions.pth"]
    evaluated = [f"inference/linked/{name}" for name in results]
    for name in names + evaluated:
        plant(output / name, secret)
    options = ["train.max_iter=3", "train.eval_period=3", "train.checkpointer.period=3"]
    overrides = [
        *run_overrides(output, small_data, *options),
        "dataloader.test.dataset.name=linked",
    ]
    # last_checkpoint is a link already: of an earlier run, as far as can be told.
    assert run_forked(["--resume", *overrides], log=log) == 0, log.read_text()
    written = [path for path in map(output.joinpath, names) if path.exists()]
    written += list((output / "inference").rglob("*.json"))
    assert len(written) >= 5
    assert not [path for path in output.rglob("*") if path.is_symlink() and path in written]


def test_a_folder_of_a_run_is_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "inference").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="inference is a link"):
        make_folder(tmp_path / "inference")
    refuse_links(tmp_path / "elsewhere")


def test_a_folder_for_one_user_alone(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NotADirectoryError, match="no folder"):
        private_folder(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="somebody else"):
        private_folder(folder)


def test_a_cache_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    """Without a home, the temporary folder serves, which others can write to."""
    monkeypatch.setenv("HOME", str(tmp_path / "no" / "home"))
    (tmp_path / "no").write_text("")
    monkeypatch.setattr(documents.tempfile, "gettempdir", lambda: str(tmp_path))
    stem = "../../" + "é" * 300
    path = documents.write_copy({"a": 1}, stem)
    assert path.parent.parent == tmp_path
    assert len(path.name) < 150
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "prepared").mkdir()
    path.parent.symlink_to(tmp_path / "prepared")
    with pytest.raises(OSError, match="no cache folder can be written"):
        documents.write_copy({"a": 1}, stem)
    assert not list((tmp_path / "prepared").iterdir())


# Of files in a new folder of their own, or of this repository; setup_env.py runs before the
# project is installed.
WRITE_THEMSELVES = {
    "projects/detection_toolkit/checkpoint/checkpointer.py",  # where a run is not in a file system
    "projects/detection_toolkit/durable.py",
    "projects/detection_toolkit/data/bccd.py",
    "projects/detection_toolkit/data/shapes.py",
    "projects/detection_toolkit/studies/benchmark.py",
    "tools/draw_architecture.py",
    "tools/draw_ideas.py",
    "tools/setup_env.py",
}


def test_nothing_else_opens_files_to_write():
    found = set()
    for folder in ("projects", "tools", "demo"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _writes(node):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == WRITE_THEMSELVES


def _writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("write_bytes", "copyfile", "copy2", "imwrite"):
        return True
    if name == "write_text":
        return isinstance(call.func, ast.Attribute)
    modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
    modes += [k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)]
    is_mode = any(isinstance(m, str) and m[:1] in "wax" and 0 < len(m) < 4 for m in modes)
    return name in ("open", "fdopen") and is_mode


def test_the_check_itself_finds_what_it_looks_for():
    for text in ('open(p, "w")', 'p.open("ab")', "p.write_text(t)", 'open(p, mode="x")'):
        assert _writes(ast.parse(text).body[0].value)
    for text in ("open(p)", 'open(p, "rb")', "write_text(p, t)"):
        assert not _writes(ast.parse(text).body[0].value)


def test_the_sheets_of_a_data_set_follow_no_link(tmp_path, secret, capsys):
    from coco_files import write_dataset

    json_file, root = write_dataset(tmp_path / "data")
    for name in ("report.json", "samples.png", "worst.png"):
        plant(tmp_path / "output" / name, secret)
    load_tool("check_dataset").main([json_file, root, "--output", str(tmp_path / "output")])
    assert not (tmp_path / "output" / "report.json").is_symlink()
