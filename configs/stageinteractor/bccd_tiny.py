"""The tiny model on BCCD, blood cells under the microscope, on one CPU core.

The data in COCO format: bccd/annotations/{train,val,test}.json and bccd/images/ under
$DETECTRON2_DATASETS, which is ./datasets by default. The backbone begins with that of the shipped
shapes checkpoint, everything else from scratch.
"""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge

from ..common.data.coco import dataloader
from ..common.label_assigners import compared as _compared
from ..common.models.stageinteractor_tiny import model
from ..common.optim import optimizer
from ..common.schedule import cosine_schedule
from ..common.train import train

# Looked up where the config is used, so that results name no folder of the machine.
_folder = "${oc.env:DETECTRON2_DATASETS,datasets}/bccd"

for _part, _split in (("train", "train"), ("test", "val")):
    dataloader[_part].dataset.update(
        names=None,
        json_file=f"{_folder}/annotations/{_split}.json",
        image_root=f"{_folder}/images",
        name=f"bccd_{_split}",
    )
dataloader.train.mapper.augmentations = [
    L(ResizeShortestEdge)(
        short_edge_length=[160, 176, 192, 208, 224], max_size=320, sample_style="choice"
    ),
    L(RandomFlip)(prob=0.5, horizontal=True, vertical=False),
    L(RandomFlip)(prob=0.5, horizontal=False, vertical=True),  # cells have no upright
]
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0  # all on one core
dataloader.test.mapper.augmentations = [L(ResizeShortestEdge)(short_edge_length=192, max_size=320)]
dataloader.test.batch_size = 8
dataloader.test.num_workers = 0
dataloader.stage_evaluator.label_assigners = _compared

model.num_classes = 3
model.initial_queries.num_queries = 40  # an image has up to 30 objects

optimizer.lr = 5e-4
lr_multiplier = cosine_schedule(warmup_share=0.1)

train.init_checkpoint = "checkpoints/shapes_tiny.pth"
train.init_prefix = "backbone.bottom_up."
train.output_dir = "./output/bccd_tiny"
train.max_iter = 600
train.seed = 1
train.eval_period = 60
train.checkpointer.period = 100
train.checkpointer.max_to_keep = 2
train.best_checkpointer.enabled = False  # the last weights count
train.log_period = 10
# As the stored results of the ablation were made: the average, with its decay from the start.
train.ema.update(enabled=True, decay=0.99, warmup=False, compare=False)
