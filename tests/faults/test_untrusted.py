"""Files of strangers: annotations, checkpoints, pickles."""

import json
import os
import pickle

import pytest
import torch
from coco_files import make_document, write_dataset, write_image
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.official_files import CheckpointFileError
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.data import get_detection_dataset, register_coco_json
from detection_toolkit.engine.runs import find_run


def rename_first(folder, name):
    json_file, root = write_dataset(folder)
    document = make_document()
    document["images"][0]["file_name"] = name
    (folder / "annotations.json").write_text(json.dumps(document))
    return json_file, root


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("../secret.png", "leads upwards"),
        ("a/../../secret.png", "leads upwards"),
        ("..\\secret.png", "leads upwards"),
        ("/etc/passwd", "is absolute"),
        ("C:\\secret.png", "is absolute"),
        ("C:secret.png", "is absolute"),
        ("\\\\server\\share\\secret.png", "is absolute"),
    ],
)
def test_images_outside_of_the_folder_are_refused_unless_allowed(tmp_path, name, wrong):
    json_file, root = rename_first(tmp_path, name)
    with pytest.raises(ValueError, match=rf"annotations\.json: image 1 .*{wrong}.*allow_outside"):
        register_coco_json(json_file, root)
    dataset = get_detection_dataset(json_file=json_file, image_root=root, allow_outside=True)
    assert len(dataset) == 4


@pytest.mark.parametrize(
    "name, wrong", [("", "is empty"), ("a\0b.png", "NUL"), ("a\ud800.png", "no file name can have")]
)
def test_names_that_no_file_has_are_refused_in_every_case(tmp_path, name, wrong):
    json_file, root = rename_first(tmp_path, name)
    for allow_outside in (False, True):
        with pytest.raises(ValueError, match=wrong):
            register_coco_json(json_file, root, allow_outside=allow_outside)


def test_links_out_of_the_folder_are_refused_unless_allowed(tmp_path):
    json_file, root = write_dataset(tmp_path)
    write_image(tmp_path / "secret.png")
    os.remove(f"{root}/2.png")
    os.symlink(tmp_path / "secret.png", f"{root}/2.png")
    with pytest.raises(ValueError, match=r"1 of its images are links to files outside.*2\.png"):
        register_coco_json(json_file, root)
    dataset = get_detection_dataset(json_file=json_file, image_root=root, allow_outside=True)
    assert len(dataset) == 4


def test_a_folder_that_leads_out_is_a_link_too(tmp_path):
    json_file, root = rename_first(tmp_path, "sub/1.png")
    write_image(tmp_path / "elsewhere" / "1.png")
    os.symlink(tmp_path / "elsewhere", f"{root}/sub")
    with pytest.raises(ValueError, match=r"links to files outside.*sub/1\.png"):
        register_coco_json(json_file, root)


def test_links_within_the_folder_and_a_folder_that_is_one_are_fine(tmp_path):
    json_file, root = write_dataset(tmp_path)
    os.rename(f"{root}/2.png", f"{root}/two.png")
    os.symlink("two.png", f"{root}/2.png")
    os.symlink(root, tmp_path / "linked")
    assert len(get_detection_dataset(json_file=json_file, image_root=str(tmp_path / "linked"))) == 4


@pytest.fixture
def registered():
    """Registers as Detectron2's users do, a data set named "mine"."""
    yield lambda json_file, root: register_coco_instances("mine", {}, json_file, root)
    DatasetCatalog.remove("mine")
    MetadataCatalog.pop("mine")


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("../secret.png", "leads upwards"),
        ("..\\secret.png", "leads upwards"),
        ("/etc/passwd", "is absolute"),
        ("C:secret.png", "is absolute"),
    ],
)
def test_a_registered_name_does_not_lead_out_of_its_folder_either(
    tmp_path, registered, name, wrong
):
    registered(*rename_first(tmp_path, name))
    with pytest.raises(ValueError, match=rf"data set mine: the image .*{wrong}.*allow_outside"):
        get_detection_dataset("mine")
    assert len(get_detection_dataset("mine", allow_outside=True)) == 4


def test_a_config_allows_it_for_a_registered_name(tmp_path, registered):
    registered(*rename_first(tmp_path, "../secret.png"))
    cfg = get_config("stageinteractor/shapes_tiny.py")
    apply_overrides(cfg, ["dataloader.test.dataset.names=mine"])
    with pytest.raises(ValueError, match="leads upwards.*set allow_outside=true beside names"):
        instantiate(cfg.dataloader.test.dataset)
    apply_overrides(cfg, ["dataloader.test.dataset.allow_outside=true"])
    assert len(instantiate(cfg.dataloader.test.dataset)) == 4


