"""Where the detecting queries come from.

Letters: B images, N queries, C channels, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deformable_detr.heads import boxes_in_pixels
from deformable_detr.queries import EncoderProposals, InitialQueries
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Branch, HeadOutput, Queries

__all__ = ["AnchorQueries", "MixedQueries", "rows"]


class AnchorQueries(InitialQueries):
    """N learned contents and boxes, the same for every image (DAB-DETR); the last channel of the
    content, which is 1 in denoising queries, is 0."""

    def __init__(self, num_queries: int, channels: int):
        """
        Args:
            num_queries: N.
            channels: C.
        """
        super().__init__(num_queries)
        self.content = nn.Embedding(num_queries, channels - 1)
        self.box_logits = nn.Embedding(num_queries, 4)

    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """Boxes (B, N, 4)."""
        shape = (maps.image_sizes.shape[0], -1, -1)
        content = F.pad(self.content.weight, (0, 1)).expand(shape)
        return Queries(content, self.box_logits.weight.sigmoid().expand(shape)), ()


class MixedQueries(EncoderProposals):
    """Boxes of the encoder, contents that are learned (DINO, section 3.4).

    The cells with the highest logit of any class give the boxes, through which no gradient goes.
    The i-th best has the i-th content, whatever the image.
    """

    def __init__(self, num_queries: int, channels: int, num_classes: int):
        """
        Args:
            num_queries: N.
            channels: C.
            num_classes: K.
        """
        super().__init__(num_queries, channels, num_classes)
        self.content = nn.Embedding(num_queries, channels)
        nn.init.xavier_uniform_(self.content.weight)

    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """Boxes (B, N, 4), and the branch of the chosen proposals.

        Raises:
            UserError: more queries than cells.
        """
        logits, box_logits = self.predict(maps)
        best = self.best(logits.amax(-1))
        logits, boxes = rows(logits, best), rows(box_logits, best).sigmoid()
        content = self.content.weight.expand(logits.shape[0], -1, -1)
        chosen = HeadOutput(logits, boxes_in_pixels(boxes, maps.image_sizes))
        return Queries(content, boxes.detach()), (Branch(self.branch, [chosen]),)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, n) at (B, N, 1) -> (B, N, n)."""
    return x.gather(1, index.expand(-1, -1, x.shape[-1]))
