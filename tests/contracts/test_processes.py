"""Evaluation by two processes answers as that of one, also with fewer images than processes."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from small_runs import make_config
from tolerances import tolerance
from two_processes import run_two_processes

from detection_toolkit.data import dataset_names
from detection_toolkit.engine import Trainer, prepare_config
from detection_toolkit.errors import NonFinitePredictionError
from detection_toolkit.modeling import QueryDetector

# Folders of runs -> images of their test sets.
IMAGES = {"five": 5, "one": 1}


def config(folder, num_images):
    """Of a run that evaluates by stage; each process writes and reads the data in its turn."""
    for turn in range(comm.get_world_size()):
        if turn == comm.get_rank():
            cfg = make_config(folder, "train.stage_evaluation=true", num_images=num_images)
            prepare_config(cfg)
        comm.synchronize()
    return cfg


def evaluate(folder, num_images):
    """Results of the last stage, and those by stage."""
    cfg = config(folder, num_images)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    results = Trainer.test(cfg, model)
    if not comm.is_main_process():
        return None
    (file,) = Path(folder, "output").glob("inference/*/stage_metrics.json")
    return dict(results), json.loads(file.read_text())


class Spoilt(QueryDetector):
    """One image of the data set has no finite prediction in its second stage."""

    def predict(self, images):
        predictions = super().predict(images)
        if float(images.tensor[0, 0, 0, 0]) == SPOILT["pixel"]:
            predictions.stages[1].boxes.fill_(math.nan)
        return predictions


SPOILT = {"pixel": math.inf}


def evaluate_spoilt(folder):
    """The error of an evaluation by stage, and whether the model is in its mode again."""
    cfg = config(folder, num_images=4)
    model = Trainer.build_model(cfg).train()
    model.__class__ = Spoilt
    (name,) = dataset_names(cfg.dataloader.test.dataset)
    batches = list(Trainer.build_test_loader(cfg, name))
    if comm.is_main_process():  # its own last image
        SPOILT["pixel"] = float(model.preprocess_image(batches[-1]).tensor[0, 0, 0, 0])
    try:
        Trainer.test(cfg, model)
    except NonFinitePredictionError as error:
        return str(error), model.training
    return None


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {name: evaluate(folder / name, count) for name, count in IMAGES.items()}
    results["spoilt"] = evaluate_spoilt(folder / "spoilt")
    comm.synchronize()  # nobody is left waiting
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_two_processes(work, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", IMAGES)
def test_two_processes_evaluate_as_one_does(two_processes, name, tmp_path):
    (results, by_stage), other = (part[name] for part in two_processes)
    assert other is None
    alone, by_stage_alone = evaluate(tmp_path, IMAGES[name])
    assert by_stage["num_images"] == by_stage_alone["num_images"] == IMAGES[name]
    assert by_stage["stages"] == by_stage_alone["stages"]
    assert results["bbox"] == pytest.approx(alone["bbox"], abs=1e-9, nan_ok=True)
    losses, losses_alone = results["validation"], alone["validation"]
    limits = tolerance(torch.float32, scale=losses_alone["total"], operations=1000)
    assert losses == pytest.approx(losses_alone, abs=limits["atol"])


def test_all_processes_hear_that_a_stage_has_no_finite_prediction(two_processes):
    (message, is_training), (other, other_is_training) = (part["spoilt"] for part in two_processes)
    assert "stage 1 of image" in message and "of another process" in other
    assert is_training and other_is_training
