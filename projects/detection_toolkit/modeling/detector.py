"""The base of all meta-architectures: images -> features -> queries -> Instances or losses."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..config import require_lazy_config
from ..errors import NonFinitePredictionError, UserError
from ..structures import GroundTruth, HeadOutput, Predictions, StageOutput
from .execution import Execution
from .feature_maps import FeatureMaps
from .folding import fold_frozen_norms
from .products import Products
from .recording import Recordings

__all__ = ["QueryDetector", "require_query_detector"]

logger = logging.getLogger(__name__)


class QueryDetector(nn.Module):
    """A query-based detector: backbone, initial queries, stages in cascade.

    Backbone with neck, initial queries and query head are parts; the criterion is injected, and
    needed for training only. Input and output follow Detectron2's models.

    Attributes:
        matched_accuracy: (S,) of the last forward pass in training, see
            :class:`~detection_toolkit.training.criterion.CriterionResult`; None before.
    """

    _answers_on_host = False

    def __new__(cls, *args: Any, **_: Any) -> QueryDetector:
        """
        Raises:
            UserError: Detectron2's ``build_model`` or ``DefaultPredictor`` calls it, with a
                ``CfgNode``, which a subclass' own constructor would refuse less helpfully.
        """
        if args:
            require_lazy_config(args[0], cls.__name__)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        backbone: nn.Module,
        initial_queries: nn.Module,
        decoder: nn.Module,
        criterion: nn.Module | None,
        num_classes: int,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        size_divisibility: int = 32,
        max_detections: int = 100,
        stages_at_test: int | None = None,
        execution: Execution | None = None,
    ):
        """
        Args:
            backbone: image batch -> {name: map (B, C, H_l, W_l)}, finest first, with the neck
                that brings every map to C channels
                (:class:`~detection_toolkit.modeling.SharedNormChannelMapper`).
            initial_queries: feature maps -> :class:`~detection_toolkit.structures.Queries`.
            decoder: a query head (see ``QUERY_HEADS``). Where it has a route, the criterion becomes
                the route's.
            criterion: predictions and ground truth -> losses; None for inference only.
            num_classes: K.
            pixel_mean, pixel_std: three numbers each, RGB, of values 0..255.
            size_divisibility: batches are padded at the bottom and right to a multiple of it,
                after normalisation.
            max_detections: best (query, class) pairs that an image keeps at test time.
            stages_at_test: stages that run at test time, of the S; the last of them answers. None:
                all. Training and the state dict have all stages.
            execution: how to compute; the decoder has its own reference to it.

        Raises:
            UserError: the decoder has no such number of stages.
        """
        super().__init__()
        self.execution = execution or Execution()
        if self.execution.channels_last:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.execution.fold_norms:
            fold_frozen_norms(backbone)
        self.backbone = backbone
        self.strides = tuple(shape.stride for shape in backbone.output_shape().values())
        self.initial_queries = initial_queries
        self.decoder = decoder
        decoder.limit_stages_at_test(stages_at_test)
        route = decoder.route
        self.criterion = criterion if None in (criterion, route) else route.supervise(criterion)
        self._products = Products(
            self.execution.products,
            parameters=sum(p.numel() for p in self.parameters()),
            compile=self.execution.compile,
        )
        self.num_classes = num_classes
        self.size_divisibility = size_divisibility
        self.max_detections = max_detections
        self._images_with_dropped_queries = 0
        self._recordings = Recordings()
        self.matched_accuracy: Tensor | None = None
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    @property
    def num_queries(self) -> int:
        """N."""
        return self.initial_queries.num_queries

    @property
    def answering_stage(self) -> int:
        """The stage whose predictions are the answer at test time, counted from 0."""
        return self.decoder.num_stages_at_test - 1

    @contextlib.contextmanager
    def answering_on_host(self) -> Iterator[None]:
        """Meanwhile detections are tensors of the CPU.

        A batch is copied once, before it is divided into images, which otherwise wait for the
        device several times each.
        """
        before, self._answers_on_host = self._answers_on_host, True
        try:
            yield
        finally:
            self._answers_on_host = before

    def products(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass: matrix products as ``model.execution.products`` says.

        :meth:`forward` opens it for itself; who calls :meth:`predict` does so around that.
        """
        return self._products.forward(self.device.type)

    def products_of_backward(self) -> contextlib.AbstractContextManager[None]:
        """Around ``backward()``: the same for that."""
        return self._products.backward(self.device.type)

    def forward(
        self, batched_inputs: list[dict[str, Any]], *, target_counts: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: dicts in Detectron2's format: "image" (3, H, W) RGB of 0..255;
                "instances" with ``gt_boxes`` and ``gt_classes`` for training; "height" and
                "width", the size that detections are scaled to at test time.
            target_counts: (S, 2), see :meth:`count_targets`; only for accumulated gradients.

        Returns:
            training: scalar losses ``loss_{cls,bbox,giou}_stage{t}``, whose sum is the loss.
            otherwise: for each image {"instances": Instances} with ``pred_boxes``, ``scores``
            and ``pred_classes``, best first.

        Raises:
            ValueError: training without ground truth, or a class outside [0, K).
            NonFinitePredictionError: see :meth:`inference`; in training, from the matcher.
        """
        images = self.preprocess_image(batched_inputs)
        if not self.training:
            with self.products():
                answer = self._answer(images)
            detections = self._detect(*answer, images, batched_inputs)
            return [{"instances": instances} for instances in detections]
        truth = self.prepare_ground_truth(batched_inputs, images.image_sizes)
        with self.products():
            predictions = self.predict(images, truth)
        result = self.criterion(predictions, truth, target_counts=target_counts)
        self.matched_accuracy = result.matched_accuracy
        return result.as_dict()

    def _answer(self, images: ImageList) -> tuple[StageOutput | HeadOutput, int]:
        """The predictions of the answering stage, and its number."""
        batch = images.tensor
        if not (self.execution.cuda_graphs and batch.is_cuda) or torch.is_grad_enabled():
            return self.predict(images).stages[self.answering_stage], self.answering_stage
        sizes = torch.tensor(images.image_sizes).to(batch.device, non_blocking=True)
        tensors = itertools.chain(self.parameters(), self.buffers())
        output = HeadOutput(*self._recordings(self._answer_as_tensors, (batch, sizes), tensors))
        return output, self.answering_stage

    def _answer_as_tensors(self, batch: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        output = self.predict(ImageList(batch, sizes)).stages[self.answering_stage]
        return output.logits, output.boxes

    @torch.no_grad()
    def count_targets(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(S, 2) matched queries and ones in the class targets of every stage in this batch.

        When gradients are accumulated, the sum over the micro-batches of a step is what each of
        their losses is normalised with, so that they add up to the loss of the whole batch. It
        takes a forward pass only where the objects alone do not decide them, as with labels across
        stages. A detector whose losses are normalised by something else overrides this.
        """
        truth = self.prepare_ground_truth(
            batched_inputs, [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        )
        known = self.criterion.targets_of_truth(
            truth, num_stages=self.decoder.num_stages, num_queries=self.num_queries
        )
        if known is not None:
            # Of the type of counts that are made of predictions, as another process may.
            dtype = torch.promote_types(self.pixel_mean.dtype, torch.float32)
            counts = torch.tensor(known, dtype=dtype)[:, None].repeat(1, 2)
            return counts.to(self.device, non_blocking=True)
        images = self.preprocess_image(batched_inputs)
        with self.products():
            predictions = self.predict(images, truth)
        return self.criterion.count_targets(predictions, truth)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch the images."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.size_divisibility)

    def extract_features(self, images: ImageList) -> FeatureMaps:
        """The maps of a normalised batch, finest first."""
        batch = images.tensor
        if self.execution.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        sizes = images.image_sizes
        if not isinstance(sizes, Tensor):
            # Traced by fvcore or torch.jit, Detectron2's sizes are a list of small tensors.
            sizes = torch.stack([torch.as_tensor(size) for size in sizes])
        return FeatureMaps(
            levels=tuple(self.backbone(batch).values()),
            strides=self.strides,
            image_sizes=sizes.to(batch.device, non_blocking=True),
            padded_size=tuple(batch.shape[-2:]),
        )

    def predict(self, images: ImageList, truth: GroundTruth | None = None) -> Predictions:
        """Predictions for a normalised batch: of the stages that are run, or in training of the
        route.

        Args:
            images: the batch.
            truth: in training, its objects, which some methods make queries of.
        """
        maps = self.extract_features(images)
        return Predictions(self.decoder(maps, self.initial_queries(maps)))

    def prepare_ground_truth(
        self, batched_inputs: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int]]
    ) -> GroundTruth:
        """Collect the objects of a training batch on the model's device."""
        boxes, labels = [], []
        for x in batched_inputs:
            if "instances" not in x:
                raise UserError(
                    f"{x.get('file_name', 'an image')} has no ground truth: training needs "
                    '"instances" with gt_boxes and gt_classes'
                )
            classes = x["instances"].gt_classes
            if (
                len(classes)
                and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes
            ):
                raise UserError(
                    f"{x.get('file_name', 'an image')} has class {int(classes.max())} (smallest "
                    f"{int(classes.min())}), but the model has {self.num_classes} classes: set "
                    "model.num_classes"
                )
            boxes.append(x["instances"].gt_boxes.tensor)
            labels.append(classes)
        return GroundTruth.collate(boxes, labels, image_sizes, device=self.device)

    @torch.no_grad()
    def inference_stages(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[list[StageOutput], list[list[Instances]]]:
        """What every stage would answer if it were the last, in one forward pass.

        All S stages are run, whatever ``stages_at_test`` says.

        Args:
            batched_inputs: as for :meth:`forward` at test time.

        Returns:
            the predictions of the S stages, in pixels of the resized images, and for each stage
            each image's detections, as :meth:`forward` returns them for the answering stage.
        """
        outputs, heads = self.inference_heads(batched_inputs, auxiliary=False)
        return outputs, heads[""]

    @torch.no_grad()
    def inference_heads(
        self, batched_inputs: list[dict[str, Any]], *, auxiliary: bool = True
    ) -> tuple[list[StageOutput], dict[str, list[list[Instances]]]]:
        """What every head of every stage would answer, in one forward pass.

        Args:
            batched_inputs: as for :meth:`forward` at test time.
            auxiliary: also those that training alone uses.

        Returns:
            the predictions of the S stages, as of :meth:`inference_stages`, and detections: those
            of the stages themselves under "", those of further heads under their names.
        """
        images = self.preprocess_image(batched_inputs)
        context = self.decoder.with_auxiliary() if auxiliary else contextlib.nullcontext()
        with context, self.decoder.with_all_stages(), self.products():
            outputs = list(self.predict(images).stages)
        of_heads: dict[str, list[StageOutput | HeadOutput]] = {"": [*outputs]}
        for name in self.decoder.auxiliary_names if auxiliary else ():
            of_heads[name] = [x.auxiliary[name] for x in outputs if x.auxiliary]
        detections = {
            name: [
                self._detect(output, stage, images, batched_inputs)
                for stage, output in enumerate(of_stages)
            ]
            for name, of_stages in of_heads.items()
        }
        return outputs, detections

    def _detect(
        self,
        output: StageOutput | HeadOutput,
        stage: int,
        images: ImageList,
        batched_inputs: list[dict[str, Any]],
    ) -> list[Instances]:
        """Detections of one stage, in pixels of the original images."""
        names = [str(x.get("file_name", i)) for i, x in enumerate(batched_inputs)]
        found = self.inference(output, images.image_sizes, stage=stage, names=names)
        return [self._postprocess(*pair) for pair in zip(found, batched_inputs)]

    def select_detections(
        self, output: StageOutput | HeadOutput
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best (query, class) pairs of a batch, as tensors.

        Args:
            output: predictions of one stage.

        Returns:
            of D = min(max_detections, N K) pairs, best first: boxes (B, D, 4) in pixels of the
            resized image, scores (B, D), classes (B, D) and the queries (B, D) they came from.
            Pairs of a query whose box or scores are not finite come last, with a score of -1 and a
            box of zeros; so do those of queries that do not count.
        """
        usable = _finite_queries(output)
        if output.active is not None:
            usable = usable & output.active
        usable = usable[..., None]
        scores = torch.where(usable, output.logits.float().sigmoid(), -1.0).flatten(1)  # (B, N K)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        query = torch.div(index, self.num_classes, rounding_mode="floor")
        boxes = torch.where(usable, output.boxes, 0.0)
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        classes = index % self.num_classes
        return boxes, scores, classes, query

    @torch.no_grad()
    def inference(
        self,
        output: StageOutput | HeadOutput,
        image_sizes: Sequence[tuple[int, int]],
        *,
        stage: int = -1,
        names: Sequence[str] | None = None,
    ) -> list[Instances]:
        """The best (query, class) pairs of each image, in pixels of the resized image.

        As in Detectron2's heads, queries whose box or scores are not finite are dropped; a warning
        counts them.

        Args:
            output: predictions of one stage, usually the last.
            image_sizes: (height, width) of each unpadded image.
            stage, names: number of the stage and names of the images, for messages.

        Returns:
            for each image ``pred_boxes``, ``scores`` and ``pred_classes``, best first, with the
            ``query_index`` that each came from.

        Raises:
            NonFinitePredictionError: no query of an image is finite.
        """
        names = [str(i) for i in range(len(image_sizes))] if names is None else names
        counts = (~_finite_queries(output)).sum(1)
        selected: Sequence[Tensor] = self.select_detections(output)
        if self._answers_on_host:
            counts, *selected = _copied_at_once(counts, *selected)
        dropped = counts.tolist()
        num_queries = output.boxes.shape[1]
        lost = [(stage, b) for b, count in enumerate(dropped) if count == num_queries]
        if lost:
            raise NonFinitePredictionError(
                lost,
                images=names,
                advice="The weights are not finite or have diverged (take an earlier checkpoint), "
                "an input is damaged, or mixed precision overflows (train.amp.evaluation=false).",
            )
        for name, count in zip(names, dropped):
            if count:
                self._warn_of_dropped_queries(count, stage, name)
        found = [
            Instances(size, pred_boxes=Boxes(b), scores=s, pred_classes=c, query_index=q)
            for size, b, s, c, q in zip(image_sizes, *selected)
        ]
        if output.active is None and not any(dropped):
            return found
        return [x[x.scores >= 0] for x in found]

    def _warn_of_dropped_queries(self, count: int, stage: int, name: str) -> None:
        """For the first image, and then whenever their number has doubled."""
        self._images_with_dropped_queries += 1
        total = self._images_with_dropped_queries
        if total & (total - 1) == 0:
            logger.warning(
                "%d of %d queries are NaN or infinite at stage %d of image %s and are dropped "
                "(%d times so far)",
                count,
                self.num_queries,
                stage,
                name,
                total,
            )

    @staticmethod
    def _postprocess(instances: Instances, batched_input: dict[str, Any]) -> Instances:
        height = batched_input.get("height", instances.image_size[0])
        width = batched_input.get("width", instances.image_size[1])
        return detector_postprocess(instances, height, width)


def _copied_at_once(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, ...) on the CPU, by one copy; whole numbers must be below 2^24."""
    dtype = torch.float32
    for x in tensors:
        if x.is_floating_point():
            dtype = torch.promote_types(dtype, x.dtype)
    flat = [x.flatten(1) if x.ndim > 1 else x[:, None] for x in tensors]
    host = torch.cat([x.to(dtype) for x in flat], dim=1).cpu()
    parts = host.split([x.shape[1] for x in flat], dim=1)
    return tuple(part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, tensors))


def _finite_queries(output: StageOutput | HeadOutput) -> Tensor:
    """(B, N) bool: whether box and scores of a query are finite.

    The score of an infinite logit is 0 or 1; only that of NaN is not finite.
    """
    return output.boxes.isfinite().all(-1) & ~output.logits.isnan().any(-1)


def require_query_detector(model: nn.Module, purpose: str) -> QueryDetector:
    """The model itself, for what needs a cascade of stages.

    Args:
        model: any detector.
        purpose: what needs the stages; begins the second half of the message.

    Raises:
        UserError: the model is no :class:`QueryDetector`.
    """
    if not isinstance(model, QueryDetector):
        raise UserError(
            f"{type(model).__name__} has no cascade of stages: {purpose} needs the config of a "
            "query-based detector"
        )
    return model
