"""What an evaluation has left in its folder, read again and judged: COCO's metrics and errors."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from ..config import get_config
from ..data import dataset_names
from ..errors import MissingPackageError, UserError
from .errors import Judged, judge_image

__all__ = [
    "METRICS",
    "PREDICTIONS",
    "Comparison",
    "coco_metrics",
    "coco_modules",
    "find_predictions",
    "ground_truth",
    "read_results",
    "read_stages",
    "read_weights",
    "register_dataset",
]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PREDICTIONS = "coco_instances_results.json"
STAGE_KEYS = {
    "stages",
    "last_stage_after_nms",
    "score_changes",
    "label_changes",
    "duplicate_iou",
    "duplicate_score_threshold",
}


def find_predictions(output_dir: Path, dataset: str | None) -> Path:
    """The folder of a test set's results.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: it has several, and no name was given.
    """
    if not output_dir.is_dir():
        raise FileNotFoundError(f"no folder {output_dir}: name the train.output_dir of a run")
    found = sorted(p.parent for p in output_dir.glob(f"inference/*/{PREDICTIONS}"))
    names = ", ".join(p.name for p in found)
    if dataset is not None:
        chosen = [p for p in found if p.name == dataset]
        if not chosen:
            raise FileNotFoundError(
                f"{output_dir}/inference has no results of {dataset} (there: {names or 'none'})"
            )
        return chosen[0]
    if not found:
        raise FileNotFoundError(
            f"{output_dir} holds no evaluation: run train_net.py --eval-only with "
            f"train.output_dir={output_dir} first"
        )
    if len(found) > 1:
        raise UserError(f"{output_dir} has results of {names}: choose one with --dataset")
    return found[0]


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: the file is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again") from error


def read_results(path: Path) -> list[dict]:
    """Detections in COCO's format.

    Raises:
        ValueError: the file holds something else, or nothing.
    """
    results = read_json(path)
    if results == []:
        raise UserError(f"{path} is empty: the detector found nothing")
    if not isinstance(results, list) or not all(map(_is_detection, results)):
        raise UserError(
            f"{path} is no list of detections, each with image_id, category_id, bbox and score: "
            "evaluate again"
        )
    return results


def _is_detection(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"image_id", "category_id"} <= entry.keys():
        return False
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in (*box, entry.get("score")))


def read_stages(path: Path) -> dict[str, Any] | None:
    """What an evaluation by stage wrote; None where there was none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return None
    stages = read_json(path)
    if not isinstance(stages, dict) or not stages.keys() >= STAGE_KEYS:
        raise UserError(f"{path} is no evaluation by stage: evaluate again")
    return stages


def read_weights(folder: Path) -> str | None:
    """Whether an evaluation was of "plain" or "averaged" weights; None where it did not say."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def register_dataset(output_dir: Path, name: str) -> None:
    """Make the data set known, by the config of the run where it is none of the built-in ones.

    Raises:
        ValueError: neither knows it.
    """
    config = output_dir / "config.yaml"
    # An evaluation of a run may have been on another test set than the run's.
    for path in (output_dir / "evaluation.yaml", config):
        if name not in DatasetCatalog.list() and path.is_file():
            dataset_names(get_config(str(path)).dataloader.test.dataset)
    if name not in DatasetCatalog.list():
        raise UserError(f"data set {name} is not registered, and {config} does not describe it")


@contextlib.contextmanager
def ground_truth(name: str) -> Iterator[str]:
    """COCO-format JSON of a data set, as Detectron2's evaluator uses it."""
    DatasetCatalog.get(name)  # the built-in data are generated on first use
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        yield metadata.json_file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "ground_truth.json"))
        convert_to_coco_json(name, path)
        yield path


def coco_modules(backend: str) -> tuple[Any, Any]:
    """COCO and COCOeval of a library.

    Raises:
        ImportError: it is not installed.
    """
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        hotcoco = importlib.import_module("hotcoco")
    except ImportError as error:
        raise MissingPackageError("hotcoco is not installed: pip install hotcoco") from error
    return hotcoco.COCO, hotcoco.COCOeval


