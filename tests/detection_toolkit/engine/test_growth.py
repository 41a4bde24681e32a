"""A long training holds no more than a short one, without Python's cyclic collector."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from coco_files import write_dataset
from detectron2.utils.events import EventStorage
from loaded_configs import load_config
from small_runs import data_overrides, make_config

from detection_toolkit.config import apply_overrides
from detection_toolkit.engine import Trainer, prepare_config

SHORT, LONG = 10, 50
FAMILIES = [
    "adamixer/adamixer_shapes_tiny.py",
    "sqr/stageinteractor_sqr_shapes_tiny.py",
    "deformable_detr/deformable_detr_shapes_tiny.py",
    "dino/dino_shapes_tiny.py",
    "hpr/hpr_shapes_tiny.py",
    "ddq/ddq_shapes_tiny.py",
]


def tensors() -> tuple[int, int]:
    """Number and bytes of those that are alive."""
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(alive), sum(x.numel() * x.element_size() for x in alive)


def check_growth(cfg) -> None:
    """Train so long with the collector off, and compare what is alive on the way."""
    trainer = Trainer(prepare_config(cfg))
    found = {}
    gc.collect()
    gc.disable()
    try:
        with EventStorage():
            for trainer.iter in itertools.islice(itertools.count(), LONG + 1):
                if trainer.iter in (SHORT, LONG):
                    found[trainer.iter] = tensors()
                trainer.run_step()
    finally:
        gc.enable()
    assert found[SHORT][0] > 100
    assert found[LONG] == found[SHORT]


def test_fifty_steps_hold_no_more_than_ten(tmp_path):
    """With averaged weights and accumulation, which keep tensors from step to step."""
    check_growth(
        make_config(tmp_path, "train.ema.enabled=true", "train.accumulation_steps=2", num_images=4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES)
def test_fifty_steps_of_each_family_hold_no_more_than_ten(config, tmp_path):
    overrides = [
        *data_overrides(*write_dataset(tmp_path / "data", num_images=4)),
        f"train.output_dir='{tmp_path / 'output'}'",
        "train.device=cpu",
        "train.log_period=1",
        "dataloader.train.total_batch_size=2",
    ]
    check_growth(apply_overrides(load_config(config), overrides))
