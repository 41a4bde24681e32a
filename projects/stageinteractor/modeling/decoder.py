"""Query heads: S stages in cascade.

Letters: B images, N queries, C channels, S stages, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..structures import StageOutput
from .attention import IoFBiasedSelfAttention
from .execution import Execution
from .factored_mixing import FactoredDynamicMixing
from .filter_bank import FilterBank
from .gathering import GatherableMaps
from .mixing import CascadeDynamicMixing
from .sampling import SubBoxSampling
from .stage import DecoderStage, FeedForward

__all__ = ["QUERY_HEADS", "CascadeDecoder", "StageInteractorDecoder"]

QUERY_HEADS = Registry("QUERY_HEADS")
QUERY_HEADS.__doc__ = """
Registry of query heads: ROI-free heads that refine queries against feature maps.

A registered object is a module called as ``head(features, strides, queries, xyzr)`` that returns
a list of :class:`~stageinteractor.structures.StageOutput`, one a stage.
"""


@QUERY_HEADS.register()
class CascadeDecoder(nn.Module):
    """Runs its stages one after another and hands the filter bank from one to the next."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        reuse_start: int | None = None,
        execution: Execution | None = None,
    ):
        """
        Args:
            stages: S modules with the signature of
                :class:`~stageinteractor.modeling.DecoderStage`.
            reuse_start: first stage that may read earlier filters. Each stage before it starts
                from an empty bank, so that it finds those of stages ``reuse_start - 1`` and
                later. None: no stage does.
            execution: how to compute; by default :class:`Execution`'s own choices.
        """
        super().__init__()
        if not stages:
            raise ValueError("a decoder needs at least one stage")
        self.execution = execution or Execution()
        self._program: Callable[..., list[StageOutput]] | None = None
        self.stages = nn.ModuleList(stages)
        self.reuse_start = len(self.stages) if reuse_start is None else reuse_start

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.stages)

    def prepare_maps(self, features: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """Lay the maps of a batch out for sampling, once for all stages.

        :meth:`forward` does it; who calls :meth:`run_stage` may, which saves time.

        Args:
            features: L maps (B, C, H_l, W_l).
            dtype: type of the geometry.
        """
        groups = getattr(getattr(self.stages[0], "sampling", None), "groups", None)
        is_plain = self.execution.sampling == "grid" or groups is None
        if is_plain or isinstance(features, GatherableMaps):
            return features
        fused = self.execution.sampling == "triton"
        return GatherableMaps(features, groups=groups, dtype=dtype, fused=fused)

    def run_stage(
        self,
        index: int,
        features: Sequence[Tensor],
        strides: Sequence[int],
        queries: Tensor,
        xyzr: Tensor,
        bank: FilterBank,
    ) -> tuple[StageOutput, FilterBank]:
        """Run one stage on any set of queries; see :meth:`forward` for the arguments."""
        if index < self.reuse_start:
            bank = FilterBank()
        arguments = queries, xyzr.detach(), features, strides, bank
        if self.execution.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.stages[index], *arguments, use_reentrant=False)
        return self.stages[index](*arguments)

    def forward(
        self,
        features: Sequence[Tensor],
        strides: Sequence[int],
        queries: Tensor,
        xyzr: Tensor,
    ) -> list[StageOutput]:
        """
        Args:
            features: L maps (B, C, H_l, W_l).
            strides: pixels of the image per cell of each map.
            queries: (B, N, C) initial content.
            xyzr: (B, N, 4) initial geometry.

        Returns:
            the predictions of all S stages.
        """
        if self.execution.compile and not torch.compiler.is_compiling():
            return self._compiled(features, strides, queries, xyzr)
        features = self.prepare_maps(features, xyzr.dtype)
        outputs = []
        bank = FilterBank()
        for index in range(self.num_stages):
            output, bank = self.run_stage(index, features, strides, queries, xyzr, bank)
            queries, xyzr = output.queries, output.xyzr
            outputs.append(output)
        return outputs

    def _compiled(self, features, strides, queries, xyzr) -> list[StageOutput]:
        # Batch and queries stay fixed, the size of the image does not: one program for all sizes.
        for feature in features:
            torch._dynamo.maybe_mark_dynamic(feature, (2, 3))
        if self._program is None:
            self._program = torch.compile(
                partial(CascadeDecoder.forward, self), mode=self.execution.compile, fullgraph=True
            )
        return self._program(features, strides, queries, xyzr)


@QUERY_HEADS.register()
class StageInteractorDecoder(CascadeDecoder):
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
            execution: how to compute; by default :class:`Execution`'s own choices.

        Raises:
            ValueError: sizes that do not fit one another.
        """
        if num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {num_stages}")
        if reuse_start < 1:
            raise ValueError(
                f"reuse_start must be at least 1, as stage 0 has no stage before it: {reuse_start}"
            )
        if reuse_start == 1 and spatial_reuse and first_base_points != base_points:
            raise ValueError(
                "spatial filters of stage 0 fit stage 1 only if first_base_points equals "
                f"base_points; got {first_base_points} and {base_points} with reuse_start=1"
            )
        execution = execution or Execution()
        direct = execution.mixing == "direct"
        mixing_class = CascadeDynamicMixing if direct else FactoredDynamicMixing
        reuse = spatial_reuse or channel_reuse_cap != 0
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
                mix_bias=reuse,
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
        super().__init__(stages, reuse_start=reuse_start, execution=execution)
