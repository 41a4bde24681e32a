"""DFvT-B as ImageNet classifier, for its released weights and its costs: a model alone."""

from detectron2.config import LazyCall as L

from dfvt import VARIANTS, DFvTClassifier

model = L(DFvTClassifier)(**VARIANTS["base"])
