"""Panels that a method adds to the figure of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from detectron2.utils.registry import Registry
from torch import nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LABEL_SIZE", "STAGE_VIEWERS", "StageViewer"]

LABEL_SIZE = 5.6  # points, of small type in all panels

STAGE_VIEWERS = Registry("STAGE_VIEWERS")
STAGE_VIEWERS.__doc__ = """
Registry of what methods show of their stages: subclasses of :class:`StageViewer`.
"""


class StageViewer:
    """Records what stages of a method do that others have no word for, and draws it."""

    width: float = 1.3
    """Of the panel; that of a plain picture is 1."""

    def applies_to(self, stages: Sequence[nn.Module]) -> bool:
        """Whether the S stages of a decoder are such as the viewer knows."""
        raise NotImplementedError

    def recording(self, stages: Sequence[nn.Module]) -> AbstractContextManager[Sequence[Any]]:
        """A context in which one forward pass with one picture is run.

        Returns:
            S records, complete when the pass has ended. They are the viewer's own, and kept in
            :class:`~detection_toolkit.visualization.StageTrace` under its registered name.
        """
        raise NotImplementedError

    def draw(self, axis: Axes, records: Sequence[Any]) -> None:
        """Draw the records of all stages."""
        raise NotImplementedError
