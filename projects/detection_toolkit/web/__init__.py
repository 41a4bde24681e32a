"""A page in the browser: a picture, what each stage finds in it, and where its queries look.

``python -m detection_toolkit.web`` starts it. Only ``page`` needs Gradio.
"""

from .viewing import ExampleImages, PictureRefused, StageViewer, ViewedPicture

__all__ = ["ExampleImages", "PictureRefused", "StageViewer", "ViewedPicture"]
