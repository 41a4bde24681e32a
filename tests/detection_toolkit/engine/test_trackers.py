"""Trackers of experiments, each as it is without a network; and none stops a run."""

import importlib.util
import json
import logging
import struct
import sys

import pytest
from detectron2.config import LazyCall as L
from small_runs import make_config, run_overrides

from detection_toolkit.commands import main
from detection_toolkit.config import get_config
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.engine.shipped import shipped_config
from detection_toolkit.engine.trackers import MLflow, RunFacts, WandB, build_trackers
from detection_toolkit.errors import MissingPackageError, UnknownNameError, UserError


def train(folder, *overrides, resume=False, max_iter=4):
    settings = ["train.eval_period=2", f"train.max_iter={max_iter}", *overrides]
    cfg = prepare_config(make_config(folder, *settings))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def logged(folder):
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ids_of(folder):
    return json.loads((folder / "output" / "trackers.json").read_text())


def events_of(folder):
    return list((folder / "output").glob("events.*"))


def test_tensorboard_is_the_default_and_may_be_left_out(tmp_path):
    assert train(tmp_path / "with").settings.trackers == ["tensorboard"]
    assert events_of(tmp_path / "with")
    train(tmp_path / "without", "train.trackers=[]")
    assert not events_of(tmp_path / "without") and logged(tmp_path / "without")


def wandb_records(path):
    """Of an offline file: LevelDB's log format, with protocol buffers in it."""
    from wandb.proto import wandb_internal_pb2

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record.WhichOneof("record_type"), record
            part = b""


def test_wandb_offline_has_config_and_metrics_and_goes_on_when_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, "train.trackers=[wandb]", max_iter=2)
    run_id = ids_of(tmp_path)["wandb"]
    train(tmp_path, "train.trackers=[wandb]", resume=True)
    assert ids_of(tmp_path) == {"wandb": run_id}
    files = sorted((tmp_path / "output" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    history, configs = {}, {}
    for path in files:
        for kind, record in wandb_records(path):
            if kind == "run":
                assert (record.run.run_id, record.run.project) == (run_id, "detection")
                configs |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                history.setdefault(int(row["_step"]), {}).update(row)
    assert configs["train"]["max_iter"] in (2, 4) and configs["model"]["_target_"]
    assert {0, 1, 2, 3} <= set(history)
    assert history[max(history)]["bbox/AP"] == logged(tmp_path)[-1]["bbox/AP"]
    assert all(history[i]["total_loss"] > 0 for i in range(4))


def mlflow_or_skip(monkeypatch, folder):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.chdir(folder)  # where it would put artifacts
    return mlflow


@pytest.mark.slow
def test_mlflow_in_a_file_has_config_and_metrics_and_goes_on_when_resumed(tmp_path, monkeypatch):
    mlflow = mlflow_or_skip(monkeypatch, tmp_path)
    train(tmp_path, "train.trackers=[mlflow]", max_iter=2)
    run_id = ids_of(tmp_path)["mlflow"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FINISHED"
    train(tmp_path, "train.trackers=[mlflow]", resume=True)
    assert ids_of(tmp_path) == {"mlflow": run_id}
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "output"
    assert client.get_experiment(run.info.experiment_id).name == "detection"
    last = logged(tmp_path)[-1]
    assert run.data.metrics["bbox/AP"] == last["bbox/AP"]
    steps = [m.step for m in client.get_metric_history(run_id, "total_loss")]
    assert steps == [0, 1, 2, 3]
    assert run.data.params["train.max_iter"] == "2"  # as it began
    assert run.data.params["optimizer.lr"]


class Facts(RunFacts):
    """Of a run of two iterations."""

    def __init__(self, folder):
        super().__init__(folder, dict, 2, lambda: 0)


def test_nodes_have_settings_and_survive_the_config_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    given = [L(WandB)(project="mine", tags=["a"]), {"_target_": MLflow, "experiment": "e"}]
    writers = build_trackers(given, Facts(tmp_path))
    assert [w._tracker.name for w in writers] == ["wandb", "mlflow"]
    assert writers[0]._tracker.project == "mine" and writers[1]._tracker.experiment == "e"
    node = "_target_: detection_toolkit.engine.trackers.WandB\n    project: p"
    text = f"train:\n  trackers:\n  - {node}\n"
    (tmp_path / "config.yaml").write_text(text)
    cfg = get_config(str(tmp_path / "config.yaml"), trust_config=True)
    assert cfg.train.trackers[0].project == "p"


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (["wandbb"], UnknownNameError, "'wandbb'; there are tensorboard, wandb, mlflow"),
        ([3], UserError, "takes names"),
        ([{"_target_": WandB, "api_key": "x"}], UserError, "cannot be built"),
        ([{"_target_": dict}], UserError, "takes names"),
    ],
)
def test_what_is_no_tracker_is_named(tmp_path, entries, error, message):
    with pytest.raises(error, match=message):
        build_trackers(entries, Facts(tmp_path))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_is_trained(tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == name else found(n, *a)
    )
    with pytest.raises(MissingPackageError, match=f"train.trackers has {name}, .* pip install"):
        build_trackers([name], Facts(tmp_path))
    overrides = run_overrides(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config-file", shipped_config(), *overrides, f"train.trackers=[{name}]"])
    text = str(ended.value.code)
    assert text.startswith("error: train.trackers has") and "\n" not in text
    assert not list((tmp_path / "output").glob("*.pth"))


class Broken:
    """In the place of wandb: fails after so many calls."""

    def __init__(self, calls):
        self.calls, self.id = calls, "abc"

    def init(self, **_):
        self.log()
        return self

    def log(self, *_, **__):
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("no route to\nhost")

    def finish(self, **_):
        self.log()


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_tracker_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog, calls):
    monkeypatch.setitem(sys.modules, "wandb", Broken(calls))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: n if n == "wandb" else found(n, *a)
    )
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, "train.trackers=[wandb,tensorboard]")
    warnings = [r.getMessage() for r in caplog.records if "wandb fails" in r.getMessage()]
    assert len(warnings) == 1 and "no route to host" in warnings[0]
    assert trainer.iter == 4 and len(logged(tmp_path)) >= 4 and events_of(tmp_path)


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    """As all writers: the others build none."""
    from detectron2.engine import hooks
    from detectron2.utils import comm

    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    made = []
    monkeypatch.setattr(Trainer, "build_writers", lambda self: made.append(self) or [])
    (tmp_path / "output").mkdir()
    trainer = Trainer(prepare_config(make_config(tmp_path, "train.trackers=[wandb]")))
    assert not made
    assert not any(isinstance(h, hooks.PeriodicWriter) for h in trainer._hooks)


def test_a_folder_without_a_checkpoint_begins_a_new_run(tmp_path, monkeypatch):
    """Its id is of a run that ended before there was anything to go on with."""
    seen = []

    class Noting(WandB):
        def start(self, facts, run_id):
            seen.append(run_id)
            return "new"

        def log(self, values, iteration):
            pass

        def finish(self, *, is_complete):
            seen.append(is_complete)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name)
    writer = Noting().open(Facts(tmp_path))
    (tmp_path / "trackers.json").write_text('{"wandb": "old", "mlflow": "other"}')
    writer._send({0: {"a": 1.0}})
    assert json.loads((tmp_path / "trackers.json").read_text()) == {
        "wandb": "new",
        "mlflow": "other",
    }
    resumed = Noting().open(RunFacts(tmp_path, dict, 2, lambda: 1))
    resumed._send({1: {"a": 1.0}})
    writer.close()
    assert seen == [None, "new", False]
