"""config.yaml of somebody else: what is used without being asked, and what is not."""

import os

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from fault_runs import load_tool
from omegaconf import OmegaConf
from torch import nn

from detection_toolkit import projects
from detection_toolkit.checkpoint.official_files import CheckpointFileError
from detection_toolkit.config import config_names, config_text, get_config
from detection_toolkit.engine import Predictor
from detection_toolkit.engine.runs import CONFIG_NAME
from detection_toolkit.errors import UserError
from detection_toolkit.evaluation.results import register_dataset


@pytest.fixture
def mark(tmp_path):
    """A folder that is there if code of a config has been run."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(folder, text):
    path = folder / CONFIG_NAME
    path.write_text(text)
    return str(path)


# {} is what is made if code is run.
OBJECTS = [
    "a: !!python/object/apply:os.mkdir ['{}']",
    "a: !!python/object/apply:os.mkdir\n  args: ['{}']",
    "a: !!python/object/new:os.mkdir ['{}']",
    "a: !!python/object:os.mkdir {{path: '{}'}}",
    "? !!python/object/apply:os.mkdir ['{}']\n: 1",
    "a: !!python/name:os.mkdir ''\nb: '{}'",
    "a: !!python/name:torch.os.mkdir ''\nb: '{}'",
    "a: !!python/module:antigravity ''\nb: '{}'",
    "a: !!python/object/apply:torch.load ['{}']",
    "a: !!python/object:detectron2.layers.ShapeSpec {{channels: !!python/object/apply:os.mkdir "
    "['{}']}}",
]
TARGETS = [
    "a: {{_target_: os.mkdir, path: '{}'}}",
    "a: [{{b: {{_target_: os.mkdir, path: '{}'}}}}]",
    "a: {{_target_: torch.os.mkdir, path: '{}'}}",
    "a: {{_target_: detection_toolkit.data.documents.os.mkdir, path: '{}'}}",
    "a: {{_target_: stageinteractor.boxes.torch.os.mkdir, path: '{}'}}",
    "a: {{_target_: torch.utils.collect_env.run, command: 'mkdir {}'}}",
    "a: {{_target_: torch.load, f: '{}'}}",
    "a: {{_target_: torch.hub.load, repo_or_dir: '{}'}}",
    "a: {{_target_: torch.nn.attention.register_flash_attention_impl, impl: '{}'}}",
    "a: {{_target_: detectron2.config.LazyConfig.load, filename: '{}'}}",
    "a: {{_target_: detectron2.data.build.load_proposals_into_dataset, proposal_file: '{}'}}",
    "a: {{_target_: detectron2.data.get_detection_dataset_dicts, proposal_files: ['{}']}}",
    "a: {{_target_: detectron2.data.build_detection_train_loader, cfg: {{MODEL: '{}'}}}}",
    "a: {{_target_: detection_toolkit.config.get_config, path: '{}'}}",
    "a: {{_target_: detection_toolkit.data.shapes.generate_shapes, folder: '{}'}}",
    "a: {{_target_: torchvision.models.get_weight, name: '{}'}}",
    "a: {{_target_: torch.nn.Module.compile, self: !!python/name:torch.nn.Linear '', "
    "options: {{cpp.cxx: ['{}']}}}}",
    "a: {{_target_: detectron2.data.detection_utils.read_image, file_name: '{}'}}",
    "a: {{_target_: detectron2.data.DatasetCatalog.register, name: '{}'}}",
    "a: {{_target_: detection_toolkit.evaluation.results.register_dataset, output_dir: '{}', "
    "name: b, trust_config: true}}",
    "a: {{_target_: detection_toolkit.data.documents.write_copy, stem: '{}'}}",
    "a: {{_target_: detection_toolkit.modeling.backbones.TimmBackbone, name: resnet18, "
    "model_args: {{checkpoint_path: '{}'}}}}",
    "a: {{_target_: torch.nn.Module.__init__.__globals__, b: '{}'}}",
    "a: {{_target_: builtins.eval, source: '{}'}}",
    "a: {{_target_: '${{b}}', path: '{}'}}\nb: os.mkdir",
    "a: {{_target_: {{_target_: torch.nn.Identity}}, path: '{}'}}",
    "a: {{_target_: [os.mkdir], path: '{}'}}",
    "a: '${{oc.decode:\"{{_target_: os.mkdir, path: {}}}\"}}'",
    "a: '${{oc.create:{{_target_: os.mkdir, path: {}}}}}'",
    "a: '${{${{b}}:x}}'\nb: oc.decode\nc: '{}'",
    "a: '${{oc.decode:\"[{}]\"}}'",
    "a: 'http://server/${{oc.env:PASSWORD}}'\nb: '{}'",
    "a: 'http://server/${{oc.env:PASSWORD,{}}}'",
]


@pytest.mark.parametrize("text", OBJECTS + TARGETS)
def test_what_is_no_part_of_a_detector_is_refused_with_the_cure(tmp_path, mark, text):
    file = write(tmp_path, text.format(mark))
    with pytest.raises(UserError, match=r"config\.yaml .*--trust-config"):
        instantiate(get_config(file).a)


@pytest.mark.parametrize("text", [OBJECTS[0], TARGETS[0]])
def test_who_trusts_a_config_runs_it(tmp_path, text):
    file = write(tmp_path, text.format(tmp_path / "made"))
    instantiate(get_config(file, trust_config=True).a)
    assert (tmp_path / "made").is_dir()


def test_no_package_is_imported_to_find_out(tmp_path, monkeypatch, mark):
    """A run's folder may hold a module, and be where a command is started."""
    (tmp_path / "evil_module.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    file = write(tmp_path, "a: {_target_: evil_module.Thing}")
    with pytest.raises(UserError, match="names 'evil_module.Thing'"):
        get_config(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "cannot be read as a YAML"),
        ("- a", "holds no keys"),
        ("", "holds no keys"),
        ("a: \x00", "cannot be read"),
        ("a: &a [*a]", "cannot be read|too deep"),
        ("a: " + "[" * 5000, "cannot be read|too deep"),
    ],
)
def test_what_is_no_config_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        get_config(write(tmp_path, text))


