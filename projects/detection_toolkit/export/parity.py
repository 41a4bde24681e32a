"""How far an exported detector is from the one it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

__all__ = ["BOX_TOLERANCE", "SCORE_TOLERANCE", "Parity", "compare_detections", "measure_parity"]

BOX_TOLERANCE = 0.05  # pixels
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """Largest differences between two sets of detections."""

    boxes: float = 0.0
    """Pixels, of matched detections."""
    scores: float = 0.0
    """Of matched detections."""
    detections: int = 0
    """Matched within the tolerances."""
    unmatched: int = 0
    """With no counterpart; those that tie with the last one kept do not count."""

    @property
    def holds(self) -> bool:
        """Whether something was compared, and all of it agrees."""
        return (
            self.detections > 0
            and not self.unmatched
            and self.boxes <= BOX_TOLERANCE
            and self.scores <= SCORE_TOLERANCE
        )

    def __add__(self, other: Parity) -> Parity:
        return Parity(
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            self.detections + other.detections,
            self.unmatched + other.unmatched,
        )

    def __str__(self) -> str:
        text = (
            f"{self.detections} detections agree within {self.boxes:.2g} px and scores within "
            f"{self.scores:.2g}"
        )
        return text + (f"; {self.unmatched} have no counterpart" if self.unmatched else "")


def compare_detections(expected: Instances, actual: Instances) -> Parity:
    """Match two sets of detections of an image, whatever the order among equal scores.

    Pairs have the same class. A pair out of tolerance counts as two detections without a
    counterpart. Detections whose score ties with the lowest one may be others: which of them are
    kept is left to rounding.

    Args:
        expected, actual: with ``pred_boxes``, ``scores`` and ``pred_classes``.
    """
    if not len(expected) or not len(actual):
        return Parity(unmatched=len(expected) + len(actual))
    from scipy.optimize import linear_sum_assignment  # slow to load, and not for prediction

    boxes = (expected.pred_boxes.tensor[:, None] - actual.pred_boxes.tensor).abs().amax(-1)
    scores = (expected.scores[:, None] - actual.scores).abs()
    cost = torch.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    differ = expected.pred_classes[:, None] != actual.pred_classes
    cost = cost.masked_fill(differ, float("inf")).nan_to_num(nan=1e6, posinf=1e6).clamp(max=1e6)
    rows, columns = linear_sum_assignment(cost.numpy())
    agree = cost[rows, columns].numpy() <= 1
    rows, columns = rows[agree], columns[agree]
    unmatched = 0
    for instances, matched in ((expected, rows), (actual, columns)):
        left = torch.ones(len(instances), dtype=torch.bool)
        left[torch.from_numpy(matched)] = False
        ties = instances.scores <= instances.scores.min() + SCORE_TOLERANCE
        # No NaN ties with anything.
        unmatched += int((left & ~ties).sum())
    if not len(rows):
        return Parity(unmatched=max(unmatched, 1))
    return Parity(
        float(boxes[rows, columns].max()), float(scores[rows, columns].max()), len(rows), unmatched
    )


@torch.no_grad()
def measure_parity(
    detector: nn.Module,
    run: Callable[[Tensor, Tensor], Sequence[np.ndarray | Tensor]],
    sizes: Sequence[Sequence[tuple[int, int]]],
    *,
    seed: int = 0,
) -> Parity:
    """Compare an exported detector with the original on random images.

    Args:
        detector: the original, in evaluation mode, on any device.
        run: images (B, 3, H, W) uint8 and image sizes (B, 2) -> boxes, scores, labels.
        sizes: for each batch the (height, width) of its images. What the exported detector sees
            beside a smaller image is noise.
        seed: of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    total = Parity()
    for batch_sizes in sizes:
        height, width = (max(side) for side in zip(*batch_sizes))
        shape = (len(batch_sizes), 3, height, width)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        outputs = run(images, torch.tensor(batch_sizes))
        boxes, scores, labels = (torch.as_tensor(output) for output in outputs)
        inputs = [{"image": x[:, :h, :w]} for x, (h, w) in zip(images, batch_sizes)]
        for i, expected in enumerate(detector(inputs)):
            actual = Instances(
                batch_sizes[i],
                pred_boxes=Boxes(boxes[i]),
                scores=scores[i],
                pred_classes=labels[i],
            )
            actual = actual[actual.pred_boxes.nonempty()]  # as Detectron2's postprocessing does
            total += compare_detections(expected["instances"].to("cpu"), actual)
    return total
