"""The report of a run: one HTML page without other files, and the numbers as JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import UnreadableImageError, read_image
from ..durable import write_text
from ..errors import MissingPackageError, UserError
from ..evaluation.errors import ErrorAnalysis, analyze_errors
from ..evaluation.results import (
    METRICS,
    PREDICTIONS,
    Comparison,
    coco_metrics,
    coco_modules,
    dataset_of,
    find_predictions,
    ground_truth,
    read_facts,
    read_max_dets,
    read_results,
    read_stages,
    read_validation_loss,
    run_coco,
)
from ..evaluation.thresholds import (
    judge_images,
    match_by_class,
    sample_thresholds,
    summarize_images,
)
from . import report_charts as charts
from .curves import read_metrics
from .pictures import DEFAULT_SCORE_THRESHOLD, draw_detections, draw_ground_truth, side_by_side
from .report_words import describe

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

_EVALUATIONS, _CONFUSIONS = 10, 8  # rows of the tables beside charts


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
    output_dir: Path, numbers: dict[str, Any], analysis: ErrorAnalysis | None, examples: dict
) -> str:
    """The page, from the numbers of report.json and the drawn examples."""
    sections = [
        ("Summary", _summary(output_dir, numbers)),
        ("Training", _training(output_dir / "metrics.json", numbers["dataset"])),
        ("Stages", _stages(numbers["stages"])),
        ("Classes and sizes", _classes(numbers["coco"])),
        ("Scores", _scores(numbers, analysis)),
        ("Errors", _errors(numbers, analysis)),
    ]
    for key, heading in (("worst", "Worst images"), ("best", "Best images")):
        none = [("text", "None: no image has an error." if key == "worst" else "None.")]
        sections.append((heading, examples[key] or none))
    return charts.render_page(f"Report: {output_dir.resolve().name}", sections)


def _summary(output_dir: Path, numbers: dict[str, Any]) -> list[charts.Part]:
    coco = numbers["coco"]
    weights = numbers["checkpoint"] or "not written down"
    if numbers["weights"] is not None:
        weights += f" (the {numbers['weights']} ones)"
    facts = {
        "config": numbers["config"] or str(output_dir / "config.yaml"),
        "weights": weights,
        "data": f"{numbers['dataset']}: {numbers['images']} images, {numbers['objects']} objects, "
        f"{numbers['detections']} detections",
        "evaluated": (numbers["date"] or "at a time not written down").replace("T", " "),
        "metrics": f"COCO's, by {numbers['backend']}; errors, confusion, calibration by hotcoco",
    }
    table = charts.format_table(list(coco["overall"]), [list(coco["overall"].values())])
    table = table.replace("<td>", "<td style='text-align:right'>", 1)
    table = table.replace("<th>", "<th style='text-align:right'>", 1)
    return [("html", charts.format_facts(facts)), ("words", describe(numbers)), ("html", table)]


def _training(metrics_file: Path, dataset: str) -> list[charts.Part]:
    drawn, rows = {}, []
    if metrics_file.is_file():
        series = read_metrics(metrics_file)
        # With several test sets the names of metrics begin with the set's.
        prefix = next((p for p in ("bbox/", f"{dataset}/bbox/") if f"{p}AP" in series), "bbox/")
        drawn = charts.training_charts(metrics_file, prefix)
        values = {m: dict(zip(*series.get(prefix + m, ((), ())))) for m in METRICS[:3]}
        rows = [[int(i), *(values[m].get(i) for m in values)] for i in values["AP"]]
    if not drawn:
        return [("text", "No training was recorded in this folder.")]
    parts: list[charts.Part] = [("image", drawn["loss"])] if "loss" in drawn else []
    if len(rows) == 1:
        parts.append(("html", charts.format_table(["iteration", *METRICS[:3]], rows)))
    elif "AP" in drawn:
        note = f"The last {_EVALUATIONS} evaluations." if len(rows) > _EVALUATIONS else ""
        table = charts.format_table(["iteration", *METRICS[:3]], rows[-_EVALUATIONS:])
        beside: list[charts.Part] = [("html", table)]
        parts.append(("row", [[("image", drawn["AP"])], beside + [("text", note)] * bool(note)]))
    return parts


def _stages(stages: dict[str, Any] | None) -> list[charts.Part]:
    if stages is None:
        return [
            ("text", "Not evaluated by stage: evaluate again with train.stage_evaluation=true.")
        ]
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
    duplicates = (
        f"Duplicates: of the detections scoring {stages['duplicate_score_threshold']:g} or more, "
        "those that overlap a better one of their class with IoU above "
        f"{stages['duplicate_iou']:g}; NMS is at the same IoU."
    )
    fading = (
        "A true positive of the last stage fades if an earlier stage gave the same query a higher "
        "score and a better box; a false positive grows if an earlier stage scored it lower (a "
        "diagnosis that comes with query recollection)."
    )
    labels = (
        "Queries whose class target changes from a stage to the next, among those that have one in "
        "either."
    )
    shares = ("share_of_labelled", "share_of_queries")
    changes = charts.format_table(
        ["labels by", "of queries with a label", "of all queries"],
        [
            [charts.LABEL_ASSIGNERS.get(name, name)]
            + [None if entry[s] is None else 100 * entry[s] for s in shares]
            for name, entry in stages["label_changes"].items()
        ],
    )
    return [
        ("html", table),
        ("text", duplicates),
        (
            "row",
            [
                [
                    ("heading", "AP by stage"),
                    ("image", charts.chart_stages(stages["stages"], nms)),
                ],
                [
                    ("heading", "Fading and growing"),
                    ("image", charts.chart_score_changes(stages["score_changes"])),
                    ("text", fading),
                ],
            ],
        ),
        (
            "row",
            [
                [
                    ("heading", "Label instability"),
                    ("image", charts.chart_label_changes(stages["label_changes"])),
                ],
                [("heading", "Changes, %"), ("html", changes), ("text", labels)],
            ],
        ),
    ]


def _classes(coco: dict[str, Any]) -> list[charts.Part]:
    names = [row["class"] for row in coco["classes"]]
    ap = charts.chart_classes(names, [row["AP"] for row in coco["classes"]])
    curves = {k: np.array(v) for k, v in coco["precision_recall"].items()}
    recall = charts.chart_precision_recall(np.linspace(0, 1, 101), curves)
    header = ["class", "objects", *METRICS]
    table = charts.format_table(header, [[row[h] for h in header] for row in coco["classes"]])
    return [
        (
            "row",
            [
                [("heading", "AP by class"), ("image", ap)],
                [("heading", "Precision and recall"), ("image", recall)],
            ],
        ),
        ("html", table),
    ]


def _scores(numbers: dict[str, Any], analysis: ErrorAnalysis | None) -> list[charts.Part]:
    coco = numbers["coco"]
    best = {
        row["class"]: row["best_threshold"]
        for row in coco["classes"]
        if row["best_threshold"] is not None
    }
    chart = charts.chart_thresholds(numbers["thresholds"], coco["best_threshold"])
    thresholds: list[charts.Part] = [("heading", "Best score threshold"), ("image", chart)]
    calibration: list[charts.Part] = [("heading", "Calibration")]
    if analysis is None:
        calibration.append(("text", numbers["errors_missing"]))
    else:
        note = (
            f"Expected calibration error {analysis.calibration_error:.3f}, over all detections, "
            "most of which score low; a true positive has IoU 0.5."
        )
        calibration += [
            ("image", charts.chart_calibration(analysis.calibration)),
            ("text", note),
        ]
    rows = [
        [name, *(f"{values[key]:.3f}" for key in ("score", "precision", "recall", "f1"))]
        for name, values in [*best.items(), ("all classes", coco["best_threshold"])]
        if values is not None
    ]
    note = (
        "The score threshold with the highest F1, at IoU 0.5: of each class by itself, and of "
        "all classes together."
    )
    return [
        ("row", [thresholds, calibration]),
        ("text", note),
        ("html", charts.format_table(["class", "threshold", "precision", "recall", "F1"], rows)),
    ]


def _errors(numbers: dict[str, Any], analysis: ErrorAnalysis | None) -> list[charts.Part]:
    if analysis is None:
        return [("text", numbers["errors_missing"])]
    names = [row["class"] for row in numbers["coco"]["classes"]]
    threshold = numbers["score_threshold"]
    note = (
        f"Kinds of errors as TIDE defines them, at IoU 0.5. Left: of all detections, AP50 "
        f"{analysis.ap50:.1f}; right: of detections scoring {threshold:g} or more, "
        f"{sum(analysis.counts.values())} errors."
    )
    confusions = _confusions(analysis.confusion, names)
    beside = charts.format_table(["object", "detected as", "times"], confusions[:_CONFUSIONS])
    confusion = charts.chart_confusion(analysis.confusion, names)
    return [
        ("text", note),
        ("image", charts.chart_error_gains(analysis.gains, analysis.counts)),
        ("heading", "Confusion"),
        ("text", f"Detections scoring {threshold:g} or more, matched at IoU 0.5."),
        (
            "row",
            [
                [("image", confusion)],
                [("html", beside)] if confusions else [("text", "No class is taken for another.")],
            ],
        ),
    ]


def _confusions(matrix: np.ndarray, names: Sequence[str]) -> list[list[Any]]:
    """Pairs of classes that are taken for one another, most frequent first."""
    pairs = [
        [names[row], names[column], int(matrix[row, column])]
        for row, column in np.argwhere(matrix[:-1, :-1])
        if row != column
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


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
    trust_config: bool = False,
) -> list[Path]:
    """Write report.html and report.json of a run into its folder.

    Args:
        output_dir: train.output_dir of the run.
        dataset: test set, where the run was evaluated on several.
        score_threshold: of the detections that errors, confusion and images are about.
        num_images: so many best and worst ones are drawn.
        backend: what computes COCO's metrics, pycocotools or hotcoco.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

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
    known = dataset_of(output_dir, name, trust_config=trust_config)
    max_dets = read_max_dets(folder)
    with ground_truth(known) as truth_file:
        comparison = Comparison(truth_file, results)
        num_objects = sum(map(len, comparison.truth.values()))
        if not num_objects:
            raise UserError(f"data set {name} has no annotated objects to compare with")
        evaluation = run_coco(truth_file, results, backend, max_dets=max_dets)
    matches = match_by_class(evaluation)
    coco = coco_metrics(evaluation, matches)
    images = summarize_images(
        judge_images(matches, comparison.image_ids, threshold=score_threshold), num_images
    )
    examples = {
        key: draw_examples(comparison, known, chosen, score_threshold)
        for key, chosen in images.items()
    }
    analysis, missing = None, None
    try:
        analysis = analyze_errors(
            comparison.document(),
            comparison.document_results(),
            threshold=score_threshold,
            max_dets=max_dets,
        )
    except MissingPackageError as error:
        missing = f"Left out: {error}"
        logger.warning("errors, confusion and calibration are left out of the report: %s", error)
    numbers = {
        "dataset": name,
        **read_facts(output_dir, folder),
        "images": len(comparison.image_ids),
        "objects": num_objects,
        "detections": len(results),
        "backend": backend,
        "max_dets_per_image": max_dets,
        "coco": coco,
        "thresholds": sample_thresholds(matches),
        "stages": stages,
        "validation_loss": read_validation_loss(folder),
        "score_threshold": score_threshold,
        "errors": analysis and analysis.counts,
        "errors_missing": missing,
        "ap50": analysis and analysis.ap50,
        "ap50_gains": analysis and analysis.gains,
        "confusion": analysis and analysis.confusion.tolist(),
        "calibration": analysis and analysis.calibration,
        "calibration_error": analysis and analysis.calibration_error,
        "best_images": images["best"],
        "worst_images": images["worst"],
    }
    text = build_page(output_dir, numbers, analysis, examples)
    document = json.dumps(_finite(numbers), indent=1, allow_nan=False)
    written = {"report.html": text, "report.json": document}
    for file_name, content in written.items():
        write_text(output_dir / file_name, content)
    return [output_dir / file_name for file_name in written]
