"""The tiny detector on the built-in shapes, with the parts of my_parts.py, which lies beside.

python train_net.py --config-file examples/my_config.py train.max_iter=100
"""

from detectron2.config import LazyCall as L
from my_parts import CountDetections, NoisyMapper, OverlapMatcher, PatchBackbone, RandomGrey

from detection_toolkit.config import get_config

base = get_config("stageinteractor/shapes_tiny.py")
dataloader, lr_multiplier, model = base.dataloader, base.lr_multiplier, base.model
optimizer, train = base.optimizer, base.train

# A mapper: what the old one was given stays.
dataloader.train.mapper._target_ = NoisyMapper
dataloader.train.mapper.noise = 4.0

# An augmentation, after those that the config has.
dataloader.train.mapper.augmentations.append(L(RandomGrey)(prob=0.2))

# An evaluator, beside that of COCO.
dataloader.evaluator = [dataloader.evaluator, L(CountDetections)(threshold=0.3)]

# A backbone. Its maps are brought to model.backbone.out_channels by the neck.
model.backbone.bottom_up = L(PatchBackbone)(channels=32)

# A matcher.
model.criterion.matcher = L(OverlapMatcher)(threshold=0.5)

train.output_dir = "./output/my_config"
