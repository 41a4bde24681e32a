"""Random predictions and objects in float64, the same for the same seed."""

import torch

from detection_toolkit.structures import GroundTruth
from stageinteractor.boxes import xyzr_to_box


def random_predictions(num_stages, num_images, num_queries, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_stages, num_images, num_queries, num_classes, generator=generator)
    xyzr = torch.rand(num_stages, num_images, num_queries, 4, generator=generator)
    xyzr = xyzr * torch.tensor([100.0, 80, 3, 1]) + torch.tensor([0.0, 0, 3, -0.5])
    return logits.double(), xyzr_to_box(xyzr.double())


def random_truth(counts, num_classes, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    boxes, labels = [], []
    for count in counts:
        top_left = torch.rand(count, 2, generator=generator) * 60
        size = 5 + torch.rand(count, 2, generator=generator) * 35
        boxes.append(torch.cat([top_left, top_left + size], -1).double())
        labels.append(torch.randint(num_classes, (count,), generator=generator))
    return GroundTruth.collate(boxes, labels, [(80, 100)] * len(counts))
