"""What an evaluation has left in its folder, read again and judged: COCO's metrics and errors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.structures import Boxes, Instances

from ..config import get_config
from ..data import dataset_names
from ..errors import UserError
from ..program import command_line
from ..texts import parse_json, shown
from .errors import require_hotcoco
from .losses import VALIDATION
from .thresholds import Matches, sweep_thresholds

__all__ = [
    "DETECTIONS",
    "METRICS",
    "PREDICTIONS",
    "Comparison",
    "best_threshold",
    "coco_metrics",
    "coco_modules",
    "dataset_of",
    "evaluated_sets",
    "find_predictions",
    "ground_truth",
    "read_facts",
    "read_max_dets",
    "read_results",
    "read_stages",
    "read_validation_loss",
    "register_dataset",
    "run_coco",
]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
DETECTIONS = 100
"""Of an image and class, that count in COCO's metrics."""
_FEWER_DETECTIONS = (1, 10)
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
    found = evaluated_sets(output_dir)
    names = ", ".join(p.name for p in found)
    if dataset is not None:
        chosen = [p for p in found if p.name == dataset]
        if not chosen:
            raise FileNotFoundError(
                f"{output_dir}/inference has no results of {dataset} (there: {names or 'none'})"
            )
        return chosen[0]
    if not found:
        if runs := sorted(output_dir.glob("*/config.yaml")):
            names = ", ".join(shown(path.parent) for path in runs[:5])
            raise FileNotFoundError(
                f"{output_dir} is not the folder of a run; those in it are {names}"
            )
        raise FileNotFoundError(
            f"{output_dir} holds no evaluation: run `{command_line('eval')}` with "
            f"train.output_dir={output_dir} first"
        )
    if len(found) > 1:
        raise UserError(f"{output_dir} has results of {names}: choose one with --dataset")
    return found[0]


def evaluated_sets(output_dir: Path) -> list[Path]:
    """Folders with the results of a run, one for each test set."""
    return sorted(p.parent for p in output_dir.glob(f"inference/*/{PREDICTIONS}"))


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: the file is no JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
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


def read_validation_loss(folder: Path) -> dict[str, float] | None:
    """The losses of an evaluation, see :class:`LossEvaluator`; None where there are none."""
    results = _recorded(folder).get("results")
    return results.get(VALIDATION) if isinstance(results, dict) else None


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


def read_facts(output_dir: Path, folder: Path) -> dict[str, str | None]:
    """What was evaluated, as far as the run has written it down.

    Args:
        output_dir: of the run.
        folder: of the test set's results.

    Returns:
        "config": its name, with what the command line changed; "checkpoint"; "weights": "plain" or
        "averaged"; "date": of the evaluation. None for what is not known.
    """
    document = _recorded(folder)
    facts = {key: document.get(key) for key in ("checkpoint", "weights", "date")}
    return {"config": _read_config_name(output_dir), **facts}


def read_max_dets(folder: Path) -> int:
    """Detections of an image and class that counted in an evaluation."""
    try:
        return int(_recorded(folder)["max_dets_per_image"])
    except (KeyError, TypeError, ValueError):
        return DETECTIONS


