"""The data of HPR's recipes, for every detector."""

import itertools

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes

from detection_toolkit.config import find_config_file, get_config

DETECTORS = [
    "stageinteractor/shapes_tiny.py",
    "adamixer/adamixer_shapes_tiny.py",
    "sqr/stageinteractor_sqr_shapes_tiny.py",
    "deformable_detr/deformable_detr_two_stage_shapes_tiny.py",
    "dino/dino_shapes_tiny.py",
    "dino/dn_deformable_shapes_tiny.py",
]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Two images as four inputs. A box without area is among them, and an image without objects."""
    document = make_document(num_images=3)
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 2]
    json_file, root = write_dataset(tmp_path_factory.mktemp("data"), document)
    train = get_config("common/data/shapes_weak_strong.py").dataloader.train
    train.dataset.json_file, train.dataset.image_root = json_file, root
    train.total_batch_size, train.num_workers = 2, 0
    torch.manual_seed(0)
    for inputs in itertools.islice(instantiate(train), 6):
        counts = [len(x["instances"]) for x in inputs]
        if 0 in counts and max(counts[2:]):
            break
    assert len(inputs) == 4 and 0 in counts
    full = next(x["instances"] for x in inputs[2:] if len(x["instances"]))
    full.gt_boxes = Boxes(full.gt_boxes.tensor.clone())
    full.gt_boxes.tensor[0, 2] = full.gt_boxes.tensor[0, 0]
    return inputs


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_learns_from_pairs(name, batch):
    torch.manual_seed(0)
    model = instantiate(get_config(name).model).train()
    losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("max_iter", "drops", "warmup_iters"),
    [(88_000, (80_000,), 0), (176_000, (117_300, 161_300), 2000), (87_960, (80_630,), 0)],
)
def test_schedules_by_iterations_drop_where_they_say(max_iter, drops, warmup_iters):
    make = LazyConfig.load(find_config_file("common/schedule.py"), "schedule_by_iterations")
    factor = instantiate(make(max_iter, drops, warmup_iters=warmup_iters))
    for count, drop in enumerate(drops):
        assert factor((drop - 1) / max_iter) == pytest.approx(0.1**count)
        assert factor((drop + 1) / max_iter) == pytest.approx(0.1 ** (count + 1))
    assert factor(0) == pytest.approx(0.0001 if warmup_iters else 1)
    assert factor((warmup_iters + 1) / max_iter) == pytest.approx(1)
