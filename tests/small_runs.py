"""A detector and runs small enough for tests, on the real parts."""

import numpy as np
import torch
from coco_files import write_dataset
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from loaded_configs import load_config

from detection_toolkit.config import apply_overrides
from detection_toolkit.engine.shipped import shipped_config

SMALL_MODEL = [
    "model.backbone.bottom_up.widths=[8,8,8,8]",
    "model.backbone.out_channels=16",
    "model.decoder.num_stages=3",
    "model.decoder.num_heads=2",
    "model.decoder.groups=2",
    "model.decoder.ffn_channels=16",
    "model.decoder.first_base_points=2",
    "model.decoder.base_points=2",
    "model.decoder.sub_points=2",
    "model.decoder.out_points=4",
    "model.initial_queries.num_queries=6",
]


def data_overrides(json_file, image_root):
    return [
        override
        for part in ("train", "test")
        for override in (
            f"dataloader.{part}.dataset.json_file='{json_file}'",
            f"dataloader.{part}.dataset.image_root='{image_root}'",
            f"dataloader.{part}.num_workers=0",
        )
    ]


def run_overrides(folder, **dataset):
    """Overrides of shapes_tiny for a run of seconds in ``folder``."""
    return [
        *SMALL_MODEL,
        *data_overrides(*write_dataset(folder / "data", **dataset)),
        f"train.output_dir='{folder / 'output'}'",
        "train.device=cpu",
        "train.max_iter=4",
        "train.eval_period=0",
        "train.checkpointer.period=2",
        "train.ema.enabled=false",
        "train.log_period=1",
        "dataloader.train.total_batch_size=2",
    ]


def make_config(folder, *overrides, **dataset):
    cfg = load_config("stageinteractor/shapes_tiny.py")
    return apply_overrides(cfg, [*run_overrides(folder, **dataset), *overrides])


def make_detector(seed=0):
    """The small detector in float64, past its initialisation, where many layers are zero."""
    cfg = apply_overrides(load_config("stageinteractor/shapes_tiny.py"), SMALL_MODEL)
    torch.manual_seed(seed)
    detector = instantiate(cfg.model).double()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return detector.train()


def save_untrained_detector(folder):
    """Checkpoint of the shipped config that was never trained, and so finds many things."""
    torch.manual_seed(0)
    model = instantiate(load_config(shipped_config()).model)
    for stage in model.decoder.stages:
        torch.nn.init.zeros_(stage.class_tower.out.bias)  # scores around one half
    path = folder / "random.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def draw_blocks():
    """(90, 120, 3) uint8: blocks on noise."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 80, (90, 120, 3), dtype=np.uint8)
    image[20:60, 30:70] = (40, 200, 220)
    image[50:80, 80:110] = (230, 60, 90)
    return image


def make_batch(counts, seed=0, height=64, width=96):
    """Images of one size with so many objects each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i, count in enumerate(counts):
        top_left = torch.rand(count, 2, generator=generator) * 50
        size = 8 + torch.rand(count, 2, generator=generator) * 14
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([top_left, top_left + size], 1))
        instances.gt_classes = torch.randint(6, (count,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append(
            {
                "image": image,
                "instances": instances,
                "file_name": f"image{i}.png",
                "image_id": i,
                "height": height,
                "width": width,
            }
        )
    return batch