def _recorded(folder: Path) -> dict[str, Any]:
    """What an evaluation wrote beside its detections; empty where nothing can be read."""
    try:
        document = parse_json((folder / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _read_config_name(output_dir: Path) -> str | None:
    """From the first line of the run's config, where :mod:`detection_toolkit.engine` puts it."""
    try:
        line = (output_dir / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
        return line[2:].encode("ascii").decode("unicode_escape") if line[:2] == "# " else None
    except (OSError, ValueError):
        return None


def register_dataset(output_dir: Path, name: str, *, trust_config: bool = False) -> None:
    """Make the data set known, by the config of the run where it is none of the built-in ones.

    Raises:
        ValueError: neither knows it, or the config has to be trusted.
    """
    config = output_dir / "config.yaml"
    # An evaluation of a run may have been on another test set than the run's.
    for path in (output_dir / "evaluation.yaml", config):
        if name not in DatasetCatalog.list() and path.is_file():
            cfg = get_config(str(path), trust_config=trust_config)
            dataset_names(cfg.dataloader.test.dataset)
    if name not in DatasetCatalog.list():
        raise UserError(f"data set {name} is not registered, and {config} does not describe it")


def dataset_of(output_dir: Path, name: str, *, trust_config: bool = False) -> str:
    """The catalogue name of a run's test set, which may be another than when it was evaluated.

    A number follows the name of a file where another data set had that name before: a training
    set in the process that evaluated, or another run's test set in this one.

    Args:
        output_dir: of the run.
        name: of the folder of the results.

    Raises:
        ValueError, FileNotFoundError: nothing describes the data set, or its files are gone.
    """
    if name in DatasetCatalog.list() and MetadataCatalog.get(name).get("source") is None:
        return name  # of no file that a config names: it is the same for all
    for file in ("evaluation.yaml", "config.yaml"):
        if (output_dir / file).is_file():
            cfg = get_config(str(output_dir / file), trust_config=trust_config)
            known = dataset_names(cfg.dataloader.test.dataset)
            if name in known:
                return name
            alike = [n for n in known if _without_number(n) == _without_number(name)]
            if len(alike) == 1:
                return alike[0]
    register_dataset(output_dir, name, trust_config=trust_config)
    return name


def _without_number(name: str) -> str:
    """See :func:`~detection_toolkit.data.register_coco_json`."""
    return re.sub(r"_[0-9a-f]{8}$", "", name)


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
    hotcoco = require_hotcoco()
    return hotcoco.COCO, hotcoco.COCOeval


def run_coco(
    truth_file: str, results: list[dict], backend: str, *, max_dets: int = DETECTIONS
) -> Any:
    """A ``COCOeval`` that has evaluated and accumulated.

    Args:
        truth_file: in COCO's format.
        results: the detections.
        backend: see :func:`coco_modules`.
        max_dets: so many detections of an image and class count, the best ones.

    Raises:
        MissingPackageError: the backend is not installed.
    """
    coco_class, eval_class = coco_modules(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class(truth_file)
        # loadRes changes the entries that it is given.
        evaluation = eval_class(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        # In order, as pycocotools puts them itself.
        evaluation.params.maxDets = sorted([*_FEWER_DETECTIONS, max_dets])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def coco_metrics(evaluation: Any, matches: Sequence[Matches]) -> dict[str, Any]:
    """COCO's metrics, overall and by class, precision-recall curves, and the best thresholds.

    Args:
        evaluation: by :func:`run_coco`.
        matches: of the same.
    """
    truth = evaluation.cocoGt
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # (T, R, K)
    by_size = np.asarray(evaluation.eval["precision"])[..., -1]  # (T, R, K, sizes)
    recall = np.asarray(evaluation.eval["recall"])  # (T, K, sizes, limits)
    names = [c["name"] for c in truth.loadCats(list(evaluation.params.catIds))]
    numbers = [len(truth.getAnnIds(catIds=[c])) for c in evaluation.params.catIds]
    by_class: dict[Any, list[Matches]] = {c: [] for c in evaluation.params.catIds}
    for match in matches:
        by_class[match.class_id].append(match)
    classes = []
    for k, (name, number) in enumerate(zip(names, numbers)):
        row = {"class": name, "objects": number}
        row["AP"], row["AP50"], row["AP75"] = (
            _mean(p) for p in (precision[:, :, k], precision[0, :, k], precision[5, :, k])
        )
        for size, key in enumerate(("APs", "APm", "APl"), start=1):
            row[key] = _mean(by_size[:, :, k, size])
        row["best_threshold"] = best_threshold(by_class[evaluation.params.catIds[k]])
        classes.append(row)
    curves = {}
    for label, part in (("IoU 0.50", precision[:1]), ("IoU 0.75", precision[5:6])):
        curves[label] = _curve(part)
    curves["mean over IoU 0.50 to 0.95"] = _curve(precision)
    sizes = range(1, by_size.shape[-1])
    limits = list(evaluation.params.maxDets)
    overall = [
        *map(_mean, (precision, precision[0], precision[5])),
        *(_mean(by_size[..., size]) for size in sizes),
        *(_mean(recall[..., 0, i]) for i in range(len(limits))),
        *(_mean(recall[..., size, -1]) for size in sizes),
    ]
    recalls = [*(f"AR{limit}" for limit in limits), "ARs", "ARm", "ARl"]
    return {
        "overall": dict(zip((*METRICS, *recalls), overall)),
        "classes": classes,
        "precision_recall": {k: v for k, v in curves.items() if v is not None},
        "best_threshold": best_threshold(matches),
    }


def best_threshold(matches: Sequence[Matches]) -> dict[str, float] | None:
    """The score threshold with the highest F1 at IoU 0.5, and precision and recall there."""
    curve = sweep_thresholds(matches)
    if curve.best is None:
        return None
    names = ("score", "precision", "recall", "f1")
    return dict(zip(names, (float(values[curve.best]) for values in curve)))


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

    def document(self) -> dict[str, Any]:
        """The objects as a plain COCO document whose ids count from 1."""
        images = {image_id: number for number, image_id in enumerate(self.image_ids, start=1)}
        annotations = []
        for image_id, entries in self.truth.items():
            for entry in entries:
                box = [float(x) for x in entry["bbox"]]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": images[image_id],
                        "category_id": self.index[entry["category_id"]] + 1,
                        "bbox": box,
                        "area": float(entry.get("area", box[2] * box[3])),
                        "iscrowd": int(entry.get("iscrowd", 0)),
                    }
                )
        return {
            "images": [{"id": number} for number in images.values()],
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in enumerate(self.names, start=1)],
        }

    def document_results(self) -> list[dict[str, Any]]:
        """The detections with the ids of :meth:`document`."""
        return [
            {
                "image_id": number,
                "category_id": self.index[result["category_id"]] + 1,
                "bbox": result["bbox"],
                "score": result["score"],
            }
            for number, image_id in enumerate(self.image_ids, start=1)
            for result in self.results[image_id]
        ]

    def instances(self, image_id: Any, shape: Sequence[int]) -> Instances:
        """Detections of one image for drawing."""
        boxes, classes = self.tensors(self.results[image_id])
        scores = torch.tensor([r["score"] for r in self.results[image_id]])
        return Instances(
            tuple(shape[:2]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
        )
