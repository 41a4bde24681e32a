"""The numbers of a report in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe"]

_LOSSES = {
    "classification": "wrong classes",
    "localisation": "boxes that are badly placed",
    "both": "detections of a wrong class and badly placed",
    "duplicate": "duplicates",
    "background": "detections where nothing is",
    "missed": "missed objects",
}


def describe(numbers: Mapping[str, Any]) -> str:
    """A paragraph about the numbers of ``report.json``: how good, where, and what costs most."""
    coco = numbers["coco"]
    overall, classes = coco["overall"], coco["classes"]
    of_weights = f"the {numbers['weights']} weights have" if numbers["weights"] else "there is"
    sentences = [
        f"On {_count(numbers['images'], 'image')} of {numbers['dataset']} with "
        f"{_count(numbers['objects'], 'object')} of {_count(len(classes), 'class')}, {of_weights} "
        f"an AP of {_points(overall['AP'])}: {_points(overall['AP50'])} where half of a box has to "
        f"overlap (AP50), {_points(overall['AP75'])} where three quarters have to (AP75)."
    ]
    best = coco["best_threshold"]
    if best is not None:
        sentences.append(
            f"If one score threshold serves all classes, {best['score']:.2f} suits best: of the "
            f"objects {_percent(best['recall'])} are found, and of the detections "
            f"{_percent(best['precision'])} are right (F1 {best['f1']:.2f})."
        )
    known = sorted((row["AP"], row["class"]) for row in classes if row["AP"] is not None)
    if len(known) > 1:
        (low, worst), (high, first) = known[0], known[-1]
        sentences.append(
            f"The best class is {first} (AP {high:.1f}), the worst {worst} ({low:.1f})."
        )
    sizes = {"small": "APs", "medium": "APm", "large": "APl"}
    parts = [f"{size} {overall[k]:.1f}" for size, k in sizes.items() if overall[k] is not None]
    if len(parts) > 1:
        sentences.append(f"AP by the size of objects: {', '.join(parts)}.")
    if numbers["ap50_gains"] is not None:
        first, second = sorted(numbers["ap50_gains"].items(), key=lambda item: -item[1])[:2]
        if first[1] >= 0.05:
            sentence = f"Most AP50 is lost to {_LOSSES[first[0]]} ({first[1]:.1f} points)"
            if second[1] >= 0.05:
                sentence += f", then to {_LOSSES[second[0]]} ({second[1]:.1f})"
            sentences.append(f"{sentence}.")
    stages = numbers["stages"]
    if stages is not None and stages["stages"][0]["AP"] is not None:
        first, last = stages["stages"][0], stages["stages"][-1]
        sentence = (
            f"AP goes from {first['AP']:.1f} after stage {first['stage']} to {last['AP']:.1f} "
            f"after stage {last['stage']}"
        )
        after_nms = stages["last_stage_after_nms"].get("AP")
        if after_nms is not None:
            change = f"{after_nms - last['AP']:+.1f}"
            changes = change not in ("+0.0", "-0.0")
            sentence += f"; NMS would {f'change it by {change}' if changes else 'not change it'}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
