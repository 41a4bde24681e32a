"""What a run is trained on, without training: the images at any place of its stream."""

from __future__ import annotations

import copy
import itertools
import logging
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data import dataset_names
from ..data.stream import Draw, TrainLoader, collate_views
from ..errors import UserError
from .settings import RunSettings
from .trainer import Trainer

__all__ = ["SourceObject", "TrainingImage", "TrainingImages"]

logger = logging.getLogger(__name__)

# An object's number among all is that of its image times this, and its place in the image.
_MOST_OBJECTS = 2**24


class SourceObject(NamedTuple):
    """Where an object of a model's input comes from."""

    record: dict[str, Any]
    """The dataset dict of its image."""
    annotation: dict[str, Any]
    """Its annotation there."""


class TrainingImage(NamedTuple):
    """An image of the stream, as a model gets it."""

    number: int
    """Of images that the run uses before it."""
    batch: int
    """Of batches that it uses before this one's."""
    draw: Draw
    """Its place in the stream, and the image's in the data set."""
    views: list[dict[str, Any]]
    """The model's inputs that are made of it; several for a mapper of several."""
    objects: list[list[SourceObject] | None]
    """Of every view, where its instances come from; None where that cannot be told."""
    crowds: list[torch.Tensor | None]
    """Of every view, (C, 4) boxes of crowds, which are not trained on; None likewise."""
    padded_size: tuple[int, int]
    """(height, width) of its batch."""


class TrainingImages:
    """The images of a run by one process, in the order in which it uses them.

    They follow from the config and its seed as in a run: nothing of it is read but the config.

    Attributes:
        seed: of the run. Where the config leaves it to chance, one is drawn.
        loader: the run's, without processes.
        model: with its initial weights.
        metadata: of the training set.
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: prepared (:func:`~detection_toolkit.engine.prepare_config`).

        Raises:
            UserError: the training loader is not of ``build_train_loader``, or whatever a run
                would say of its data.
        """
        cfg = copy.deepcopy(cfg)
        cfg.train.device = "cpu"
        if OmegaConf.select(cfg, "dataloader.train.num_workers") is not None:
            cfg.dataloader.train.num_workers = 0
        cfg = Trainer.auto_scale_workers(cfg, comm.get_world_size())
        seed = RunSettings.from_config(cfg.train).seed
        if seed < 0:
            seed = secrets.randbelow(2**31)
            logger.warning(
                "the config leaves the seed to chance (train.seed=-1), so every run sees other "
                "images; these are those of train.seed=%d",
                seed,
            )
        self.seed = seed
        seed_all_rng(seed)
        # As a run does it, which builds the model first: both draw from the same numbers.
        self.model: nn.Module = Trainer.build_model(cfg)
        loader = Trainer.build_train_loader(cfg)
        if not isinstance(loader, TrainLoader):
            raise UserError(
                f"dataloader.train is a {type(loader).__name__}, whose images have no place in a "
                "stream: this needs detection_toolkit.data.build_train_loader"
            )
        self.loader = loader
        self.metadata = MetadataCatalog.get(dataset_names(cfg.dataloader.train.dataset)[0])

    def since(self, start: int, count: int) -> Iterator[TrainingImage]:
        """``count`` images, after so many that the run uses before.

        Args:
            start, count: not negative.

        Raises:
            UserError: a negative number.
            UnreadableImageError: an image cannot be read.
        """
        if start < 0 or count < 1:
            raise UserError(
                f"images are counted from 0 on, and one or more are shown; got start {start} and "
                f"number {count}"
            )
        number = 0
        for batch, draws in enumerate(self.loader.stream):
            if number + len(draws) > start:
                yield from self._of_batch(batch, number, draws, start, start + count)
            number += len(draws)
            if number >= start + count:
                return

    def _of_batch(
        self, batch: int, before: int, draws: list[Draw], start: int, end: int
    ) -> Iterator[TrainingImage]:
        """Those of a batch whose number is from ``start`` to ``end``."""
        samples = [self.loader.dataset[draw] for draw in draws]
        padded = self._padded_size(collate_views(samples))
        for number, draw, sample in zip(itertools.count(before), draws, samples):
            if start <= number < end:
                views = sample if isinstance(sample, list) else [sample]
                found = [self._sources(draw, views, nth) for nth in range(len(views))]
                objects, crowds = map(list, zip(*found))
                yield TrainingImage(number, batch, draw, views, objects, crowds, padded)

    def _padded_size(self, inputs: list[dict[str, Any]]) -> tuple[int, int]:
        """What the model pads a batch to."""
        if hasattr(self.model, "preprocess_image"):  # as Detectron2's have it, too
            height, width = self.model.preprocess_image(inputs).tensor.shape[-2:]
        else:
            sizes = [x["image"].shape[-2:] for x in inputs]
            height, width = (max(side) for side in zip(*sizes))
        return int(height), int(width)

    def _sources(
        self, draw: Draw, views: list[dict[str, Any]], nth: int
    ) -> tuple[list[SourceObject] | None, torch.Tensor | None]:
        """Where the objects of a view come from, and its crowds.

        The image is made again, of annotations that have their number as the class. What comes out
        counts if it is the same image, with the same objects.
        """
        if "instances" not in views[nth]:
            return None, None
        dataset = self.loader.dataset
        for with_crowds in (True, False):
            again = dataset.over(_NumberedObjects(dataset.records, with_crowds=with_crowds))[draw]
            again = again if isinstance(again, list) else [again]
            view = again[nth]
            if not torch.equal(view["image"], views[nth]["image"]):
                continue  # whether there are crowds has changed what was drawn
            objects = [self._source(n) for n in view["instances"].gt_classes.tolist()]
            is_crowd = torch.tensor([bool(o.annotation.get("iscrowd")) for o in objects]).bool()
            boxes = view["instances"].gt_boxes.tensor
            objects = [o for o in objects if not o.annotation.get("iscrowd")]
            instances = views[nth]["instances"]
            classes = [o.annotation["category_id"] for o in objects]
            if classes == instances.gt_classes.tolist() and torch.equal(
                boxes[~is_crowd], instances.gt_boxes.tensor
            ):
                return objects, boxes[is_crowd] if with_crowds else None
        return None, None

    def _source(self, number: int) -> SourceObject:
        record = self.loader.dataset.records[number // _MOST_OBJECTS]
        return SourceObject(record, record["annotations"][number % _MOST_OBJECTS])


class _NumberedObjects(Sequence):
    """Dataset dicts whose annotations have their number as their class."""

    def __init__(self, records: Sequence[dict[str, Any]], *, with_crowds: bool):
        """
        Args:
            records: the data set.
            with_crowds: crowds count as objects.
        """
        self._records = records
        self._with_crowds = with_crowds

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        record = dict(self._records[index])
        if "annotations" in record:
            record["annotations"] = [
                self._numbered(annotation, index * _MOST_OBJECTS + place)
                for place, annotation in enumerate(record["annotations"])
            ]
        return record

    def _numbered(self, annotation: dict[str, Any], number: int) -> dict[str, Any]:
        annotation = {**annotation, "category_id": number}
        if annotation.get("iscrowd") and self._with_crowds:
            x0, y0, x1, y1 = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            annotation["iscrowd"] = 0
            # Its run lengths would not go with the polygons of objects.
            annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        return annotation
