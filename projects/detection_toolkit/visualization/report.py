#!/usr/bin/env python3
"""Judge a trained detector: one HTML page without other files, and the numbers as JSON.

    python train_net.py --config-file stageinteractor/shapes_tiny.py --eval-only \\
        train.init_checkpoint=checkpoints/shapes_tiny.pth train.output_dir=output/judged \\
        train.stage_evaluation=true
    python tools/report.py output/judged

reads what training (metrics.json) and evaluation (inference/DATA SET/) left in the folder, and
writes report.html and report.json there. Without train.stage_evaluation=true the parts about
single stages are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from detection_toolkit.checkpoint.durable import write_durably
from detection_toolkit.data import UnreadableImageError, dataset_names, read_image
from detection_toolkit.engine import user_errors
from detection_toolkit.errors import MissingPackageError, UserError
from detection_toolkit.evaluation.errors import (
    ErrorAnalysis,
    Judged,
    analyze_errors,
    judge_image,
    summarize_images,
)
from detection_toolkit.visualization import draw_detections, draw_ground_truth, side_by_side
from detection_toolkit.visualization import report as page

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


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="train.output_dir of the run")
    parser.add_argument("--dataset", help="test set, where inference/ has several")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        help="of the detections that errors, confusion and images are about (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=4, help="so many best and worst ones (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "hotcoco"),
        default="pycocotools",
        help="what computes COCO's metrics; hotcoco is to be installed (default: %(default)s)",
    )
    return parser


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


def register(output_dir: Path, name: str) -> None:
    """Make the data set known, by the config of the run where it is none of the built-in ones.

    Raises:
        ValueError: neither knows it.
    """
    config = output_dir / "config.yaml"
    if name not in DatasetCatalog.list() and config.is_file():
        dataset_names(LazyConfig.load(str(config)).dataloader.test.dataset)
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


def draw_examples(
    comparison: Comparison, name: str, chosen: Sequence[dict], threshold: float
) -> list[tuple[str, str]]:
    """Detections beside the ground truth, as parts of the page."""
    records = {r["image_id"]: r for r in DatasetCatalog.get(name)}
    metadata = MetadataCatalog.get(name)
    parts = []
    for entry in chosen:
        record = records[entry["image_id"]]
        title = (
            f"{Path(record['file_name']).name}: F1 {entry['f1']:.2f}, {entry['true_positives']} "
            f"right, {entry['false_positives']} wrong, {entry['missed']} missed"
        )
        parts.append(("text", title))
        try:
            image = read_image(record["file_name"])
        except UnreadableImageError as error:
            parts.append(("text", str(error)))
            continue
        found = comparison.instances(entry["image_id"], image.shape)
        drawn = [
            draw_detections(image, found, metadata, threshold=threshold),
            draw_ground_truth(record, metadata, image=image),
        ]
        pair = side_by_side(drawn, ["detections", "ground truth"])
        parts.append(("image", page.embed_picture(pair)))
    return parts


def build_page(
    args: argparse.Namespace, numbers: dict[str, Any], analysis: ErrorAnalysis, examples: dict
) -> str:
    """The page, from the numbers of report.json and the drawn examples."""
    coco, stages = numbers["coco"], numbers["stages"]
    names = [row["class"] for row in coco["classes"]]
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    facts = (
        f"{numbers['dataset']}: {numbers['images']} images, {numbers['objects']} objects, "
        f"{numbers['detections']} detections. COCO's metrics by {args.backend}."
    )
    overall = page.format_table(
        list(coco["overall"]), [[v for v in coco["overall"].values()]]
    ).replace("<td>", "<td style='text-align:right'>")
    sections.append(("Metrics", [("text", facts), ("html", overall)]))

    prefix = "bbox/"
    metrics_file = args.output_dir / "metrics.json"
    charts = page.training_charts(metrics_file, prefix) if metrics_file.is_file() else []
    if not charts:
        note = "No training was recorded in this folder."
        sections.append(("Training", [("text", note)]))
    else:
        sections.append(("Training", [("image", chart) for chart in charts]))

    if stages is None:
        note = "Not evaluated by stage: evaluate again with train.stage_evaluation=true."
        sections.append(("Stages", [("text", note)]))
    else:
        nms, last = stages["last_stage_after_nms"], stages["stages"][-1]["stage"]
        rows = [
            [
                s["stage"],
                *(s.get(m) for m in METRICS),
                s.get("detections"),
                None if s.get("duplicates") is None else 100 * s["duplicates"],
            ]
            for s in [*stages["stages"], {"stage": f"{last} + NMS", **nms}]
        ]
        table = page.format_table(["stage", *METRICS, "detections", "duplicates, %"], rows)
        note = (
            f"Duplicates: of the detections scoring {stages['duplicate_score_threshold']:g} or "
            f"more, those that overlap a better one of their class with IoU above "
            f"{stages['duplicate_iou']:g}; NMS is at the same IoU."
        )
        parts = [("html", table), ("text", note)]
        parts.append(("image", page.chart_stages(stages["stages"], nms)))
        sections.append(("Stages", parts))
        note = (
            "A true positive of the last stage fades if an earlier stage gave the same query a "
            "higher score and a better box; a false positive grows if an earlier stage scored it "
            "lower (as SQR introduced)."
        )
        chart = page.chart_score_changes(stages["score_changes"])
        sections.append(("Fading and growing", [("text", note), ("image", chart)]))
        note = (
            "Queries whose class target changes from a stage to the next, among those that have "
            "one in either."
        )
        chart = page.chart_label_changes(stages["label_changes"])
        sections.append(("Label instability", [("text", note), ("image", chart)]))

    header = ["class", "objects", *METRICS]
    table = page.format_table(header, [[row[h] for h in header] for row in coco["classes"]])
    chart = page.chart_classes(names, [row["AP"] for row in coco["classes"]])
    sections.append(("Classes and sizes", [("image", chart), ("html", table)]))
    curves = {k: np.array(v) for k, v in coco["precision_recall"].items()}
    chart = page.chart_precision_recall(np.linspace(0, 1, 101), curves)
    sections.append(("Precision and recall", [("image", chart)]))
    note = (
        f"Kinds of errors as in TIDE, at IoU 0.5. Left: of all detections, AP50 "
        f"{analysis.ap50:.1f}; right: of detections scoring {args.score_threshold:g} or more, "
        f"{sum(analysis.counts.values())} errors."
    )
    chart = page.chart_error_gains(analysis.gains, analysis.counts)
    sections.append(("Errors", [("text", note), ("image", chart)]))
    note = f"Detections scoring {args.score_threshold:g} or more, matched at IoU 0.5."
    chart = page.chart_confusion(analysis.confusion, names)
    sections.append(("Confusion", [("text", note), ("image", chart)]))
    note = (
        f"Expected calibration error {analysis.calibration_error:.3f}, over all detections, most "
        "of which score low; a true positive has IoU 0.5."
    )
    chart = page.chart_calibration(analysis.calibration)
    sections.append(("Calibration", [("text", note), ("image", chart)]))
    for key, heading in (("worst", "Worst images"), ("best", "Best images")):
        none = [("text", "None: no image has an error." if key == "worst" else "None.")]
        sections.append((heading, examples[key] or none))
    return page.render_page(f"Report: {args.output_dir.resolve().name}", sections)


def _finite(value: Any) -> Any:
    """The same without NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(args: argparse.Namespace) -> list[Path]:
    """Write the report; returns the paths.

    Raises:
        ValueError, FileNotFoundError: there is nothing to report, or it is damaged.
    """
    folder = find_predictions(args.output_dir, args.dataset)
    coco_modules(args.backend)
    results = read_results(folder / PREDICTIONS)
    stages = read_stages(folder / "stage_metrics.json")
    name = folder.name
    register(args.output_dir, name)
    with ground_truth(name) as truth_file:
        comparison = Comparison(truth_file, results)
        num_objects = sum(map(len, comparison.truth.values()))
        if not num_objects:
            raise UserError(f"data set {name} has no annotated objects to compare with")
        # loadRes changes the entries that it is given.
        coco = coco_metrics(truth_file, [dict(r) for r in results], args.backend)
    analysis = analyze_errors(
        comparison.judge(), num_classes=len(comparison.names), threshold=args.score_threshold
    )
    images = summarize_images(analysis, args.images)
    examples = {
        key: draw_examples(comparison, name, chosen, args.score_threshold)
        for key, chosen in images.items()
    }
    numbers = {
        "dataset": name,
        "images": len(comparison.image_ids),
        "objects": num_objects,
        "detections": len(results),
        "backend": args.backend,
        "coco": coco,
        "stages": stages,
        "score_threshold": args.score_threshold,
        "errors": analysis.counts,
        "ap50": analysis.ap50,
        "ap50_gains": analysis.gains,
        "confusion": analysis.confusion.tolist(),
        "calibration": analysis.calibration,
        "calibration_error": analysis.calibration_error,
        "duplicates": analysis.duplicates / max(1, analysis.detections),
        "best_images": images["best"],
        "worst_images": images["worst"],
    }
    text = build_page(args, numbers, analysis, examples)
    document = json.dumps(_finite(numbers), indent=1, allow_nan=False)
    written = {"report.html": text, "report.json": document}
    for file_name, content in written.items():
        write_durably(
            args.output_dir / file_name, lambda file, c=content: file.write(c.encode("utf-8"))
        )
    return [args.output_dir / file_name for file_name in written]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = get_parser().parse_args(argv)
    with user_errors():
        for path in run(args):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
