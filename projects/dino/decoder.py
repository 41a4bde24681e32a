"""The decoders: boxes as references, whose sine codes are the queries' positions (DAB-DETR).

Letters: B images, R sets of queries that look at each image, N queries, C channels, S stages,
K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deformable_detr.decoder import DeformableDecoder, on_levels, refining_heads, take_box
from deformable_detr.heads import boxes_in_pixels, move_reference
from deformable_detr.positions import sine_code
from detection_toolkit.modeling import QUERY_HEADS, Execution, FeatureMaps, Route
from detection_toolkit.structures import HeadOutput, Queries, StageOutput

__all__ = ["BoxPosition", "DINODecoder", "DNDeformableDecoder"]

REFINEMENT_EPS = 1e-3
"""Of the logits of references that a stage refines."""


class BoxPosition(nn.Module):
    """Position codes of boxes: two linear layers on the sine codes of y, x, width and height."""

    def __init__(self, channels: int):
        super().__init__()
        self.code_channels = channels // 2
        self.layers = _two_layers(2 * channels, channels)

    def forward(self, boxes: Tensor, maps: FeatureMaps) -> Tensor:
        """(R B, N, 4) centre and size as shares of the image -> (R B, N, C)."""
        x, y, width, height = on_levels(boxes, maps)[:, :, 0].unbind(-1)
        codes = sine_code(torch.stack([y, x, width, height], dim=-1), self.code_channels)
        return self.layers(codes.flatten(2))


@QUERY_HEADS.register()
class DNDeformableDecoder(DeformableDecoder):
    """Of DN-Deformable-DETR: each stage refines the box before it, and scales the position codes by
    what its queries know already."""

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            num_classes, num_stages, channels, num_levels, num_heads, num_points, ffn_channels,
                dropout, execution, route: see :class:`~deformable_detr.DeformableDETRDecoder`.

        Raises:
            UserError: no stage.
        """
        super().__init__(
            refining_heads(num_stages, channels, num_classes, first_size_logit=-2.0),
            take_box,
            channels=channels,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_points,
            ffn_channels=ffn_channels,
            dropout=dropout,
            eps=REFINEMENT_EPS,
            execution=execution,
            route=route,
        )
        self.position = BoxPosition(channels)
        self.scale = _two_layers(channels, channels)

    def pass_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: Any
    ) -> tuple[StageOutput, Any]:
        """Run one stage with its position codes."""
        position = self.position(queries.geometry, maps)
        if index:
            position = position * self.scale(queries.content)
        return super().pass_stage(index, queries._replace(position=position), maps, carry)


@QUERY_HEADS.register()
class DINODecoder(DeformableDecoder):
    """Of DINO, which looks forward twice (section 3.5).

    A stage looks around its reference r, through which no gradient goes, and refines it by its bare
    content q to r' = sigmoid(MLP(q) + logit(r)), the next one's. What it predicts, by the same MLP,
    is sigmoid(MLP(LN(q)) + logit(r)) with the gradient of r: its loss improves the refinement of
    the stage before, too.

    ``geometry`` of the queries keeps that gradient.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_channels: int = 2048,
        dropout: float = 0.0,
        shared_head: bool = False,
        prediction_eps: float = 1e-3,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            shared_head: one head for all stages, as in the authors' code; False: one each.
            prediction_eps: of the logits of references that boxes are predicted from.
            num_classes, num_stages, channels, num_levels, num_heads, num_points, ffn_channels,
                dropout, execution, route: see :class:`~deformable_detr.DeformableDETRDecoder`.

        Raises:
            UserError: no stage.
        """
        heads = refining_heads(num_stages, channels, num_classes, first_size_logit=0.0)
        super().__init__(
            [heads[0]] * num_stages if shared_head else heads,
            take_box,
            channels=channels,
            num_levels=num_levels,
            num_heads=num_heads,
            num_points=num_points,
            ffn_channels=ffn_channels,
            dropout=dropout,
            eps=REFINEMENT_EPS,
            execution=execution,
            route=route,
        )
        self.shared_head = shared_head
        self.prediction_eps = prediction_eps
        self.position = BoxPosition(channels)
        self.norm = nn.LayerNorm(channels)

    def pass_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: Any
    ) -> tuple[StageOutput, Any]:
        """Run one stage, refine, and predict."""
        head, reference = self.main_head(index, queries), queries.geometry.detach()
        position = self.position(reference, maps)
        placed = queries._replace(geometry=reference, position=position)
        content, features = self.attend(index, placed, maps)
        moved = queries._replace(content=content, geometry=self.refine(head, content, reference))
        answer = self.predict(head, self.norm(content), queries.geometry, maps)
        auxiliary = {}
        for name, feature in features.items():
            of_name = self.auxiliary_head(name, index, queries)
            auxiliary[name] = self.predict(of_name, feature, queries.geometry, maps)
        return StageOutput(answer.logits, answer.boxes, moved, auxiliary or None), carry

    def attend(
        self, index: int, queries: Queries, maps: FeatureMaps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            index: of the stage.
            queries: with position codes, and references without a gradient.
            maps: the encoder's.

        Returns:
            contents (R B, N, C) that have looked at one another and at the maps, and normed
            features (R B, N, C) for further heads, by their names. Here there are none.
        """
        return self.stages[index].attend(queries, maps), {}

    def main_head(self, index: int, queries: Queries) -> Any:
        """What predicts at a stage, as a :class:`~deformable_detr.heads.PredictionHead` does."""
        return self.stages[index].head

    def auxiliary_head(self, name: str, index: int, queries: Queries) -> Any:
        """A stage's further head, which predicts as the stage's own does."""
        raise NotImplementedError

    def refine(self, head: Any, content: Tensor, reference: Tensor) -> Tensor:
        """References (R B, N, 4) that bare contents make of those before."""
        delta = head.box(content).to(reference.dtype)
        return move_reference(reference, delta, REFINEMENT_EPS)

    def predict(
        self, head: Any, content: Tensor, reference: Tensor, maps: FeatureMaps
    ) -> HeadOutput:
        """What a head says of normed contents, beside references with their gradient."""
        logits, delta = head(content)
        box = move_reference(reference, delta.to(reference.dtype), self.prediction_eps)
        return HeadOutput(logits, boxes_in_pixels(box, maps.image_sizes))


def _two_layers(in_channels: int, channels: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(in_channels, channels), nn.ReLU(), nn.Linear(channels, channels)
    )
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
    return layers
