"""Two processes compute what one computes with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from hpr_models import CONFIG, make_model
from small_runs import make_batch
from two_processes import run_two_processes

from dino.denoising import Noise

# Objects of the images of process 0, then of process 1; the most in an image are the same in both.
CASES = [((2, 1), (2, 2)), ((3, 0), (0, 3)), ((0, 0), (0, 0))]
CONFIGS = [CONFIG, "hpr/hpr_align_detr_shapes_tiny.py", "hpr/hpr_ddq_shapes_tiny.py"]


def detector_of(config):
    """With the same noise for every object."""
    detector = make_model(config=config)

    def draw(shape, like):
        ones = like.new_ones(*shape, 4)
        return Noise(like.new_ones(shape), torch.zeros(shape, dtype=torch.long), ones * 0.4, ones)

    detector.denoising.draw = draw
    return detector


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {
        name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()
    }
    return {k: v.detach() for k, v in losses.items()}, gradients


def split(case):
    images = make_batch(case[0] + case[1])
    return images[: len(case[0])], images[len(case[0]) :]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for config in CONFIGS:
        # As the trainer builds it: no search for unused parameters.
        model = create_ddp_model(
            detector_of(config),
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=False,
        )
        for case in CASES:
            results[config, case] = losses_and_gradients(model, split(case)[rank])
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_two_processes(run_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_whole_batch(two_processes, config, case):
    first, second = split(case)
    expected_losses, expected_gradients = losses_and_gradients(detector_of(config), first + second)
    (losses0, gradients0), (losses1, gradients1) = (x[config, case] for x in two_processes)
    assert losses0.keys() == losses1.keys() == expected_losses.keys()
    for name, expected in expected_losses.items():
        torch.testing.assert_close((losses0[name] + losses1[name]) / 2, expected)
    assert gradients0.keys() == gradients1.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients0[name], gradients1[name], rtol=0, atol=0)
        torch.testing.assert_close(gradients0[name], expected)
