"""Label assigners that evaluation by stage compares, whatever a model is trained with."""

from detectron2.config import LazyCall as L

from stageinteractor import CrossStageMatcher

compared = [L(CrossStageMatcher)()]
