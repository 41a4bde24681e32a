"""Evaluation of every stage in one pass over a data set."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..durable import write_text
from ..errors import UserError
from ..modeling import QueryDetector, require_query_detector
from ..structures import GroundTruth
from ..training import HungarianMatcher, LabelAssigner, StagewiseMatcher
from .coco import CocoEvaluator
from .diagnosis import (
    count_label_changes,
    count_score_changes,
    find_duplicates,
    match_detections,
)
from .inference import run_evaluator
from .stage_predictions import STAGE_PREDICTIONS, StagePredictions
from .truth import (
    annotated_records,
    collate_objects,
    count_needed_classes,
    objects_as_seen,
    objects_of,
)

__all__ = [
    "AllStages",
    "StageEvaluator",
    "check_stage_evaluation",
    "compared_label_assigners",
    "configured_label_assigners",
    "evaluate_stages",
]

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class AllStages(nn.Module):
    """A detector whose answer also holds what its other stages would have answered.

    Usable with Detectron2's ``inference_on_dataset`` and its evaluators, which see the detections
    of the answering stage as always: the last one's, or with ``model.stages_at_test`` those of an
    earlier one. All S stages are run.
    """

    def __init__(self, detector: nn.Module):
        """
        Raises:
            UserError: the detector has no stages that could answer.
        """
        super().__init__()
        self.detector = require_query_detector(
            detector, "evaluation by stage (train.stage_evaluation)"
        )
        # Whoever switches the mode of this module back must not switch the detector's.
        self.training = detector.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Returns:
            for each image "instances" of the answering stage, "stages" (Instances of each of the S
            stages), "auxiliary" (likewise of each further head, by its name), "logits" (S, N, K),
            and "boxes" (S, N, 4) in pixels of the resized image; the last two in float32, on the
            CPU.
        """
        if self.detector.decoder.auxiliary_names:
            outputs, heads = self.detector.inference_heads(batched_inputs)
            detections = heads.pop("")
        else:
            (outputs, detections), heads = self.detector.inference_stages(batched_inputs), {}
        # One copy from the device each, not one of each image.
        logits = torch.stack([output.logits for output in outputs], dim=1).float().cpu()
        boxes = torch.stack([output.boxes for output in outputs], dim=1).float().cpu()
        auxiliary = [
            {name: [instances[b] for instances in stages] for name, stages in heads.items()}
            for b in range(len(batched_inputs))
        ]
        return [
            {
                "instances": stages[self.detector.answering_stage],
                "stages": list(stages),
                "auxiliary": further,
                "logits": logits_,
                "boxes": boxes_,
            }
            for stages, further, logits_, boxes_ in zip(zip(*detections), auxiliary, logits, boxes)
        ]