def test_links_out_of_the_folder_of_a_registered_name_are_refused_too(tmp_path, registered):
    json_file, root = write_dataset(tmp_path)
    write_image(tmp_path / "secret.png")
    os.remove(f"{root}/2.png")
    os.symlink(tmp_path / "secret.png", f"{root}/2.png")
    registered(json_file, root)
    with pytest.raises(ValueError, match=r"mine: 1 of its images are links to files .*2\.png"):
        get_detection_dataset("mine")
    assert len(get_detection_dataset("mine", allow_outside=True)) == 4


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "http://x.org/a.png"])
def test_names_in_the_current_folder_do_not_lead_out_either(tmp_path, registered, name):
    registered(rename_first(tmp_path, name)[0], "")
    with pytest.raises(ValueError, match=r"outside of its image folder \(the current one\)"):
        get_detection_dataset("mine")


def test_a_registered_name_that_no_file_has_is_refused_in_every_case(tmp_path, registered):
    registered(*rename_first(tmp_path, "a\0/b.png"))
    for allow_outside in (False, True):
        with pytest.raises(ValueError, match="data set mine: image 1 .* has a NUL character"):
            get_detection_dataset("mine", allow_outside=allow_outside)


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../images"])
def test_a_registered_folder_may_be_spelled_in_any_way(tmp_path, registered, spelling):
    """As text or path, a link, and with absolute names of images within it."""
    json_file, root = rename_first(tmp_path, str(tmp_path / "images" / "1.png"))
    registered(tmp_path / "annotations.json", spelling.format(root))
    assert len(get_detection_dataset("mine")) == 4
    os.symlink(root, tmp_path / "linked")
    MetadataCatalog.pop("mine")
    MetadataCatalog.get("mine").set(image_root=tmp_path / "linked")
    assert len(get_detection_dataset("mine")) == 4


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("ending", ["pth", "pkl", "pyth"])
def test_a_checkpoint_runs_no_code(tmp_path, ending):
    mark, path = tmp_path / "mark", tmp_path / f"weights.{ending}"
    content = {"model": {}, "model_state": {}, "__author__": "x", "note": Mark(str(mark))}
    if ending == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointFileError):
        Checkpointer(torch.nn.Linear(1, 1)).load(str(path))
    assert not mark.exists()


def test_a_pickle_is_opened_behind_a_flag(tmp_path):
    path = tmp_path / "weights.pkl"
    weights = {"weight": torch.full((1, 1), 5.0).numpy(), "bias": torch.zeros(1).numpy()}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "me"}))
    model = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointFileError, match="train.allow_pickle=true"):
        Checkpointer(model).load(str(path))
    Checkpointer(model, allow_pickle=True).load(str(path))
    assert float(model.weight.detach()) == 5.0


def test_a_damaged_archive_that_is_resumed_runs_no_code(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"model": {}, "note": Mark(str(mark))}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(CheckpointFileError, match="none of the 1 checkpoints"):
        Checkpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "named", ["/{}", "../{}", "sub/{}", "link.pth", "..", "sub", "a\\b.pth", "model_{}.pth\x1b[2J"]
)
@pytest.mark.parametrize("others", [0, 1])
def test_last_checkpoint_names_no_file_elsewhere(tmp_path, named, others, caplog):
    """A foreign file is neither read nor set aside as damaged."""
    foreign = tmp_path / "foreign"
    foreign.write_text("no checkpoint")
    output = tmp_path / "output"
    (output / "sub").mkdir(parents=True)
    (output / "sub" / "foreign").write_text("no checkpoint")
    (output / "link.pth").symlink_to(foreign)
    for number in range(others):
        Checkpointer(torch.nn.Linear(1, 1), str(output)).save(f"model_{number:07}", iteration=3)
    text = named.format(str(foreign)[1:] if named[0] == "/" else "foreign")
    (output / "last_checkpoint").write_text(text)
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(output))
    if others:
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
        assert "last_checkpoint names" in caplog.text
        assert "\x1b" not in caplog.text
    else:
        with pytest.raises((CheckpointFileError, FileNotFoundError), match="last_checkpoint"):
            checkpointer.resume_or_load("", resume=True)
    assert foreign.read_text() == "no checkpoint"
    assert not list(tmp_path.rglob("*.damaged"))
    assert find_run(str(_with_config(output)))[1] in (None, str(output / "model_0000000.pth"))


def _with_config(folder):
    (folder / "config.yaml").write_text("train: {}")
    return folder


def test_a_last_checkpoint_that_is_a_link_is_none(tmp_path):
    (tmp_path / "elsewhere").write_text("model_0000001.pth")
    output = tmp_path / "output"
    output.mkdir()
    (output / "last_checkpoint").symlink_to(tmp_path / "elsewhere")
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(output))
    assert not checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True) == {}
    checkpointer.save("model_0000002", iteration=2)
    assert (tmp_path / "elsewhere").read_text() == "model_0000001.pth"
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