def test_a_few_lines_are_not_multiplied_without_bound(tmp_path):
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match="too large"):
        get_config(write(tmp_path, "\n".join(lines)))


def test_reports_read_no_config_that_runs_code(tmp_path, mark):
    write(tmp_path, OBJECTS[0].format(mark))
    with pytest.raises(UserError, match="--trust-config"):
        register_dataset(tmp_path, "a_name_of_nobody")


@pytest.mark.parametrize(
    "tool",
    ["analyze_model", "export", "replay_batch", "report", "run_ablation", "visualize_stages"],
)
def test_commands_that_read_configs_have_the_flag(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        load_tool(tool).main(["--help"])
    assert ended.value.code == 0
    assert "--trust-config" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tiny", pytest.param("", marks=pytest.mark.slow)])
def test_what_a_run_writes_is_read_as_before(tmp_path, kind):
    """Of every packaged config; tests/contracts builds their models."""
    for name in (name for name in config_names() if kind in name):
        cfg = get_config(name)
        file = write(tmp_path, config_text(cfg))
        expected = OmegaConf.to_container(LazyConfig.load(file), resolve=False)
        assert OmegaConf.to_container(get_config(file), resolve=False) == expected


def test_installed_packages_are_not_listed_for_each_part(tmp_path, monkeypatch):
    """Listing them takes longer than all else."""
    asked = []
    monkeypatch.setattr(projects, "entry_points", lambda group: asked.append(group) or ())
    projects.project_names.cache_clear()
    try:
        get_config(write(tmp_path, config_text(get_config("stageinteractor/shapes_tiny.py"))))
    finally:
        projects.project_names.cache_clear()
    assert asked == [projects.GROUP]


def test_values_that_yaml_has_no_form_for(tmp_path):
    values = {"norm": nn.LayerNorm, "shape": ShapeSpec(channels=3, stride=4)}
    cfg = OmegaConf.create(values, flags={"allow_objects": True})
    again = get_config(write(tmp_path, config_text(cfg)))
    assert again.norm is nn.LayerNorm
    assert again.shape == ShapeSpec(channels=3, stride=4)
    cfg = OmegaConf.create({"odd": lambda: None}, flags={"allow_objects": True})
    with pytest.raises(UserError):
        get_config(write(tmp_path, config_text(cfg)))


def test_the_folder_of_data_sets_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    text = "a: ${oc.env:DETECTRON2_DATASETS,datasets}/images\nb: ${a}\nc: ${.b}"
    cfg = get_config(write(tmp_path, text))
    assert cfg.b == cfg.c == "/data/images"


def test_a_config_does_not_allow_itself_to_open_pickles(tmp_path, caplog):
    """A folder of a run may come with a checkpoint that runs code, and a config that wants it."""
    file = write(
        tmp_path,
        "train: {allow_pickle: true}\nallowed: true\n"
        "dataloader: {test: [{allow_outside: '${allowed}'}, {allow_outside: false}]}",
    )
    cfg = get_config(file)
    assert cfg.train.allow_pickle is False
    assert [node.allow_outside for node in cfg.dataloader.test] == [False, False]
    assert "allow_pickle=true, which is for you to say" in caplog.text
    assert "allow_outside=true" in caplog.text
    assert get_config(file, trust_config=True).train.allow_pickle is True


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("trackers: [tensorboard, wandb]", ["tensorboard"]),
        ("trackers: ['${name}']", []),
        ("trackers: '${names}'", []),
        ("<<: {trackers: [mlflow]}", []),
        ("trackers: [{_target_: detection_toolkit.engine.trackers.WandB, project: p}]", []),
        ("trackers: !!python/tuple [mlflow, tensorboard]", ["tensorboard"]),
    ],
)
def test_a_config_does_not_send_a_run_to_trackers(tmp_path, caplog, given, kept):
    file = write(tmp_path, f"train: {{{given}}}\nname: wandb\nnames: [wandb]")
    assert get_config(file).train.trackers == kept
    assert "config.yaml sends its run to trackers, which is for you to say" in caplog.text
    assert len(get_config(file, trust_config=True).train.trackers) >= 1
    caplog.clear()
    for harmless in ("[tensorboard]", "[]"):
        get_config(write(tmp_path, f"train: {{trackers: {harmless}}}"))
    assert not caplog.text


@pytest.mark.parametrize("through", ["folder", "config"])
def test_the_folder_of_a_run_runs_no_code(tmp_path, mark, through):
    """From opening it to the end: config, permissions and weights are all a stranger's."""
    cfg = get_config("stageinteractor/shapes_tiny.py")
    cfg.train.allow_pickle = True
    cfg.train.init_checkpoint = str(tmp_path / "model_final.pth")
    file = write(tmp_path, config_text(cfg))
    torch.save({"model": {}, "note": Mark(str(mark))}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointFileError, match="train.allow_pickle=true"):
        if through == "folder":
            Predictor.from_run(str(tmp_path))
        else:
            Predictor.from_config(file)


def test_a_lazy_config_is_code_as_always(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"import os\nfrom detectron2.config import LazyCall as L\n"
        f"a = L(os.mkdir)(path={str(tmp_path / 'made')!r})\n"
    )
    instantiate(get_config(str(path)).a)
    assert (tmp_path / "made").is_dir()