def coco_metrics(truth_file: str, results: list[dict], backend: str) -> dict[str, Any]:
    """COCO's metrics, overall and by class, and precision-recall curves."""
    coco_class, eval_class = coco_modules(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class(truth_file)
        evaluation = eval_class(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (T, R, K)
    by_size = np.asarray(evaluation.eval["precision"])[..., -1]  # (T, R, K, sizes)
    names = [c["name"] for c in truth.loadCats(list(evaluation.params.catIds))]
    numbers = [len(truth.getAnnIds(catIds=[c])) for c in evaluation.params.catIds]
    classes = []
    for k, (name, number) in enumerate(zip(names, numbers)):
        row = {"class": name, "objects": number}
        row["AP"], row["AP50"], row["AP75"] = (
            _mean(p) for p in (precision[:, :, k], precision[0, :, k], precision[5, :, k])
        )
        for size, key in enumerate(("APs", "APm", "APl"), start=1):
            row[key] = _mean(by_size[:, :, k, size])
        classes.append(row)
    curves = {}
    for label, part in (("IoU 0.50", precision[:1]), ("IoU 0.75", precision[5:6])):
        curves[label] = _curve(part)
    curves["mean over IoU 0.50 to 0.95"] = _curve(precision)
    stats = [None if s < 0 else 100 * float(s) for s in evaluation.stats]
    return {
        "overall": dict(zip((*METRICS, *RECALLS), stats)),
        "classes": classes,
        "precision_recall": {k: v for k, v in curves.items() if v is not None},
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def _curve(precision: np.ndarray) -> list[float] | None:
    """(T, 101, K) -> 101 means; classes without objects are -1."""
    valid = precision[:, :, (precision > -1).all((0, 1))]
    return valid.mean((0, 2)).tolist() if valid.size else None


class Comparison:
    """Detections and objects of a data set, side by side by image."""

    def __init__(self, truth_file: str, results: list[dict]):
        """
        Raises:
            ValueError: the detections are of images or classes that the data set does not have.
        """
        document = json.loads(Path(truth_file).read_text(encoding="utf-8"))
        categories = sorted(document["categories"], key=lambda c: c["id"])
        self.names = [c["name"] for c in categories]
        self.index = {c["id"]: i for i, c in enumerate(categories)}
        self.image_ids = [image["id"] for image in document["images"]]
        self.truth: dict[Any, list[dict]] = {i: [] for i in self.image_ids}
        for annotation in document.get("annotations", []):
            if not annotation.get("ignore", 0):
                self.truth[annotation["image_id"]].append(annotation)
        self.results: dict[Any, list[dict]] = {i: [] for i in self.image_ids}
        for result in results:
            if result["image_id"] not in self.results or result["category_id"] not in self.index:
                raise UserError(
                    f"a detection of image {result['image_id']} and category "
                    f"{result['category_id']} does not belong to {truth_file}: evaluate again"
                )
            self.results[result["image_id"]].append(result)

    def tensors(self, entries: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """(X, 4) ``xyxy`` and (X,) classes."""
        boxes = torch.tensor([e["bbox"] for e in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = [self.index[e["category_id"]] for e in entries]
        return boxes, torch.tensor(classes, dtype=torch.long)

    def judge(self) -> Iterator[tuple[Any, Judged]]:
        """Every image, judged."""
        for image_id in tqdm(self.image_ids, "errors", unit=" images", disable=None):
            boxes, classes = self.tensors(self.results[image_id])
            scores = torch.tensor([r["score"] for r in self.results[image_id]])
            truth_boxes, truth_classes = self.tensors(self.truth[image_id])
            crowd = [bool(a.get("iscrowd", 0)) for a in self.truth[image_id]]
            crowd = torch.tensor(crowd, dtype=torch.bool)
            yield (
                image_id,
                judge_image(boxes, scores, classes, truth_boxes, truth_classes, crowd),
            )

    def instances(self, image_id: Any, shape: Sequence[int]) -> Instances:
        """Detections of one image for drawing."""
        boxes, classes = self.tensors(self.results[image_id])
        scores = torch.tensor([r["score"] for r in self.results[image_id]])
        return Instances(
            tuple(shape[:2]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
        )
