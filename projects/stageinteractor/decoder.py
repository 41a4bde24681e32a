"""The query head of StageInteractor: its stages, and who may read which filters.

Letters: B images, N queries, C channels, S stages, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detection_toolkit.errors import UserError
from detection_toolkit.modeling import (
    QUERY_HEADS,
    CascadeDecoder,
    Execution,
    FeatureMaps,
    Route,
)
from detection_toolkit.structures import Queries, StageOutput

from .attention import IoFBiasedSelfAttention
from .factored_mixing import FactoredDynamicMixing
from .filter_bank import FilterBank
from .mixing import CascadeDynamicMixing
from .sampling import SubBoxSampling
from .stage import DecoderStage, FeedForward

__all__ = ["FilterBankDecoder", "StageInteractorDecoder"]


class FilterBankDecoder(CascadeDecoder):
    """A cascade that hands the filter bank from one stage to the next."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        reuse_start: int,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            stages: see :class:`~detection_toolkit.modeling.CascadeDecoder`; the carry is a
                :class:`FilterBank`.
            reuse_start: first stage that may read earlier filters. Each stage before it starts
                from an empty bank, so that it finds those of stages ``reuse_start - 1`` and later.
            execution, route: see :class:`~detection_toolkit.modeling.CascadeDecoder`.
        """
        super().__init__(stages, execution=execution, route=route)
        self.reuse_start = reuse_start

    def initial_carry(self) -> FilterBank:
        """An empty bank."""
        return FilterBank()

    def run_stage(
        self, index: int, queries: Queries, maps: FeatureMaps, carry: FilterBank
    ) -> tuple[StageOutput, FilterBank]:
        """Run one stage on any set of queries and their bank."""
        bank = FilterBank() if index < self.reuse_start else carry
        return super().run_stage(index, queries, maps, bank)


@QUERY_HEADS.register()
class StageInteractorDecoder(FilterBankDecoder):
    """The decoder of StageInteractor: sub-box sampling, cascade mixing, cross-stage filter reuse.

    The defaults are the released configuration.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_stages: int = 6,
        channels: int = 256,
        num_heads: int = 8,
        ffn_channels: int = 2048,
        groups: int = 4,
        first_base_points: int = 8,
        base_points: int = 4,
        sub_points: int = 8,
        out_points: int = 128,
        reuse_start: int = 2,
        channel_reuse_cap: int | None = None,
        apply_reused_channel_filters: bool = True,
        spatial_reuse: bool = True,
        execution: Execution | None = None,
        route: Route | None = None,
    ):
        """
        Args:
            num_classes: K.
            num_stages: S.
            channels: C.
            num_heads: heads of the self-attention.
            ffn_channels: hidden width of the FFN.
            groups: G of sampling and mixing.
            first_base_points: base points of stage 0, whose queries see the whole image.
            base_points: base points of the later stages.
            sub_points: sub-points of each base point.
            out_points: spatial filters of a group.
            reuse_start: first stage that reuses filters; at least 1. Filters of stages before
                ``reuse_start - 1`` are never reused.
            channel_reuse_cap: reuse the channel filters of at most so many earlier stages, the
                newest ones; None for all, 0 for none.
            apply_reused_channel_filters: see :class:`CascadeDynamicMixing`.
            spatial_reuse: adapt half of the spatial filters from the stage before.
            execution, route: see :class:`~detection_toolkit.modeling.CascadeDecoder`.

        Raises:
            ValueError: sizes that do not fit one another.
        """
        if num_stages < 1:
            raise UserError(f"num_stages must be at least 1, got {num_stages}")
        if reuse_start < 1:
            raise UserError(
                f"reuse_start must be at least 1, as stage 0 has no stage before it: {reuse_start}"
            )
        if reuse_start == 1 and spatial_reuse and first_base_points != base_points:
            raise UserError(
                "spatial filters of stage 0 fit stage 1 only if first_base_points equals "
                f"base_points; got {first_base_points} and {base_points} with reuse_start=1"
            )
        execution = execution or Execution()
        direct = execution.mixing == "direct"
        mixing_class = CascadeDynamicMixing if direct else FactoredDynamicMixing
        stages = []
        for t in range(num_stages):
            points = dict(
                groups=groups,
                base_points=first_base_points if t == 0 else base_points,
                sub_points=sub_points,
            )
            in_bank = t - reuse_start + 1 if t >= reuse_start else 0
            reused = in_bank if channel_reuse_cap is None else min(in_bank, channel_reuse_cap)
            mixing = mixing_class(
                channels,
                **points,
                out_points=out_points,
                reused_channel_filters=reused,
                apply_reused_channel_filters=apply_reused_channel_filters,
                reuse_spatial_filters=spatial_reuse and t >= reuse_start,
                mix_bias=channel_reuse_cap != 0,
            )
            stages.append(
                DecoderStage(
                    attention=IoFBiasedSelfAttention(channels, num_heads),
                    sampling=SubBoxSampling(channels, **points),
                    mixing=mixing,
                    ffn=FeedForward(channels, ffn_channels),
                    channels=channels,
                    num_classes=num_classes,
                )
            )
        super().__init__(stages, reuse_start=reuse_start, execution=execution, route=route)
