"""The tutorial notebook runs as it is committed, and leaves nothing outside of its own folder."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"


def test_the_committed_notebook_is_small_and_was_run_from_the_top():
    assert NOTEBOOK.stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run in a fresh home, and the folder that this run had."""
    folder = tmp_path_factory.mktemp("notebook")
    home, temporary, here = (folder / name for name in ("home", "temporary", "here"))
    for path in (home, temporary, here):
        path.mkdir()
    before = {path: path.stat().st_mtime_ns for path in NOTEBOOK.parent.rglob("*")}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(home / "runtime"))
        patch.setenv("OMP_NUM_THREADS", "1")
        # The kernel is that of the running Python, whatever others have been registered.
        client = NotebookClient(
            notebook, timeout=PATIENCE, startup_timeout=PATIENCE, kernel_name="python3"
        )
        client.resources = {"metadata": {"path": str(here)}}
        client.execute()  # raises if a cell does
    assert before == {path: path.stat().st_mtime_ns for path in NOTEBOOK.parent.rglob("*")}
    assert list(here.iterdir()) == []
    return notebook, temporary


def output_of(notebook, start: str) -> str:
    """What the only cell that contains a text printed."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and start in c.source]
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_every_picture_is_drawn(executed):
    notebook, _ = executed
    pictures = [
        base64.b64decode(output["data"]["image/jpeg"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/jpeg" in output.get("data", {})
    ]
    assert len(pictures) == 3 and min(map(len, pictures)) > 5_000


@pytest.mark.slow
def test_the_shipped_detector_gets_better_from_stage_to_stage(executed):
    notebook, _ = executed
    lines = output_of(notebook, "evaluate_stages").splitlines()
    ap = [float(line.split("AP ")[1].split(",")[0]) for line in lines if "AP50" in line]
    assert len(ap) == 4 and ap == sorted(ap) and ap[-1] > 70


@pytest.mark.slow
def test_fine_tuning_learns_the_new_classes(executed):
    notebook, temporary = executed
    text = output_of(notebook, "AP on the pictures")
    losses = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert float(text.split("for validation: ")[1].split()[0]) > 20
    (weights,) = temporary.rglob("model_final.pth")
    assert weights.parent.name == "run"