class StageEvaluator(DatasetEvaluator):
    """AP after each stage, fading true and growing false positives, duplicates, label changes.

    To be used with :class:`AllStages`. What fades and grows is defined in
    :func:`~detection_toolkit.evaluation.count_score_changes`, a label's change in
    :func:`~detection_toolkit.evaluation.count_label_changes`. Labels are assigned to the model's
    predictions on the test images as a training step would, by each label assigner in turn,
    whatever the model was trained with.
    """

    def __init__(
        self,
        dataset_name: str,
        num_stages: int,
        *,
        num_classes: int,
        auxiliary: Sequence[str] = (),
        matcher: nn.Module | None = None,
        label_assigners: Sequence[LabelAssigner] = (),
        iou_thresholds: Sequence[float] = (0.5, 0.75),
        duplicate_iou: float = 0.7,
        score_threshold: float = 0.1,
        max_dets_per_image: int | None = None,
        backend: str = "pycocotools",
        output_file: str | Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            dataset_name: in Detectron2's catalogues.
            num_stages: S.
            num_classes: K.
            auxiliary: names of further heads of the stages, whose AP is computed as well.
            matcher: one-to-one matcher; default :class:`HungarianMatcher` as released.
            label_assigners: those whose changes are counted, each under its ``name``; default
                :class:`~detection_toolkit.training.StagewiseMatcher`, each stage's own match.
            iou_thresholds: IoUs from which on a detection is a true positive.
            duplicate_iou: two detections of a class that overlap more are duplicates; also the
                threshold of the NMS that AP is computed with once more.
            score_threshold: detections that score less are not looked at for duplicates.
            max_dets_per_image, backend: see :class:`CocoEvaluator`.
            output_file: JSON to write, and beside it the detections of every stage,
                ``stage_predictions.npz``; None: neither.
            facts: further entries at the top of the JSON.

        Raises:
            UserError: the data set has no annotations, or some of classes beyond K, or there is no
                such backend.
        """
        records = _require_annotations(dataset_name, num_classes)
        self.dataset_name = dataset_name
        self.num_stages = num_stages
        self.num_classes = num_classes
        self.matcher = HungarianMatcher() if matcher is None else matcher
        self.label_assigners = tuple(label_assigners) or (StagewiseMatcher(),)
        self.iou_thresholds = tuple(iou_thresholds)
        self.duplicate_iou = duplicate_iou
        self.score_threshold = score_threshold
        self.output_file = None if output_file is None else Path(output_file)
        self.facts = dict(facts or {})
        self._truth = {record["image_id"]: objects_of(record) for record in records}
        with _quiet():
            make = partial(
                CocoEvaluator,
                dataset_name,
                ("bbox",),
                backend=backend,
                max_dets_per_image=max_dets_per_image,
            )
            # One evaluator a stage, and one for the last stage after NMS.
            self._coco = [make() for _ in range(num_stages + 1)]
            self._auxiliary = {
                (name, stage): make() for name in auxiliary for stage in range(num_stages)
            }
        self.reset()

    def reset(self) -> None:
        for evaluator in (*self._coco, *self._auxiliary.values()):
            evaluator.reset()
        self._images = 0
        self._counts: dict[tuple, Tensor] = {}
        self._found = StagePredictions(self.num_stages)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: of the model.
            outputs: of :class:`AllStages`.
        """
        for evaluator, stage in zip(self._coco, range(self.num_stages)):
            evaluator.process(inputs, [{"instances": x["stages"][stage]} for x in outputs])
        kept = [{"instances": self._suppress(x["stages"][-1])} for x in outputs]
        self._coco[-1].process(inputs, kept)
        for (name, stage), evaluator in self._auxiliary.items():
            evaluator.process(inputs, [{"instances": x["auxiliary"][name][stage]} for x in outputs])

        predictions = [(x["logits"], x["boxes"], x["stages"][-1].to("cpu")) for x in outputs]
        truth = [objects_as_seen(self._truth[x["image_id"]], x) for x in inputs]
        for (logits, boxes, last), objects, x in zip(predictions, truth, inputs):
            self._count_score_changes(logits.sigmoid(), boxes, last, objects, x["image"].shape[-2:])
        found = []
        for x, after_nms in zip(outputs, kept):
            all_stages = [*x["stages"], after_nms["instances"]]
            all_stages = [instances.to("cpu") for instances in all_stages]
            self._count_duplicates(all_stages)
            found.append(all_stages)
        if self.output_file is not None:
            for x, stages in zip(inputs, found):
                for stage in range(self.num_stages):
                    self._found.add(stage, x["image_id"], stages[stage])
        self._count_label_changes(
            torch.stack([logits for logits, _, _ in predictions], 1),
            torch.stack([boxes for _, boxes, _ in predictions], 1),
            collate_objects(truth, inputs),
        )
        self._images += len(inputs)

    def evaluate(self) -> dict[str, Any] | None:
        """The metrics, also written to ``output_file``; None in all but the main process."""
        stages = range(1, self.num_stages + 1)
        titles = [*(f"stage {t}" for t in stages), f"stage {self.num_stages} after NMS"]
        titles += [f"stage {t + 1}, {name}" for name, t in self._auxiliary]
        results = []
        for evaluator in self._progress([*self._coco, *self._auxiliary.values()], titles):
            with _quiet():
                results.append(evaluator.evaluate())
        gathered = comm.gather((self._images, self._counts, self._found))
        if not comm.is_main_process():
            return None
        counts: dict[tuple, Tensor] = {}
        for _, part, _ in gathered:
            for key, value in part.items():
                counts[key] = counts.get(key, 0) + value
        of_stages, of_auxiliary = results[: len(self._coco)], results[len(self._coco) :]
        metrics = self._summarise(of_stages, sum(images for images, *_ in gathered), counts)
        if self._auxiliary:
            metrics["auxiliary"] = self._summarise_auxiliary(of_auxiliary)
        logger.info("%s by stage:\n%s", self.dataset_name, _table(metrics))
        if self.output_file is not None:
            write_text(self.output_file, json.dumps(metrics, indent=2) + "\n")
            self._write_predictions([found for *_, found in gathered])
        return metrics

    def _write_predictions(self, gathered: Sequence[StagePredictions]) -> None:
        """Of all processes; their images in no order, as it does not matter."""
        found = StagePredictions(self.num_stages)
        for part in gathered:
            found.extend(part)
        ids = MetadataCatalog.get(self.dataset_name).get("thing_dataset_id_to_contiguous_id")
        category_ids = None if ids is None else {index: key for key, index in ids.items()}
        assert self.output_file is not None
        found.write(self.output_file.with_name(STAGE_PREDICTIONS), category_ids)

    def _suppress(self, instances: Instances) -> Instances:
        boxes, classes = instances.pred_boxes.tensor, instances.pred_classes
        return instances[batched_nms(boxes, instances.scores, classes, self.duplicate_iou)]

    def _count_score_changes(
        self,
        scores: Tensor,
        boxes: Tensor,
        last: Instances,
        objects: tuple[Tensor, Tensor, Tensor],
        size: tuple[int, int],
    ) -> None:
        truth_boxes, truth_classes, crowd = objects
        # As detections are before they count: clipped to the image.
        limit = boxes.new_tensor([size[1], size[0]]).repeat(2)
        boxes = boxes.clamp(min=0).minimum(limit)
        for threshold in self.iou_thresholds:
            found = match_detections(
                boxes[-1, last.query_index],
                last.pred_classes,
                truth_boxes,
                truth_classes,
                iou_threshold=threshold,
                crowd=crowd,
            )
            changes = count_score_changes(
                scores,
                boxes,
                queries=last.query_index,
                classes=last.pred_classes,
                found=found,
                truth_boxes=truth_boxes,
            )
            for name, value in changes._asdict().items():
                self._add(("score_changes", threshold, name), value)

    def _count_duplicates(self, stages: list[Instances]) -> None:
        duplicates, detections = [], []
        for instances in stages:
            kept = instances[instances.scores >= self.score_threshold]
            found = find_duplicates(
                kept.pred_boxes.tensor, kept.pred_classes, iou_threshold=self.duplicate_iou
            )
            duplicates.append(found.sum())
            detections.append(len(kept))
        self._add(("duplicates",), torch.stack(duplicates))
        self._add(("detections",), torch.tensor(detections))

    def _count_label_changes(self, logits: Tensor, boxes: Tensor, truth: GroundTruth) -> None:
        assignment = self.matcher(logits, boxes, truth)
        for assigner in self.label_assigners:
            targets = assigner(assignment, boxes, truth, num_classes=self.num_classes)
            for key, value in count_label_changes(targets)._asdict().items():
                self._add(("label_changes", assigner.name, key), value)

    def _add(self, key: tuple, value: Tensor) -> None:
        self._counts[key] = self._counts[key] + value if key in self._counts else value

    def _progress(self, items: Iterable, titles: Sequence[str]) -> Iterator:
        shown = comm.is_main_process()
        with tqdm(total=len(titles), unit=" stages", disable=None if shown else True) as bar:
            for item, title in zip(items, titles):
                bar.set_description(f"AP of {title}")
                yield item
                bar.update()

    def _summarise_auxiliary(
        self, results: list[dict[str, Any]]
    ) -> dict[str, list[dict[str, float | None]]]:
        """AP of each further head by stage."""
        heads: dict[str, list[dict[str, float | None]]] = {}
        for (name, stage), result in zip(self._auxiliary, results):
            precision = _average_precision(result)
            heads.setdefault(name, []).append({"stage": stage + 1, **precision})
        return heads

    def _summarise(
        self, results: list[dict[str, Any]], num_images: int, counts: Mapping[tuple, Tensor]
    ) -> dict[str, Any]:
        duplicates, detections = counts[("duplicates",)], counts[("detections",)]
        # The last one is the last stage after NMS.
        *stages, after_nms = (
            {
                **_average_precision(result),
                "detections": int(number),
                "duplicates": _share(duplicate, number),
            }
            for result, number, duplicate in zip(results, detections, duplicates)
        )
        stages = [{"stage": t, **stage} for t, stage in enumerate(stages, start=1)]
        score_changes = []
        for threshold in self.iou_thresholds:
            c = {
                name: counts[("score_changes", threshold, name)]
                for name in ("true_positives", "faded", "false_positives", "grown")
            }
            true, false = c["true_positives"], c["false_positives"]
            score_changes.append(
                {
                    "iou_threshold": threshold,
                    "true_positives": int(true),
                    "faded": _share(c["faded"][-1], true),
                    "faded_from_stage": [_share(n, true) for n in c["faded"][:-1]],
                    "false_positives": int(false),
                    "grown": _share(c["grown"][-1], false),
                    "grown_from_stage": [_share(n, false) for n in c["grown"][:-1]],
                }
            )
        label_changes = {}
        for name in (assigner.name for assigner in self.label_assigners):
            changed, labelled, queries = (
                counts[("label_changes", name, key)] for key in ("changed", "labelled", "queries")
            )
            label_changes[name] = {
                "share_of_queries": _share(changed.sum(), queries * len(changed)),
                "share_of_queries_by_step": [_share(n, queries) for n in changed],
                "share_of_labelled": _share(changed.sum(), labelled.sum()),
                "share_of_labelled_by_step": [_share(n, m) for n, m in zip(changed, labelled)],
            }
        return {
            "dataset": self.dataset_name,
            "classes": MetadataCatalog.get(self.dataset_name).get("thing_classes"),
            **self.facts,
            "num_images": num_images,
            "num_stages": self.num_stages,
            "duplicate_iou": self.duplicate_iou,
            "duplicate_score_threshold": self.score_threshold,
            "stages": stages,
            "last_stage_after_nms": after_nms,
            "score_changes": score_changes,
            "label_changes": label_changes,
        }


def evaluate_stages(
    model: nn.Module,
    data_loader: Iterable[list[dict[str, Any]]],
    evaluator: DatasetEvaluator | None = None,
    *,
    dataset_name: str,
    label_assigners: Iterable[LabelAssigner] = (),
    max_dets_per_image: int | None = None,
    backend: str = "pycocotools",
    output_file: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Detectron2's ``inference_on_dataset``, with the metrics of every stage from the same pass.

    Args:
        model: a :class:`~detection_toolkit.modeling.QueryDetector`, also inside of a
            DistributedDataParallel. Its criterion's matcher is used to count label changes.
        data_loader: as ``build_test_loader`` makes it.
        evaluator: of the answering stage's detections.
        label_assigners: whose label changes are counted beside those of each stage's own match
            and of the model's own label assigner; see :func:`compared_label_assigners`.
        dataset_name, max_dets_per_image, backend, output_file, facts: see :class:`StageEvaluator`.

    Returns:
        the evaluator's results, and the metrics by stage; both empty but in the main process.

    Raises:
        UserError: the model has no stages, or the data set no annotations, or some of classes that
            the model lacks.
        NonFinitePredictionError: an image has no finite prediction; in all processes.
    """
    detector = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    all_stages = AllStages(detector)
    stage_evaluator = StageEvaluator(
        dataset_name,
        detector.decoder.num_stages,
        num_classes=detector.num_classes,
        auxiliary=detector.decoder.auxiliary_names,
        matcher=None if detector.criterion is None else detector.criterion.matcher,
        label_assigners=compared_label_assigners(detector, label_assigners),
        max_dets_per_image=max_dets_per_image,
        backend=backend,
        output_file=output_file,
        facts=facts,
    )
    shown = comm.is_main_process()
    loader = tqdm(data_loader, "all stages", unit=" batches", disable=None if shown else True)
    both = _Both(evaluator, stage_evaluator)
    results = run_evaluator(all_stages, loader, both)
    return results, both.stage_metrics


def compared_label_assigners(
    detector: QueryDetector, others: Iterable[LabelAssigner] = ()
) -> list[LabelAssigner]:
    """Each stage's own match, the detector's own label assigner, and others; no name twice.

    Of several with the same name the first counts, so that the detector's own takes the place of
    one of its kind with other settings.
    """
    own = () if detector.criterion is None else (detector.criterion.label_assigner,)
    by_name: dict[str, LabelAssigner] = {}
    for assigner in (StagewiseMatcher(), *own, *others):
        by_name.setdefault(assigner.name, assigner)
    return list(by_name.values())


def configured_label_assigners(cfg: DictConfig) -> list[LabelAssigner]:
    """Those that a config names in ``dataloader.stage_evaluator.label_assigners``, if any."""
    nodes = OmegaConf.select(cfg, "dataloader.stage_evaluator.label_assigners") or ()
    return [instantiate(node) for node in nodes]


class _Both(DatasetEvaluators):
    """Both evaluators in one pass; the metrics by stage are kept apart."""

    def __init__(self, evaluator: DatasetEvaluator | None, stage_evaluator: StageEvaluator):
        super().__init__([x for x in (evaluator, stage_evaluator) if x is not None])
        self.evaluator = evaluator
        self.stage_evaluator = stage_evaluator
        self.stage_metrics: dict[str, Any] = {}

    def evaluate(self) -> dict[str, Any]:
        results = self.evaluator.evaluate() if self.evaluator is not None else {}
        self.stage_metrics = self.stage_evaluator.evaluate() or {}
        return results


def check_stage_evaluation(
    model: nn.Module, dataset_names: Iterable[str], label_assigners: Iterable[LabelAssigner] = ()
) -> None:
    """Tell before a training what would stop the evaluation after it.

    Raises:
        UserError: the model has no stages, or a data set no annotations, or some of classes that
            the model lacks.
    """
    detector = AllStages(model).detector
    compared_label_assigners(detector, label_assigners)
    for name in dataset_names:
        _require_annotations(name, detector.num_classes)


def _require_annotations(dataset_name: str, num_classes: int) -> list[dict[str, Any]]:
    records = annotated_records(dataset_name)
    if not records:
        raise UserError(
            f"data set {dataset_name} has no annotated objects: evaluation by stage "
            "(train.stage_evaluation) needs some"
        )
    needed = count_needed_classes(records)
    if needed > num_classes:
        raise UserError(
            f"{dataset_name} needs {needed} classes, and the model has {num_classes}: evaluation "
            "by stage (train.stage_evaluation) needs a model with all of them"
        )
    return records


def _average_precision(result: Mapping[str, Any]) -> dict[str, float | None]:
    values = result.get("bbox", {})
    return {name: _finite(values.get(name, math.nan)) for name in METRICS}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _share(part: Tensor, whole: Tensor) -> float | None:
    return float(part) / float(whole) if whole else None


def _table(metrics: Mapping[str, Any]) -> str:
    names = ("AP", "AP50", "AP75", "duplicates")
    rows = [[s["stage"], *(s[name] for name in names)] for s in metrics["stages"]]
    for head, stages in metrics.get("auxiliary", {}).items():
        rows += [[f"{s['stage']}, {head}", *(s.get(name) for name in names)] for s in stages]
    after_nms = metrics["last_stage_after_nms"]
    rows.append([f"{metrics['num_stages']} + NMS", *(after_nms[name] for name in names)])
    text = tabulate(rows, ["stage", *names], "pipe", floatfmt=".3f", missingval="-")
    lines = [text]
    for changes in metrics["score_changes"]:
        lines.append(
            f"IoU {changes['iou_threshold']}: of {changes['true_positives']} true positives "
            f"{_percent(changes['faded'])} fade, of {changes['false_positives']} false positives "
            f"{_percent(changes['grown'])} grow"
        )
    for name, changes in metrics["label_changes"].items():
        lines.append(
            f"labels by {name}: {_percent(changes['share_of_labelled'])} of the labelled queries "
            "change from a stage to the next"
        )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables that each COCOEvaluator prints: there is one of them for every stage."""
    coco_logger = logging.getLogger("detectron2.evaluation.coco_evaluation")
    level = coco_logger.level
    coco_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        coco_logger.setLevel(level)
