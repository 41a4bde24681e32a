"""A run as a folder for the hub, and what is read of one: safetensors, config, model card."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import user_commands
import yaml
from catalogues import no_trace  # noqa: F401  (a fixture)
from coco_files import write_dataset
from detectron2.config import instantiate
from format_files import make_splits, write_yolo
from small_runs import SMALL_MODEL, data_overrides, draw_blocks

from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.class_rows import ClassNames
from detection_toolkit.checkpoint.official_files import (
    CheckpointFileError,
    read_checkpoint,
    write_safetensors,
)
from detection_toolkit.commands.export import main as export
from detection_toolkit.commands.export import parse_args
from detection_toolkit.commands.train import get_parser as train_parser
from detection_toolkit.commands.train import main as train
from detection_toolkit.config import apply_overrides, config_text, get_config
from detection_toolkit.data.shapes import ShapesSpec, generate_shapes
from detection_toolkit.engine import Predictor, prepare_config, publishing
from detection_toolkit.engine.arguments import parse_arguments
from detection_toolkit.engine.runs import describe_run, find_run
from detection_toolkit.engine.shipped import shipped_checkpoint
from detection_toolkit.errors import UserError

safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("no_trace")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four steps, on images that are there, too."""
    folder = tmp_path_factory.mktemp("published")
    json_file, images = write_dataset(folder / "my", num_images=4)
    for name in ("train", "val"):
        shutil.copyfile(json_file, folder / "my" / f"{name}.json")
    user_commands.call(
        [
            *["-m", "detection_toolkit", "train"],
            *["--config-file", "stageinteractor/stageinteractor_tiny_custom.py"],
            *SMALL_MODEL,
            "dataloader.train.dataset.json_file=my/train.json",
            "dataloader.test.dataset.json_file=my/val.json",
            *(f"dataloader.{part}.dataset.image_root={images}" for part in ("train", "test")),
            *(f"dataloader.{part}.num_workers=0" for part in ("train", "test")),
            *["train.max_iter=4", "train.eval_period=2", "train.device=cpu"],
            *["dataloader.train.total_batch_size=2", f"train.output_dir={folder / 'run'}"],
        ],
        folder,
    )
    return folder / "run"


@pytest.fixture
def published(run, tmp_path):
    export(["--config-file", str(run), "--hub-folder", str(tmp_path / "bolts")])
    return tmp_path / "bolts"


def found_by(predictor):
    instances = predictor(draw_blocks())["instances"]
    return instances.scores, instances.pred_boxes.tensor, instances.pred_classes


def test_a_published_folder_is_the_detector(run, published):
    before, after = Predictor.from_run(run), Predictor.from_run(published)
    for a, b in zip(found_by(before), found_by(after), strict=True):
        assert torch.equal(a, b)
    assert after.metadata.thing_classes == ["cat", "dog", "bird"]
    assert after.model.state_dict().keys() == before.model.state_dict().keys()
    file = published / "model.safetensors"
    for named in (file, published / "config.yaml"):
        assert find_run(named) == (str(published / "config.yaml"), str(file))
    # With the config it was made by, as weights.
    config = "stageinteractor/stageinteractor_tiny_custom.py"
    overrides = [*SMALL_MODEL, "model.num_classes=3", "train.device=cpu"]
    for weights in (published, file):
        predictor = Predictor.from_config(config, weights, overrides)
        assert predictor.metadata.thing_classes == ["cat", "dog", "bird"]
        state = predictor.model.state_dict()
        assert all(torch.equal(x, state[k]) for k, x in before.model.state_dict().items())


def test_what_stands_in_the_header_and_nothing_of_this_machine(run, published):
    with safetensors.safe_open(str(published / "model.safetensors"), "pt") as file:
        metadata = file.metadata()
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["detection_toolkit_run"])["classes"] == ["cat", "dog", "bird"]
    assert metadata["detection_toolkit_format"] == "1"
    assert metadata["detection_toolkit_config"] == (published / "config.yaml").read_text()
    assert kinds <= {"F32", "I64"}
    for name in ("config.yaml", "README.md"):
        text = (published / name).read_text()
        assert str(run.parent) not in text and "my/val.json" not in text.split("## What was")[0]


