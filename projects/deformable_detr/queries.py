"""Where queries come from: learned, or the encoder's best proposals.

Letters: B images, N queries, C channels, L levels, T tokens (see :mod:`.positions`), K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import FeatureMaps
from detection_toolkit.structures import Branch, HeadOutput, Queries

from .heads import PredictionHead, boxes_in_pixels
from .positions import cell_centers, sine_code, to_tokens

__all__ = ["EncoderProposals", "InitialQueries", "LearnedQueries", "ProposedQueries"]


class InitialQueries(nn.Module, ABC):
    """The queries of a batch, and what else is supervised for their sake."""

    def __init__(self, num_queries: int):
        super().__init__()
        if num_queries < 1:
            raise UserError(f"num_queries must be at least 1, got {num_queries}")
        self.num_queries = num_queries

    @abstractmethod
    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """The queries, and the branches that training supervises beside the stages."""

    def forward(self, maps: FeatureMaps) -> Queries:
        """
        Args:
            maps: the encoder's, of B images.

        Returns:
            content and position (B, N, C), and the references as geometry.
        """
        return self.propose(maps)[0]


class LearnedQueries(InitialQueries):
    """N learned contents and positions, the same for every image; a point follows from the
    position."""

    def __init__(self, num_queries: int, channels: int):
        """
        Args:
            num_queries: N.
            channels: C.
        """
        super().__init__(num_queries)
        self.embedding = nn.Embedding(num_queries, 2 * channels)  # position, content
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """Points (B, N, 2)."""
        position, content = _halves(self.embedding.weight)
        reference = self.reference_points(position).to(position.dtype).sigmoid()
        shape = (maps.image_sizes.shape[0], -1, -1)
        return Queries(*(x.expand(shape) for x in (content, reference, position))), ()


class EncoderProposals(InitialQueries):
    """The N best of what a head predicts at every cell of the encoder's maps.

    A proposal is a box around the cell, larger on coarser levels, which the head changes.
    """

    branch = "encoder"
    smallest_size = 0.05
    """Share of the image of a proposal on the finest level."""
    margin = 0.01
    """A proposal whose centre or size is closer to 0 or 1 is none."""

    def __init__(self, num_queries: int, channels: int, num_classes: int):
        """
        Args:
            num_queries: N.
            channels: C.
            num_classes: K.
        """
        super().__init__(num_queries)
        self.memory = nn.Linear(channels, channels)
        self.memory_norm = nn.LayerNorm(channels)
        self.head = PredictionHead(channels, num_classes, size_logit=0.0)
        nn.init.xavier_uniform_(self.memory.weight)

    def best(self, scores: Tensor) -> Tensor:
        """(B, N, 1) the cells with the highest of scores (B, T), in their order.

        Raises:
            UserError: more queries than cells.
        """
        self.check_count(scores.shape[1])
        return scores.topk(self.num_queries, dim=1).indices[..., None]

    def check_count(self, num_cells: int) -> None:
        """
        Raises:
            UserError: more queries than cells.
        """
        if num_cells < self.num_queries:
            raise UserError(
                f"{self.num_queries} queries cannot be chosen from {num_cells} cells: lower "
                "model.initial_queries.num_queries, or use larger images"
            )

    def predict(self, maps: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Class logits (B, T, K) and boxes (B, T, 4), as logits, of all cells. A box is infinite,
        or all shares 1, where there is no proposal."""
        return self.judge(self.head, *self.encode(maps))

    def encode(self, maps: FeatureMaps) -> tuple[Tensor, Tensor]:
        """What heads judge all cells by (B, T, C), and the logits of the proposals (B, T, 4),
        infinite where there is none."""
        proposals, valid = self.proposals(maps)
        memory = to_tokens(maps.levels) * valid
        proposals = torch.logit(proposals).masked_fill(~valid, torch.inf)
        return self.memory_norm(self.memory(memory)), proposals

    @staticmethod
    def judge(head: PredictionHead, code: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """What a head predicts of all cells; arguments as :meth:`encode` returns them."""
        logits, delta = head(code)
        return logits, delta.to(proposals.dtype) + proposals

    def proposals(self, maps: FeatureMaps) -> tuple[Tensor, Tensor]:
        """Boxes (B, T, 4) cxcywh as shares of the image, and whether they count (B, T, 1)."""
        centers = cell_centers(maps)
        sizes = torch.cat(
            [
                centers.new_full((level[0, 0].numel(), 2), self.smallest_size * 2**i)
                for i, level in enumerate(maps.levels)
            ]
        )
        boxes = torch.cat([centers, sizes.expand_as(centers)], dim=-1)
        padding = torch.cat([mask.flatten(1) for mask in maps.padding_masks], dim=1)
        inside = ((boxes > self.margin) & (boxes < 1 - self.margin)).all(-1)
        return boxes, (inside & ~padding)[..., None]


class ProposedQueries(EncoderProposals):
    """Boxes, contents and positions of the N best proposals (paper, section 4.3).

    The best are those with the highest logit of class 0, to which alone the head is trained.
    """

    nameless_classes = ("head.classes",)

    def __init__(self, num_queries: int, channels: int, num_classes: int):
        """
        Args:
            num_queries: N.
            channels: C.
            num_classes: K.
        """
        super().__init__(num_queries, channels, num_classes)
        self.code = nn.Linear(2 * channels, 2 * channels)  # position, content
        self.code_norm = nn.LayerNorm(2 * channels)
        nn.init.xavier_uniform_(self.code.weight)

    def propose(self, maps: FeatureMaps) -> tuple[Queries, tuple[Branch, ...]]:
        """Boxes (B, N, 4), and the branch of all T proposals.

        Raises:
            UserError: more queries than cells.
        """
        logits, box_logits = self.predict(maps)
        best = self.best(logits[..., 0])
        reference = box_logits.detach().gather(1, best.expand(-1, -1, 4)).sigmoid()
        code = sine_code(reference, self.memory.out_features // 2).flatten(2)  # (B, N, 2 C)
        position, content = _halves(self.code_norm(self.code(code)))
        proposals = HeadOutput(logits, boxes_in_pixels(box_logits.sigmoid(), maps.image_sizes))
        return Queries(content, reference, position), (Branch(self.branch, [proposals]),)


def _halves(embedding: Tensor) -> tuple[Tensor, ...]:
    """(..., 2 C) -> position and content (..., C).

    Copies: whether a linear layer may fold the rows of a view depends on the size of the batch,
    which an exported graph would then be tied to.
    """
    return tuple(half.contiguous() for half in embedding.chunk(2, dim=-1))
