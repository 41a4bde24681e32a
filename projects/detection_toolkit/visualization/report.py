"""The report of a run: one HTML page without other files, and the numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..checkpoint.durable import write_durably
from ..data import UnreadableImageError, read_image
from ..errors import UserError
from ..evaluation.errors import ErrorAnalysis, analyze_errors, summarize_images
from ..evaluation.results import (
    METRICS,
    PREDICTIONS,
    Comparison,
    coco_metrics,
    coco_modules,
    find_predictions,
    ground_truth,
    read_results,
    read_stages,
    read_weights,
    register_dataset,
)
from . import report_charts as charts
from .pictures import DEFAULT_SCORE_THRESHOLD, draw_detections, draw_ground_truth, side_by_side

__all__ = ["write_report"]


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
        parts.append(("image", charts.embed_picture(pair)))
    return parts


def build_page(
    output_dir: Path, numbers: dict[str, Any], analysis: ErrorAnalysis, examples: dict
) -> str:
    """The page, from the numbers of report.json and the drawn examples."""
    coco, stages = numbers["coco"], numbers["stages"]
    threshold = numbers["score_threshold"]
    names = [row["class"] for row in coco["classes"]]
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    facts = (
        f"{numbers['dataset']}: {numbers['images']} images, {numbers['objects']} objects, "
        f"{numbers['detections']} detections. COCO's metrics by {numbers['backend']}."
    )
    if numbers["weights"] is not None:
        facts += f" Of the {numbers['weights']} weights."
    overall = charts.format_table(
        list(coco["overall"]), [[v for v in coco["overall"].values()]]
    ).replace("<td>", "<td style='text-align:right'>")
    sections.append(("Metrics", [("text", facts), ("html", overall)]))

    prefix = "bbox/"
    metrics_file = output_dir / "metrics.json"
    drawn = charts.training_charts(metrics_file, prefix) if metrics_file.is_file() else []
    if not drawn:
        note = "No training was recorded in this folder."
        sections.append(("Training", [("text", note)]))
    else:
        sections.append(("Training", [("image", chart) for chart in drawn]))

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
        table = charts.format_table(["stage", *METRICS, "detections", "duplicates, %"], rows)
        note = (
            f"Duplicates: of the detections scoring {stages['duplicate_score_threshold']:g} or "
            f"more, those that overlap a better one of their class with IoU above "
            f"{stages['duplicate_iou']:g}; NMS is at the same IoU."
        )
        parts = [("html", table), ("text", note)]
        parts.append(("image", charts.chart_stages(stages["stages"], nms)))
        sections.append(("Stages", parts))
        note = (
            "A true positive of the last stage fades if an earlier stage gave the same query a "
            "higher score and a better box; a false positive grows if an earlier stage scored it "
            "lower (a diagnosis that comes with query recollection)."
        )
        chart = charts.chart_score_changes(stages["score_changes"])
        sections.append(("Fading and growing", [("text", note), ("image", chart)]))
        note = (
            "Queries whose class target changes from a stage to the next, among those that have "
            "one in either."
        )
        chart = charts.chart_label_changes(stages["label_changes"])
        sections.append(("Label instability", [("text", note), ("image", chart)]))

    header = ["class", "objects", *METRICS]
    table = charts.format_table(header, [[row[h] for h in header] for row in coco["classes"]])
    chart = charts.chart_classes(names, [row["AP"] for row in coco["classes"]])
    sections.append(("Classes and sizes", [("image", chart), ("html", table)]))
    curves = {k: np.array(v) for k, v in coco["precision_recall"].items()}
    chart = charts.chart_precision_recall(np.linspace(0, 1, 101), curves)
    sections.append(("Precision and recall", [("image", chart)]))
    note = (
        f"Kinds of errors as in TIDE, at IoU 0.5. Left: of all detections, AP50 "
        f"{analysis.ap50:.1f}; right: of detections scoring {threshold:g} or more, "
        f"{sum(analysis.counts.values())} errors."
    )
    chart = charts.chart_error_gains(analysis.gains, analysis.counts)
    sections.append(("Errors", [("text", note), ("image", chart)]))
    note = f"Detections scoring {threshold:g} or more, matched at IoU 0.5."
    chart = charts.chart_confusion(analysis.confusion, names)
    sections.append(("Confusion", [("text", note), ("image", chart)]))
    note = (
        f"Expected calibration error {analysis.calibration_error:.3f}, over all detections, most "
        "of which score low; a true positive has IoU 0.5."
    )
    chart = charts.chart_calibration(analysis.calibration)
    sections.append(("Calibration", [("text", note), ("image", chart)]))
    for key, heading in (("worst", "Worst images"), ("best", "Best images")):
        none = [("text", "None: no image has an error." if key == "worst" else "None.")]
        sections.append((heading, examples[key] or none))
    return charts.render_page(f"Report: {output_dir.resolve().name}", sections)


def _finite(value: Any) -> Any:
    """The same without NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(
    output_dir: Path,
    *,
    dataset: str | None = None,
    score_threshold: float = DEFAULT_SCORE_THRESHOLD,
    num_images: int = 4,
    backend: str = "pycocotools",
) -> list[Path]:
    """Write report.html and report.json of a run into its folder.

    Args:
        output_dir: train.output_dir of the run.
        dataset: test set, where the run was evaluated on several.
        score_threshold: of the detections that errors, confusion and images are about.
        num_images: so many best and worst ones are drawn.
        backend: what computes COCO's metrics, pycocotools or hotcoco.

    Returns:
        the paths.

    Raises:
        UserError, FileNotFoundError: there is nothing to report, or it is damaged.
    """
    folder = find_predictions(output_dir, dataset)
    coco_modules(backend)  # or say now that it is missing
    results = read_results(folder / PREDICTIONS)
    stages = read_stages(folder / "stage_metrics.json")
    name = folder.name
    register_dataset(output_dir, name)
    with ground_truth(name) as truth_file:
        comparison = Comparison(truth_file, results)
        num_objects = sum(map(len, comparison.truth.values()))
        if not num_objects:
            raise UserError(f"data set {name} has no annotated objects to compare with")
        # loadRes changes the entries that it is given.
        coco = coco_metrics(truth_file, [dict(r) for r in results], backend)
    analysis = analyze_errors(
        comparison.judge(), num_classes=len(comparison.names), threshold=score_threshold
    )
    images = summarize_images(analysis, num_images)
    examples = {
        key: draw_examples(comparison, name, chosen, score_threshold)
        for key, chosen in images.items()
    }
    numbers = {
        "dataset": name,
        "weights": read_weights(folder),
        "images": len(comparison.image_ids),
        "objects": num_objects,
        "detections": len(results),
        "backend": backend,
        "coco": coco,
        "stages": stages,
        "score_threshold": score_threshold,
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
    text = build_page(output_dir, numbers, analysis, examples)
    document = json.dumps(_finite(numbers), indent=1, allow_nan=False)
    written = {"report.html": text, "report.json": document}
    for file_name, content in written.items():
        write_durably(output_dir / file_name, lambda file, c=content: file.write(c.encode("utf-8")))
    return [output_dir / file_name for file_name in written]
