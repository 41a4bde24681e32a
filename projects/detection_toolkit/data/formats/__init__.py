"""Data sets in the formats of other tools, as COCO-format documents that are judged as all are."""

from .conversion import IMAGE_MODES, WRITERS, Conversion, convert
from .recognition import FORMATS, open_source
from .records import DataSource, Part
from .splits import SPLITS, VAL_SHARE, divide, read_split

__all__ = [
    "FORMATS",
    "IMAGE_MODES",
    "SPLITS",
    "VAL_SHARE",
    "WRITERS",
    "Conversion",
    "DataSource",
    "Part",
    "convert",
    "divide",
    "open_source",
    "read_split",
]
