"""Detectron2's ``COCOEvaluator``, with a choice of what finds the matches."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

from ..durable import write_text
from ..errors import UnknownNameError, UserError
from ..texts import FILE_ONLY
from .errors import require_hotcoco

__all__ = ["BACKENDS", "CocoEvaluator", "check_backend", "evaluate_by_hotcoco"]

logger = logging.getLogger(__name__)

BACKENDS = ("pycocotools", "hotcoco")


def check_backend(backend: str) -> None:
    """
    Raises:
        UnknownNameError: there is no such backend.
        MissingPackageError: it is not installed, or too old.
    """
    if backend not in BACKENDS:
        raise UnknownNameError(
            f"dataloader.evaluator.backend={backend!r} is not one of {', '.join(BACKENDS)}"
        )
    if backend == "hotcoco":
        require_hotcoco()


class CocoEvaluator(COCOEvaluator):
    """COCO's metrics of boxes and masks, by pycocotools or, faster, by hotcoco.

    Both give the same numbers to the last digit: hotcoco finds the matches and the precisions, and
    what they are summed up by is pycocotools' own.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "pycocotools",
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ):
        """
        Args:
            backend: ``pycocotools`` or ``hotcoco``.
            dataset_name, tasks, distributed, output_dir, max_dets_per_image, use_fast_impl,
                kpt_oks_sigmas, allow_cached_coco: as of Detectron2's ``COCOEvaluator``. Keypoints
                are for pycocotools alone, as is ``use_fast_impl``.

        Raises:
            UnknownNameError, MissingPackageError: see :func:`check_backend`.
        """
        check_backend(backend)
        self.backend = backend
        super().__init__(
            dataset_name,
            tasks,
            distributed,
            output_dir,
            max_dets_per_image=max_dets_per_image,
            # Detectron2 mentions where it lacks its compiled part.
            use_fast_impl=use_fast_impl and backend == "pycocotools",
            kpt_oks_sigmas=kpt_oks_sigmas,
            allow_cached_coco=allow_cached_coco,
        )

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None = None
    ) -> None:
        with io.StringIO() as printed, contextlib.redirect_stdout(printed):
            try:
                self._evaluate(predictions, img_ids)
            finally:
                # pycocotools prints what Detectron2's tables have once more.
                logger.info("pycocotools:\n%s", printed.getvalue(), extra=FILE_ONLY)

    def _evaluate(self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None) -> None:
        if self.backend == "pycocotools":
            super()._eval_predictions(predictions, img_ids)
            return
        results = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        if "keypoints" in tasks:
            raise UserError("keypoints need dataloader.evaluator.backend=pycocotools")
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is not None:
            category_ids = {index: category_id for category_id, index in contiguous.items()}
            for result in results:
                if result["category_id"] not in category_ids:
                    raise UserError(
                        f"a detection has class {result['category_id']}, but {self._metadata.name} "
                        f"has {len(category_ids)} classes: set model.num_classes"
                    )
                result["category_id"] = category_ids[result["category_id"]]
        if self._output_dir:
            write_text(Path(self._output_dir, "coco_instances_results.json"), json.dumps(results))
        if not self._do_evaluation:
            return
        for task in tasks:
            evaluation = None
            if results:
                evaluation = evaluate_by_hotcoco(
                    self._coco_api,
                    results,
                    task,
                    max_dets=self._max_dets_per_image,
                    image_ids=img_ids,
                )
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )


def evaluate_by_hotcoco(
    truth: COCO,
    results: Sequence[Mapping[str, Any]],
    task: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[Any] | None = None,
) -> COCOevalMaxDets:
    """A ``COCOeval`` that has evaluated, accumulated and summarised, with hotcoco's matches.

    Args:
        truth: of pycocotools.
        results: detections in COCO's format, at least one.
        task: ``bbox`` or ``segm``. Then masks decide which detections are small, not boxes.
        max_dets: see pycocotools' ``params.maxDets``.
        image_ids: images that count; None: all.

    Raises:
        MissingPackageError: see :func:`~detection_toolkit.evaluation.errors.require_hotcoco`.
        UserError: a detection is of an image that the data set lacks.
    """
    hotcoco = require_hotcoco()
    evaluation = COCOevalMaxDets(truth, iouType=task)
    params = evaluation.params
    if image_ids is not None:
        params.imgIds = list(image_ids)
    # As pycocotools orders them, which decides between equal scores.
    params.imgIds = np.unique(params.imgIds).tolist()
    params.catIds = np.unique(params.catIds).tolist()
    params.maxDets = sorted(max_dets)
    numbers = _Numbers(truth, params)
    objects = hotcoco.COCO(numbers.document(truth, task))
    found = hotcoco.COCOeval(objects, objects.loadRes(numbers.results(results, task)), task)
    found.params.maxDets = params.maxDets
    found.evaluate()
    found.accumulate()
    keys = ("precision", "recall", "scores")
    evaluation.eval = {key: np.asarray(found.eval[key]) for key in keys}
    evaluation.summarize()
    return evaluation


class _Numbers:
    """Whole numbers from 1 on for images and categories, which alone hotcoco takes, in the order
    in which pycocotools looks at them."""

    def __init__(self, truth: COCO, params: Any):
        self._known = truth.imgs
        self.of_image = {key: number for number, key in enumerate(params.imgIds, start=1)}
        self.of_category = {key: number for number, key in enumerate(params.catIds, start=1)}

    def document(self, truth: COCO, task: str) -> dict[str, Any]:
        """The objects that count."""
        images: list[dict[str, Any]] = [{"id": number} for number in self.of_image.values()]
        if task == "segm":  # polygons become masks of the image's size
            for entry, key in zip(images, self.of_image):
                entry.update((side, truth.imgs[key][side]) for side in ("height", "width"))
        annotations = []
        for annotation in truth.dataset["annotations"]:
            place = self._place(annotation)
            if place is None:
                continue
            entry = {
                "id": len(annotations) + 1,
                **place,
                "bbox": annotation["bbox"],
                "area": annotation["area"],
                # pycocotools ignores crowds, whatever "ignore" says.
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
            if task == "segm":
                entry["segmentation"] = annotation["segmentation"]
            annotations.append(entry)
        categories = [{"id": number, "name": str(number)} for number in self.of_category.values()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def results(self, results: Sequence[Mapping[str, Any]], task: str) -> Any:
        """The detections that count, with their boxes or their masks."""
        kind = "segmentation" if task == "segm" else "bbox"
        kept = []
        for result in results:
            if result["image_id"] not in self._known:
                raise UserError(f"a detection is of image {result['image_id']}, which is not there")
            place = self._place(result)
            if place is not None:
                kept.append({**place, kind: result[kind], "score": result["score"]})
        return kept

    def _place(self, entry: Mapping[str, Any]) -> dict[str, int] | None:
        image, category = entry["image_id"], entry["category_id"]
        if image not in self.of_image or category not in self.of_category:
            return None
        return {"image_id": self.of_image[image], "category_id": self.of_category[category]}
