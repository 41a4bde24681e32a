"""Mosaic and mixup in a run: their end, by position, also where the run was interrupted."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.utils.env import seed_all_rng
from small_runs import make_config

from detection_toolkit.config import config_text, get_config
from detection_toolkit.data import MixUp, Mosaic, MultiImageMapper
from detection_toolkit.engine import RunSettings, Trainer, prepare_config
from detection_toolkit.engine.training_images import TrainingImages
from detection_toolkit.errors import UserError

END = "mosaic, mixup and copy-paste have ended"


def mixing_config(folder, *overrides):
    cfg = make_config(folder, "train.seed=3", "train.deterministic=true", *overrides, num_images=7)
    mapper = cfg.dataloader.train.mapper
    cfg.dataloader.train.mapper = L(MultiImageMapper)(
        augmentations=mapper.augmentations,
        image_format=mapper.image_format,
        mosaic=L(Mosaic)(),
        mixup=L(MixUp)(prob=0.5),
    )
    return prepare_config(cfg)


def run(cfg, *, resume=False, stop=None, seed=3):
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = stop or trainer.max_iter  # the schedule covers the whole run
    trainer.train()
    return trainer


def ends(caplog):
    return [r.getMessage() for r in caplog.records if END in r.getMessage()]


def test_a_run_says_once_when_images_begin_to_come_by_themselves(tmp_path, caplog):
    caplog.set_level("INFO")
    run(mixing_config(tmp_path, "train.mix_until=0.5"))
    (line,) = ends(caplog)
    assert line.startswith(f"{END} after 2 iterations (train.mix_until)")


def test_nothing_is_said_where_they_never_do(tmp_path, caplog):
    caplog.set_level("INFO")
    run(mixing_config(tmp_path))
    assert not ends(caplog)


@pytest.mark.parametrize(
    "stop", [2, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 3))]
)
def test_a_run_that_was_interrupted_ends_them_at_the_same_image(tmp_path, caplog, stop):
    caplog.set_level("INFO")
    whole = run(mixing_config(tmp_path / "whole", "train.mix_until=0.5"))
    options = ("train.mix_until=0.5", "train.checkpointer.period=1")
    run(mixing_config(tmp_path / "parts", *options), stop=stop)
    caplog.clear()
    cfg = mixing_config(tmp_path / "parts", *options)
    cfg.dataloader.train.num_workers = 2
    resumed = run(cfg, resume=True, seed=8)
    assert resumed.start_iter == stop and len(ends(caplog)) == 1
    states = [t.checkpointer.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_images_of_view_data_end_with_the_runs(tmp_path):
    cfg = mixing_config(tmp_path, "train.mix_until=0.5", "train.accumulation_steps=2")
    images = list(TrainingImages(cfg).since(0, 16))
    for image in images:
        sources = {s.record["image_id"] for s in image.objects[0]}
        if image.draw.position >= 2 * 2 * 2:  # iterations, batches, images
            assert sources == {image.views[0]["image_id"]}
    mixed = [image for image in images if image.draw.position < 8]
    assert sum(len({s.record["image_id"] for s in x.objects[0]}) > 1 for x in mixed) > 4


def test_the_config_of_such_a_run_is_used_without_trusting_it(tmp_path):
    (tmp_path / "config.yaml").write_text(config_text(mixing_config(tmp_path / "run")))
    cfg = get_config(str(tmp_path / "config.yaml"))
    assert RunSettings.from_config(cfg.train).mix_until == 1.0


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_share_out_of_its_range_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="train.mix_until must be from 0 to 1"):
        RunSettings(mix_until=value)


def test_a_loader_without_positions_is_refused(tmp_path):
    cfg = make_config(tmp_path, "train.mix_until=0.5")
    node = cfg.dataloader.train
    cfg.dataloader.train = L(build_detection_train_loader)(
        dataset=node.dataset, mapper=node.mapper, total_batch_size=2
    )
    with pytest.raises(UserError, match="train.mix_until is for .*build_train_loader"):
        Trainer.build_train_loader(prepare_config(cfg))
