"""A page in the browser: a picture, what each stage finds in it, and where its queries look.

``python -m detection_toolkit.web`` starts it. Only ``page`` needs Gradio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..on_demand import names_on_demand

if TYPE_CHECKING:
    from .viewing import ExampleImages, PictureRefused, StageViewer, ViewedPicture

__all__ = ["ExampleImages", "PictureRefused", "StageViewer", "ViewedPicture"]

__getattr__ = names_on_demand(__name__, dict.fromkeys(__all__, "viewing"))
