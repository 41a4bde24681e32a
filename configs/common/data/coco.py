"""COCO 2017 at 800/1333 pixels with horizontal flips."""

from detectron2.config import LazyCall as L
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from omegaconf import OmegaConf

from detection_toolkit.data import (
    DetectionMapper,
    build_test_loader,
    build_train_loader,
    get_detection_dataset,
)
from detection_toolkit.evaluation import CocoEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset)(
        names="coco_2017_train",
        json_file=None,
        path=None,
        split=None,
        val_share=0.2,
        split_seed=0,
        image_root=None,
        name=None,
        filter_empty=True,
        skip_unreadable=False,  # follows dataloader.train.skip_unreadable
    ),
    mapper=L(DetectionMapper)(
        is_train=True,
        augmentations=[
            L(ResizeShortestEdge)(short_edge_length=800, max_size=1333),
            L(RandomFlip)(prob=0.5),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    num_workers=4,
    skip_unreadable=False,
)

dataloader.test = L(build_test_loader)(
    dataset=L(get_detection_dataset)(
        names="coco_2017_val",
        json_file=None,
        path=None,
        split=None,
        val_share="${...train.dataset.val_share}",
        split_seed="${...train.dataset.split_seed}",
        image_root=None,
        name=None,
        filter_empty=False,
        skip_unreadable=False,
    ),
    mapper=L(DetectionMapper)(
        is_train=False,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    batch_size=1,
    num_workers=4,
)

# dataset_name and output_dir are filled in for each test set.
dataloader.evaluator = L(CocoEvaluator)(
    dataset_name=None,
    output_dir=None,
    max_dets_per_image=None,
    backend="pycocotools",  # or "hotcoco": faster, the same numbers
)

# Of train.stage_evaluation: with these, too, labels are assigned and their changes counted; always
# with each stage's own match and with the model's own label assigner.
dataloader.stage_evaluator = dict(label_assigners=[])