def test_paths_of_other_formats_are_not_published_either():
    args = parse_arguments(train_parser(), ["--data", "/home/me/pets/data.yaml"])
    cfg = apply_overrides(get_config("stageinteractor/stageinteractor_tiny_custom.py"), args.opts)
    assert publishing._data_name(cfg.dataloader.test.dataset) == "pets_val"
    text = config_text(publishing._published_config(cfg, "pets"))
    assert "/home/me" not in text and "split: null" in text and "split: val" not in text


def test_a_fine_tuned_detector_does_not_go_by_the_names_of_its_config(tmp_path):
    """The packaged config names COCO, whose classes are not those of the data it was trained on."""
    folder = write_yolo(tmp_path / "pets", make_splits())
    config = "stageinteractor/shapes_tiny.py"
    args = parse_arguments(train_parser(), ["--data", str(folder)])
    cfg = apply_overrides(get_config(config), [*args.opts, *SMALL_MODEL, "train.device=cpu"])
    for part in ("train", "test"):
        cfg.dataloader[part].dataset["names"] = "coco_2017_val"
    cfg.train.trackers = ["wandb"]
    prepare_config(cfg, args.opts)
    checkpoint = {"model": instantiate(cfg.model).state_dict(), "run": describe_run(cfg)}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "model_final.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    (tmp_path / "run" / "config.yaml").write_text(config_text(cfg))
    export(["--config-file", str(tmp_path / "run"), "--hub-folder", str(tmp_path / "published")])
    predictor = Predictor.from_run(tmp_path / "published")
    assert predictor.metadata.thing_classes == checkpoint["run"]["classes"]
    assert predictor.cfg.model.num_classes == 3
    assert get_config(str(tmp_path / "published" / "config.yaml")).train.trackers == ["tensorboard"]


