"""The built-in shapes with large-scale jitter and copy-paste at 160 x 160 pixels, twice each."""

from .coco_lsj import use_jitter
from .shapes_weak_strong import dataloader

use_jitter(dataloader, 160)
