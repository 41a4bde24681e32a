"""Data sets in the formats of other tools, as COCO-format documents that are judged as all are."""

from .recognition import FORMATS, open_source
from .records import DataSource, Part
from .splits import SPLITS, VAL_SHARE, divide, read_split

__all__ = [
    "FORMATS",
    "SPLITS",
    "VAL_SHARE",
    "DataSource",
    "Part",
    "divide",
    "open_source",
    "read_split",
]
