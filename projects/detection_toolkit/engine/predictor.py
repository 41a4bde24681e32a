"""From one picture to its detections, as with Detectron2's ``DefaultPredictor``."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.official_files import read_class_names
from ..config import apply_overrides, get_config, require_lazy_config
from ..data import dataset_names
from ..data.batches import AnyPicture, as_picture, detect_in_batches
from ..data.mapper import augment, shown_frame
from ..errors import UserError
from .runs import find_run, log_config_of_run, plain_values, usable_device
from .settings import RunSettings
from .setup import class_number, classes_to_keep, prepare_config
from .shipped import is_shipped_config, shipped_checkpoint

__all__ = ["Predictor", "predictor_config"]

logger = logging.getLogger(__name__)


def predictor_config(
    config_file: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    weights: str | os.PathLike[str] | None = None,
    trust_config: bool = False,
) -> DictConfig:
    """The config of a predictor; see :meth:`Predictor.from_config`.

    Raises:
        UserError: no trained weights are named, and ``train.allow_partial`` is not set.
    """
    config_file = os.fspath(config_file)
    run = find_run(config_file)
    trained = None
    if run is None:
        cfg = get_config(config_file, trust_config=trust_config)
    else:
        log_config_of_run(config_file, run[0])
        config_file, trained = run
        cfg = get_config(config_file, trust_config=trust_config)
        usable_device(cfg)
        # In place of the weights that the run began with.
        cfg.train.init_checkpoint = trained or cfg.train.init_checkpoint
    apply_overrides(cfg, list(overrides))
    if weights is not None:
        cfg.train.init_checkpoint = os.fspath(weights)
    settings = RunSettings.from_config(cfg.train)
    path = settings.init_checkpoint or ""
    if not path and is_shipped_config(config_file):
        cfg.train.init_checkpoint = path = shipped_checkpoint()
    named = bool(weights or trained) or any(
        x.startswith("train.init_checkpoint") for x in overrides
    )
    # An address in a config is that of the backbone's weights, with which training starts.
    if (not path or ("://" in path and not named)) and not settings.allow_partial:
        raise UserError(
            f"no trained weights for {config_file}: name a checkpoint with --weights FILE "
            "(train.init_checkpoint=FILE), or --allow-partial to go on with random values"
        )
    return cfg


class Predictor:
    """Detector for single pictures, built from a LazyConfig and its weights.

    The call is that of :class:`detectron2.engine.DefaultPredictor`: weights from
    ``train.init_checkpoint``, the test resizing and the channel order of
    ``dataloader.test.mapper``, the device of ``train.device``.

    Attributes:
        cfg: the config, a copy of the one given.
        model: the detector, in evaluation mode.
        metadata: of the first test data set (``thing_classes`` holds the class names). Where that
            is not there, or is named by ``path``, class names come from the checkpoint.
        loaded: what the checkpoint tells of its "run", its "iteration", and whether the weights
            are "averaged".

    Example::

        predictor = Predictor.from_config(shipped_config())
        instances = predictor(cv2.imread("input.jpg"))["instances"]
    """

    def __init__(self, cfg: DictConfig):
        """
        Args:
            cfg: a config whose ``train.init_checkpoint`` names the weights (the averaged ones
                of the file where ``train.ema`` is enabled). ``model.num_classes`` follows the test
                data set. With ``train.allow_partial`` what the file lacks, and without a file all
                of it, is left as it was initialised, with a warning.

        Raises:
            ValueError: the mapper's image format is neither RGB nor BGR, or the file does not
                give the model all of its weights.
            FileNotFoundError: the weights do not exist.
        """
        require_lazy_config(cfg, type(self).__name__)
        self.cfg = copy.deepcopy(cfg)
        self.metadata, nameless = _follow_test_set(self.cfg)
        mapper = self.cfg.dataloader.test.mapper
        self.input_format = mapper.get("image_format", "RGB")
        if self.input_format not in ("RGB", "BGR"):
            raise UserError(
                "dataloader.test.mapper.image_format must be RGB or BGR, "
                f"it is {self.input_format!r}"
            )
        self.aug = T.AugmentationList([instantiate(a) for a in mapper.augmentations])
        settings = RunSettings.from_config(self.cfg.train)
        self.model = instantiate(self.cfg.model).to(settings.device)
        self.model.eval()
        self.loaded: Mapping[str, Any] = {}
        self.load_weights()
        if self.metadata.get("thing_classes") is None:
            self._take_class_names(nameless)
        self._compare_input()

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        trust_config: bool = False,
    ) -> Predictor:
        """Build a predictor from the folder of a run, without its data.

        Args:
            run: the folder, with the best checkpoint or else the last; or a checkpoint in it. Or
                what ``export --hub-folder`` has written, and its address on the Hugging Face hub,
                ``hf://OWNER/NAME``.
            overrides: ``key=value``, as on the command line of training.
            trust_config: see :func:`~detection_toolkit.config.get_config`.

        Raises:
            FileNotFoundError: the folder has no ``config.yaml``, or no checkpoint.
            KeyError: an override of a key that does not exist.
        """
        found = find_run(run)
        if found is None or found[1] is None:
            raise FileNotFoundError(f"{run} is no folder with a checkpoint, and no checkpoint")
        return cls(predictor_config(run, overrides, trust_config=trust_config))

    @classmethod
    def from_config(
        cls,
        config_file: str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        *,
        trust_config: bool = False,
    ) -> Predictor:
        """Build a predictor from a config file.

        Args:
            config_file: path of a config, or its name among the packaged ones. For that of a run,
                ``config.yaml`` in its folder, or the folder itself, the run's best checkpoint is
                used, or its last.
            weights: checkpoint; takes the place of the config's ``train.init_checkpoint``. When
                neither names one, the config of the shipped checkpoint uses that.
            overrides: ``key=value``, as on the command line of training.
            trust_config: see :func:`~detection_toolkit.config.get_config`.

        Raises:
            FileNotFoundError: no such config or weights.
            KeyError: an override of a key that does not exist.
        """
        return cls(
            predictor_config(config_file, overrides, weights=weights, trust_config=trust_config)
        )

    @torch.no_grad()
    def __call__(self, original_image: AnyPicture) -> dict[str, Instances]:
        """
        Args:
            original_image: (H, W, 3) picture in BGR order, of 0..255, as OpenCV reads it; or a
                file, or a picture of Pillow.

        Returns:
            {"instances": Instances}, with ``pred_boxes`` in pixels of the given picture,
            ``scores`` and ``pred_classes``, best first.

        Raises:
            ValueError: not a picture of three channels.
            UnreadableImageError: the picture is too thin to be resized, or the file cannot be read.
        """
        return self.model([self.preprocess(as_picture(original_image))])[0]

    @torch.no_grad()
    def predict(
        self, images: AnyPicture | Iterable[AnyPicture], *, batch_size: int = 1
    ) -> Iterator[Instances]:
        """Detect in many pictures, a batch at a time; no more than a batch is in memory.

        Those of a batch that have one size once they are resized go through the network together.
        Others do not: padding them to one size would change what is found.

        Args:
            images: pictures as :meth:`__call__` takes them; a generator may make them. Or one.
            batch_size: at most so many go through the network together.

        Yields:
            for each picture, in their order, what :meth:`__call__` gives as ``instances``.

        Raises:
            UserError: a batch of less than one picture.
            ValueError: not a picture of three channels.
            UnreadableImageError: a picture is too thin to be resized, or a file is missing or
                cannot be decoded.
        """

        def detect(inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
            return [output["instances"] for output in self.model(inputs)]

        yield from detect_in_batches(images, batch_size, self.preprocess, detect)

    def preprocess(self, original_image: np.ndarray) -> dict[str, Any]:
        """The model's input for one BGR picture: resized "image", with "height" and "width".

        They are those of the given picture, and larger where it is padded, see
        :func:`~detection_toolkit.data.mapper.shown_frame`.

        Raises:
            UnreadableImageError: the picture is too thin to be resized.
        """
        height, width = original_image.shape[:2]
        if self.input_format == "RGB":
            original_image = original_image[:, :, ::-1]
        augmented = T.AugInput(np.ascontiguousarray(original_image))
        transforms = augment(self.aug, augmented)
        height, width = shown_frame(transforms, (height, width), augmented.image.shape[:2])
        image = augmented.image.astype("float32").transpose(2, 0, 1)
        return {"image": torch.as_tensor(image.copy()), "height": height, "width": width}

    def load_weights(self) -> None:
        """Load ``train.init_checkpoint``.

        Raises:
            CheckpointMismatchError: it does not give the model all of its weights, or none is
                named, and ``train.allow_partial`` is not set.
            FileNotFoundError: the weights do not exist.
        """
        settings = RunSettings.from_config(self.cfg.train)
        if not settings.init_checkpoint and settings.allow_partial:
            logger.warning(
                "No weights: the detector is as it was initialised and finds nothing of use. "
                "Name a checkpoint with --weights FILE"
            )
            return
        checkpointer = Checkpointer(
            self.model,
            prefer_ema=settings.ema.enabled,
            allow_pickle=settings.allow_pickle,
            strict=not settings.allow_partial,
            classes=classes_to_keep(self.cfg, self.metadata.get("thing_classes")),
        )
        loaded = checkpointer.load(settings.init_checkpoint or "")
        # Not the weights and the optimizer's state, which would stay in memory.
        told = {key: loaded[key] for key in ("run", "iteration") if key in loaded}
        self.loaded = {**told, "averaged": checkpointer.loaded_ema}

    @property
    def _run(self) -> Mapping[str, Any]:
        return self.loaded.get("run") or {}

    def _take_class_names(self, reason: str) -> None:
        """From the checkpoint, where its model has as many classes."""
        names = self._run.get("classes")
        is_list = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
        if is_list and len(names) == class_number(self.cfg):
            self.metadata = Metadata(thing_classes=list(names))
        elif reason:
            logger.warning("detections will have no class names: %s", reason)

    def _compare_input(self) -> None:
        """Warn of images that are prepared otherwise than the checkpoint's run did."""
        mapper = self.cfg.dataloader.test.mapper
        ours = {
            "image_format": (self._run.get("input_format"), self.input_format),
            "augmentations": (self._run.get("resizing"), plain_values(mapper.augmentations)),
        }
        for key, (theirs, used) in ours.items():
            if theirs is not None and theirs != used:
                logger.warning(
                    "the checkpoint's run had dataloader.test.mapper.%s=%s, and not %s",
                    key,
                    theirs,
                    used,
                )


def _follow_test_set(cfg: DictConfig) -> tuple[Metadata, str]:
    """Metadata of the first test set, after which the config's number of classes is set.

    Detection needs no data set: the files of a registered one are not looked for, and one that
    cannot be registered costs only the class names. Images in a folder (``path``) are not looked at
    where the checkpoint names as many classes as the config has.

    Returns:
        the metadata, and why there are none.
    """
    node = OmegaConf.select(cfg, "dataloader.test.dataset")
    if node is not None and not any(node.get(key) for key in ("names", "json_file", "path")):
        return Metadata(), "the config names no data"
    has_path = node is not None and bool(node.get("path"))
    if has_path:
        classes = read_class_names(cfg.train.get("init_checkpoint") or "")
        if classes is not None and len(classes) == class_number(cfg):
            return Metadata(thing_classes=classes), ""
    try:
        prepare_config(cfg, training=False, with_files=False)
        names = dataset_names(cfg.dataloader.test.dataset, with_files=False)
        return MetadataCatalog.get(names[0]), ""
    except (FileNotFoundError, KeyError) as error:
        return Metadata(), str(error.args[0] if isinstance(error, KeyError) else error)
    except UserError as error:
        if not has_path:
            raise
        return Metadata(), str(error)
