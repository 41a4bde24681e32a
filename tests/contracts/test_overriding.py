"""A trainer is extended as Detectron2's ``DefaultTrainer`` is, with the same signatures."""

import inspect
import json

import pytest
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventWriter
from small_runs import make_config

from detection_toolkit.config import apply_overrides
from detection_toolkit.data import DetectionMapper, get_detection_dataset
from detection_toolkit.engine import Trainer, prepare_config

METHODS = [
    "build_model",
    "build_optimizer",
    "build_lr_scheduler",
    "build_train_loader",
    "build_test_loader",
    "build_evaluator",
    "build_hooks",
    "build_writers",
    "test",
    "resume_or_load",
    "train",
    "state_dict",
    "load_state_dict",
    "auto_scale_workers",
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_detectron2s_takes(name):
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters.values())
        for kind in (Trainer, DefaultTrainer)
    )
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    # What is more must be optional.
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


class Counts(DatasetEvaluator):
    def reset(self):
        self.detections = 0

    def process(self, inputs, outputs):
        self.detections += sum(len(x["instances"]) for x in outputs)

    def evaluate(self):
        return {"bbox": {"AP": float(self.detections)}}


class Steps(HookBase):
    steps = 0

    def after_step(self):
        self.steps += 1


class Writer(EventWriter):
    writes = 0

    def write(self):
        self.writes += 1


class EverythingIsOwn(Trainer):
    """Each method with Detectron2's signature, and with Detectron2's parts."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.is_own = True
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)

    @classmethod
    def build_train_loader(cls, cfg):
        node = cfg.dataloader.train.dataset
        return build_detection_train_loader(
            dataset=get_detection_dataset(json_file=node.json_file, image_root=node.image_root),
            mapper=DetectionMapper(True, augmentations=[]),
            total_batch_size=2,
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(
            get_detection_dataset(dataset_name), mapper=DetectionMapper(False, augmentations=[])
        )

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Counts()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        results = super().test(cfg, model, evaluators)
        results["bbox"]["own"] = 1.0
        return results

    def build_hooks(self):
        self.own_hook = Steps()
        return [*super().build_hooks(), self.own_hook]

    def build_writers(self):
        self.own_writer = Writer()
        return [*super().build_writers(), self.own_writer]


def train(kind, folder, *overrides, resume=False):
    cfg = make_config(folder, "train.eval_period=2", *overrides)
    trainer = kind(prepare_config(cfg))
    trainer.resume_or_load(resume=resume)
    return trainer, trainer.train()


def test_everything_is_overridden_at_once(tmp_path):
    trainer, results = train(EverythingIsOwn, tmp_path)
    assert results["bbox"]["own"] == 1.0
    assert results["bbox"]["AP"] == 4 * trainer.model.max_detections
    assert trainer.model.is_own
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 5e-4
    assert trainer.own_hook.steps == 4
    assert trainer.own_writer.writes >= 4
    best = json.loads((tmp_path / "output" / "model_best.json").read_text())
    assert best["value"] == results["bbox"]["AP"]


class WithoutWriters(Trainer):
    def build_writers(self):
        return []


def test_without_writers_there_is_an_output_folder_all_the_same(tmp_path):
    trainer, _ = train(WithoutWriters, tmp_path)
    output = tmp_path / "output"
    assert (output / "model_final.pth").is_file()
    assert not (output / "metrics.json").exists()


def test_the_output_folder_is_there_before_the_first_step(tmp_path):
    WithoutWriters(prepare_config(make_config(tmp_path)))
    assert (tmp_path / "output").is_dir()


class EvaluationsOnly(Trainer):
    """Counts evaluations."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.calls += 1
        return {"bbox": {"AP": float(cls.calls)}}


@pytest.mark.parametrize(
    ("period", "evaluations"), [(2, 2), (3, 2), (4, 1), (1, 4), (5, 1), (0, 1)]
)
def test_a_run_of_four_steps_is_evaluated_so_often(tmp_path, period, evaluations):
    EvaluationsOnly.calls = 0
    train(EvaluationsOnly, tmp_path, f"train.eval_period={period}")
    assert EvaluationsOnly.calls == evaluations
    last = (tmp_path / "output" / "metrics.json").read_text().splitlines()[-1]
    assert json.loads(last)["bbox/AP"] == evaluations  # of the final evaluation


def test_a_changed_config_leaves_the_next_load_alone(tmp_path):
    first = make_config(tmp_path)
    before = first.model.decoder.num_stages
    apply_overrides(first, ["model.decoder.num_stages=5", "optimizer.lr=9.0"])
    first.dataloader.train.mapper.augmentations.append("x")
    second = make_config(tmp_path)
    assert second.model.decoder.num_stages == before
    assert second.optimizer.lr != 9.0
    assert "x" not in list(second.dataloader.train.mapper.augmentations)