def test_the_card_tells_what_the_run_has_measured(run, published):
    card = (published / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["pipeline_tag"] == "object-detection" and "license" not in front
    assert front["tags"][:2] == ["object-detection", "detectron2"] and front["library_name"]
    assert "3: cat, dog, bird." in text
    assert "by the config `stageinteractor/stageinteractor_tiny_custom.py`" in text
    best = json.loads((run / "model_best.json").read_text())
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", text, flags=re.M)
    last = json.loads((run / "inference" / "val" / "metrics.json").read_text())
    if last["checkpoint"] == f"iteration {min(best['iteration'] + 1, 4)} of the run":
        assert rows == [("val", f"{best['value']:.2f}")]
    else:  # of other weights than these
        assert rows == [] and "No evaluation of these weights is known" in text
    assert "- data: train\n- length: 4 iterations of 2 images\n- first weights: random ones" in text


def test_figures_of_other_weights_are_not_the_cards(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in copy.glob("inference/val/metrics*.json"):
        document = json.loads(path.read_text())
        document["checkpoint"] = str(copy / "model_best.pth")
        document["results"]["bbox"]["AP"] = 12.345
        path.write_text(json.dumps(document))
    weights = torch.load(copy / "model_best.pth", weights_only=True)["weights"]
    export(["--config-file", str(copy), "--hub-folder", str(tmp_path / "a")])
    text = (tmp_path / "a" / "README.md").read_text()
    has = any(
        json.loads(p.read_text())["weights"] == weights
        for p in copy.glob("inference/val/metrics*.json")
    )
    assert ("| val | 12.3" in text) == has
    final = str(copy / "model_final.pth")
    export(["--config-file", final, "--hub-folder", str(tmp_path / "b")])
    assert "12.3" not in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.slow
def test_the_commands_of_the_card_work(run, published):
    shutil.move(published, run.parent / "bolts")
    (run.parent / "pictures").mkdir(exist_ok=True)
    shutil.copyfile(run.parent / "my" / "images" / "1.png", run.parent / "pictures" / "1.png")
    text = (run.parent / "bolts" / "README.md").read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert len(commands) == 4
    for command in commands:
        python, *words = shlex.split(command.replace("\\\n", " "))
        assert python == "python" and words[:2] == ["-m", "detection_toolkit"]
        if words[2] == "train":
            words += ["train.max_iter=2", "train.eval_period=0", "train.device=cpu"]
        words += [] if words[2] == "predict" else ["dataloader.test.num_workers=0"]
        user_commands.call(words, run.parent)
    assert (run.parent / "drawn").exists() and (run.parent / "output" / "mine").is_dir()
    # Results of an evaluation are not put among what is published.
    assert (run.parent / "output" / "bolts" / "inference" / "val").is_dir()
    assert sorted(p.name for p in (run.parent / "bolts").iterdir()) == sorted(
        ["README.md", "config.yaml", "model.safetensors"]
    )


def test_half_precision_is_that_of_parameters(run, tmp_path):
    arguments = ["--hub-folder", str(tmp_path / "half"), "--precision", "float16"]
    export(["--config-file", str(run), *arguments, "--hub-name", "me/half"])
    weights = read_checkpoint(tmp_path / "half" / "model.safetensors")["model"]
    before, after = Predictor.from_run(run), Predictor.from_run(tmp_path / "half")
    parameters = dict(before.model.named_parameters())
    for name, tensor in before.model.state_dict().items():
        expected = tensor.half() if name in parameters else tensor
        assert torch.equal(weights[name], expected) and weights[name].dtype == expected.dtype
    assert after.model.state_dict()["decoder.stages.0.class_tower.out.weight"].dtype == (
        torch.float32
    )
    text = (tmp_path / "half" / "README.md").read_text()
    assert "float16; they are computed with in float32" in text
    assert "--config-file hf://me/half" in text and 'from_run("hf://me/half")' in text


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Images of shapes, their JSON, and the same with the classes in another order."""
    folder = tmp_path_factory.mktemp("shapes") / "set"
    generate_shapes(ShapesSpec(num_images=10, seed=5), folder)
    document = json.loads((folder / "annotations.json").read_text())
    ids = [c["id"] for c in document["categories"]]
    renumbered = dict(zip(ids, [ids[i] for i in (4, 2, 0, 5, 1, 3)]))
    for category in document["categories"]:
        category["id"] = renumbered[category["id"]]
    for annotation in document["annotations"]:
        annotation["category_id"] = renumbered[annotation["category_id"]]
    document["categories"].sort(key=lambda c: c["id"])
    (folder / "permuted.json").write_text(json.dumps(document))
    return folder


def evaluate(config, output, shapes, name, *options):
    data = data_overrides(str(shapes / name), str(shapes / "images"))
    options = [*options, *data, "dataloader.test.dataset.names=null", "train.device=cpu"]
    options += [f"train.output_dir='{output}'", "train.validation_loss=false"]
    train(["--eval-only", "--config-file", str(config), *options])
    (metrics,) = output.glob("inference/*/metrics.json")
    return json.loads(metrics.read_text())["results"]["bbox"]


def test_data_in_another_order_of_classes_have_the_same_ap(shapes, tmp_path):
    """Of weights of a run, and of what is published."""
    weights = torch.load(shipped_checkpoint(), weights_only=True)["model"]
    names = [c["name"] for c in json.loads((shapes / "annotations.json").read_text())["categories"]]
    torch.save({"model": weights, "run": {"classes": names}}, tmp_path / "named.pth")
    config = "stageinteractor/shapes_tiny.py"
    named = ["--weights", str(tmp_path / "named.pth")]
    arguments = ["--config-file", config, "--hub-folder", str(tmp_path / "published")]
    export([*arguments, *named])
    first = evaluate(config, tmp_path / "a", shapes, "annotations.json", *named)
    assert first["AP"] > 50
    for output, source, options in (("b", config, named), ("c", tmp_path / "published", [])):
        other = evaluate(source, tmp_path / output, shapes, "permuted.json", *options)
        assert other == pytest.approx(first)
    order = [*named, "train.keep_known_classes=false"]
    assert evaluate(config, tmp_path / "d", shapes, "permuted.json", *order)["AP"] < 20


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"detection_toolkit_format": "2"}, "is in version 2 of the format.*needs a newer one"),
        ({"detection_toolkit_format": "x\x1b"}, r"is in version 'x\\x1b' of the format"),
        (
            {"detection_toolkit_format": "1", "detection_toolkit_run": "{"},
            "a.safetensors cannot be read.*its header",
        ),
    ],
)
def test_a_header_that_cannot_be_read_is_named(tmp_path, metadata, said):
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"weight": torch.zeros(1, 1)}, str(path), metadata)
    with pytest.raises(CheckpointFileError, match=said) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("run_facts", ['"text"', "[1]", "7", '{"classes": 3}', '{"classes": [1]}'])
def test_a_strangers_header_may_hold_anything(tmp_path, run_facts):
    path = tmp_path / "a.safetensors"
    model = torch.nn.Linear(1, 1)
    told = {"detection_toolkit_format": "1", "detection_toolkit_run": run_facts}
    safetensors.save_file(model.state_dict(), str(path), told)
    Checkpointer(model, strict=True).load(str(path))


@pytest.mark.parametrize("told", ["text", [1], 7, {"classes": 3}, {"classes": [1]}])
@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_so_may_a_pickle(tmp_path, told, ending):
    path = tmp_path / f"a{ending}"
    model = torch.nn.Linear(1, 1)
    content = {"model": model.state_dict(), "__author__": "me", "run": told}
    if ending == ".pth":
        torch.save(content, path)
    else:
        content["model"] = {k: v.numpy() for k, v in content["model"].items()}
        path.write_bytes(pickle.dumps(content))
    classes = ClassNames(["a"], lambda count: torch.nn.Linear(1, count))
    loaded = Checkpointer(model, strict=True, allow_pickle=True, classes=classes).load(str(path))
    assert loaded.get("run") == (told if isinstance(told, dict) else None)


def test_tensors_that_share_memory_are_written(tmp_path):
    shared = torch.arange(3.0)
    weights = {"a": shared, "b": shared, "c": shared.expand(2, 3)}
    write_safetensors(tmp_path / "a.safetensors", weights, run={"classes": ["é"]})
    read = read_checkpoint(tmp_path / "a.safetensors")
    assert all(np.array_equal(read["model"][k], v) for k, v in weights.items())
    assert read["run"] == {"classes": ["é"]}


def test_a_strangers_config_is_read_as_that_of_a_run(published):
    config = published / "config.yaml"
    text = config.read_text()
    config.write_text(re.sub(r"_target_: [\w.]+", "_target_: os.system", text, count=1))
    with pytest.raises(UserError, match="is no part of a detector"):
        Predictor.from_run(published)


def test_nothing_is_overwritten(run, published):
    (published / "README.md").write_text("license: mine")
    with pytest.raises(SystemExit) as end:
        export(["--config-file", str(run), "--hub-folder", str(published)])
    assert "has a model.safetensors already" in end.value.code  # printed, and the exit code is 1
    assert (published / "README.md").read_text() == "license: mine"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--output FILE, or --hub-folder DIR"),
        (["--output", "a", "--hub-name", "a/b"], "--hub-name goes with --hub-folder"),
        (["--hub-folder", "a", "--hub-name", "ab"], "it has the form OWNER/NAME"),
    ],
)
def test_options_that_do_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--config-file", "c.py", *arguments])
    assert said in capsys.readouterr().err
