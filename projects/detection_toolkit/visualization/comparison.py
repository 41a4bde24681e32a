"""The comparison of two runs: one HTML page without other files, the numbers, and a table."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import UnreadableImageError, read_image
from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..durable import write_text
from ..errors import UserError
from ..evaluation.paired import (
    FEW_IMAGES,
    Resamples,
    compare_resamples,
    judge_difference,
    summarize_pair,
)
from ..evaluation.results import (
    METRICS,
    PREDICTIONS,
    Comparison,
    dataset_of,
    evaluated_sets,
    find_predictions,
    ground_truth,
    read_facts,
    read_max_dets,
    read_results,
)
from ..evaluation.stage_predictions import STAGE_PREDICTIONS, read_stage_predictions
from ..evaluation.thresholds import judge_images, match_by_class
from ..program import command_line
from ..texts import parse_json, shown
from . import report_charts as charts
from .pictures import draw_detections, draw_ground_truth, side_by_side

__all__ = ["comparison_table", "compare_runs", "write_comparison"]


class _Run(NamedTuple):
    """One of the two."""

    output_dir: Path
    folder: Path
    """of the results"""
    dataset: str
    """its name in the catalogues"""
    document: Mapping[str, Any]
    """of the objects"""


def compare_runs(
    run_a: Path,
    run_b: Path,
    *,
    dataset: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    score_threshold: float = DEFAULT_SCORE_THRESHOLD,
    num_images: int = 2,
    trust_config: bool = False,
) -> tuple[dict[str, Any], list[charts.Part]]:
    """Judge two evaluated runs on the images that both were evaluated on.

    Args:
        run_a, run_b: train.output_dir of each.
        dataset: test set, where they were evaluated on several.
        resamples: of the bootstrap.
        seed: of the resamples.
        score_threshold: of the detections that are drawn.
        num_images: so many of the images on which each is ahead are drawn.
        trust_config: see :func:`~detection_toolkit.config.get_config`.

    Returns:
        the numbers, and parts of a page with the drawn images.

    Raises:
        UserError, FileNotFoundError: a run has no results, they are damaged, or both are not of the
            same images, objects and classes.
    """
    with contextlib.ExitStack() as stack:
        runs, files = [], []
        names = _results_of_both(run_a, run_b, dataset)
        for output_dir, folder in zip((run_a, run_b), names):
            name = dataset_of(output_dir, folder.name, trust_config=trust_config)
            file = stack.enter_context(ground_truth(name))
            document = parse_json(Path(file).read_bytes())
            runs.append(_Run(output_dir, folder, name, document))
            files.append(file)
        first, second = runs
        truth_file = files[0]
        _require_same_data(first, second)
        image_ids = [image["id"] for image in first.document["images"]]
        max_dets = [read_max_dets(run.folder) for run in runs]
        if len(set(max_dets)) > 1:
            raise UserError(
                f"{max_dets[0]} detections an image counted for {shown(run_a)}, {max_dets[1]} for "
                f"{shown(run_b)} (max_dets_per_image of the evaluator): evaluate one of them again"
            )

        def judge(results: list[dict]) -> Resamples:
            return Resamples(
                truth_file, results, image_ids, count=resamples, seed=seed, max_dets=max_dets[0]
            )

        results = [read_results(run.folder / PREDICTIONS) for run in runs]
        beside = [Comparison(truth_file, r) for r in results]  # or says what does not belong
        objects = [x for found in beside[0].truth.values() for x in found]
        if all(x.get("iscrowd", 0) for x in objects):
            raise UserError(f"data set {first.dataset} has no annotated objects to compare with")
        drawn = [judge(r) for r in results]
        numbers = compare_resamples(*drawn, beside[0].names)
        stages = _compare_stages(runs, judge)
        images = _images_of_each(drawn, beside[0].image_ids, score_threshold, num_images)
        examples = _draw_images(images, beside, first.dataset, score_threshold)
    about = {
        key: {"folder": str(run.output_dir), **read_facts(run.output_dir, run.folder)}
        for key, run in zip("AB", runs)
    }
    document = {
        **about,
        "dataset": first.folder.name,
        "images": len(image_ids),
        "objects": len(objects),
        "resamples": resamples,
        "seed": seed,
        "verdict": judge_difference(numbers["overall"]["AP"], len(image_ids)),
        **numbers,
        "stages": stages,
    }
    document["answer"] = _answer(document)
    return document, examples


def _results_of_both(run_a: Path, run_b: Path, dataset: str | None) -> list[Path]:
    if not run_b.is_dir():  # first, as one's test set may have to be chosen by the other's
        find_predictions(run_b, dataset)
    if dataset is None and run_a.is_dir() and run_b.is_dir():
        sets = [{p.name for p in evaluated_sets(run)} for run in (run_a, run_b)]
        if len(sets[0] & sets[1]) == 1:
            (dataset,) = sets[0] & sets[1]
        elif all(sets) and not sets[0] & sets[1] and max(map(len, sets)) > 1:
            names = (", ".join(sorted(of_run)) for of_run in sets)
            raise UserError(
                f"{run_a} has results of {next(names)}, and {run_b} of {next(names)}: evaluate "
                f"both on the same data, `{command_line('eval')} --weights RUN --data PATH`"
            )
    return [find_predictions(run, dataset) for run in (run_a, run_b)]


def _require_same_data(a: _Run, b: _Run) -> None:
    """
    Raises:
        UserError: images, classes or objects differ.
    """
    if a.dataset == b.dataset:
        return
    of = f"{shown(a.output_dir)} and {shown(b.output_dir)} cannot be compared"
    names = [{entry["id"]: entry["name"] for entry in run.document["categories"]} for run in (a, b)]
    ids = [{name: number for number, name in n.items()} for n in names]
    if ids[0] != ids[1] and ids[0].keys() == ids[1].keys():
        name = next(name for name, number in ids[0].items() if number != ids[1][name])
        raise UserError(
            f"{of}: the same classes have other ids in their data ({shown(name)}: "
            f"{shown(ids[0][name])} for A, {shown(ids[1][name])} for B), as in data of two "
            "formats: evaluate both on one"
        )
    if names[0] != names[1]:
        texts = (", ".join(sorted(map(shown, n.values()))[:5]) for n in names)
        raise UserError("{}: their classes are others ({}; {})".format(of, *texts))
    images = [
        {entry["id"]: Path(entry.get("file_name", "")).name for entry in run.document["images"]}
        for run in (a, b)
    ]
    if images[0] != images[1]:
        both = len(images[0].items() & images[1].items())
        raise UserError(
            f"{of}: they were evaluated on other images (A on {len(images[0])} of {a.folder.name}, "
            f"B on {len(images[1])} of {b.folder.name}, {both} in both)"
        )
    objects = [
        Counter(
            (x["image_id"], x["category_id"], tuple(x["bbox"]), x.get("iscrowd", 0))
            for x in run.document.get("annotations", ())
        )
        for run in (a, b)
    ]
    if objects[0] != objects[1]:
        differ = sum(((objects[0] - objects[1]) | (objects[1] - objects[0])).values())
        raise UserError(
            f"{of}: {differ} annotations of their test sets differ; evaluate both on the same file"
        )


def _compare_stages(runs: Sequence[_Run], judge: Any) -> list[dict[str, Any]] | None:
    """AP after each stage that both have; None where one was not evaluated by stage."""
    found = [read_stage_predictions(run.folder / STAGE_PREDICTIONS) for run in runs]
    if found[0] is None or found[1] is None:
        return None
    rows = []
    for stage, pair in enumerate(zip(*found), start=1):
        # A stage may find nothing.
        summary = None
        if all(pair):
            summary = summarize_pair(*(judge(results).metric("AP") for results in pair))
        rows.append({"stage": stage, "AP": summary})
    return rows


def _images_of_each(
    drawn: Sequence[Resamples], image_ids: Sequence[Any], threshold: float, count: int
) -> dict[str, list[dict[str, Any]]]:
    """The images where F1 differs most, for each of the two the ones where it is ahead."""
    scores = [
        {
            image.image_id: image.f1
            for image in judge_images(
                match_by_class(one.evaluation), image_ids, threshold=threshold
            )
        }
        for one in drawn
    ]
    rows = [{"image_id": i, "A": scores[0][i], "B": scores[1][i]} for i in image_ids]
    order = sorted(rows, key=lambda row: row["B"] - row["A"])
    return {
        "B": [row for row in order[::-1] if row["B"] > row["A"]][:count],
        "A": [row for row in order if row["B"] < row["A"]][:count],
    }


def _draw_images(
    images: Mapping[str, list[dict[str, Any]]],
    beside: Sequence[Comparison],
    name: str,
    threshold: float,
) -> list[charts.Part]:
    records = {r["image_id"]: r for r in DatasetCatalog.get(name)}
    metadata = MetadataCatalog.get(name)
    parts: list[charts.Part] = []
    for key, rows in images.items():
        parts.append(("heading", f"{key} is ahead"))
        if not rows:
            parts.append(("text", "Nowhere."))
        for row in rows:
            record = records[row["image_id"]]
            title = f"{Path(record['file_name']).name}: F1 {row['A']:.2f} with A, {row['B']:.2f} "
            parts.append(("text", f"{title}with B"))
            try:
                image = read_image(record["file_name"])
            except UnreadableImageError as error:
                parts.append(("text", str(error)))
                continue
            pictures = [
                draw_detections(
                    image,
                    one.instances(row["image_id"], image.shape),
                    metadata,
                    threshold=threshold,
                )
                for one in beside
            ]
            pictures.append(draw_ground_truth(record, metadata, image=image))
            sheet = side_by_side(pictures, ["A", "B", "ground truth"])
            parts.append(("image", charts.embed_picture(sheet)))
    return parts


def _answer(numbers: Mapping[str, Any]) -> str:
    """Is B better than A on these images?"""
    ap, verdict, count = numbers["overall"]["AP"], numbers["verdict"], numbers["images"]
    low, high = ap["interval"]
    on = f"on these {count:,} images"
    figures = (
        f"AP {ap['A']:.1f} -> {ap['B']:.1f}, difference {ap['difference']:+.1f} points, 95 % "
        f"interval {low:+.1f} to {high:+.1f}"
    )
    answer = verdict["answer"]
    if answer == "same":
        text = f"No difference: both have AP {ap['A']:.1f} {on}, and in every resample of them."
    elif answer == "unknown":
        text = f"Whether B is better than A cannot be told from these {count:,} images: {figures}."
        if verdict["images_needed"] is not None:
            text += (
                f" About {_rounded(verdict['images_needed']):,} images like these would tell, if "
                "the difference is what it seems."
            )
        else:
            text += " If there is a difference, it is too small for any practical number of images."
    else:
        other = "A" if answer == "B" else "B"
        word = "Yes" if answer == "B" else "No"
        text = f"{word}: {answer} is better than {other} {on}: {figures}."
    if count < FEW_IMAGES and answer != "same":
        text += f" With fewer than {FEW_IMAGES} images the interval is too narrow: get more."
    return text


def _rounded(number: int) -> int:
    """To two digits."""
    return round(number, -max(0, len(str(number)) - 2))


def _row(name: Any, summary: Mapping[str, Any] | None) -> list[Any]:
    if summary is None:
        return [name, *[None] * 5]
    interval, better = summary["interval"], summary["better"]
    return [
        name,
        f"{summary['A']:.1f}",
        f"{summary['B']:.1f}",
        f"{summary['difference']:+.1f}",
        None if interval is None else "{:+.1f} to {:+.1f}".format(*interval),
        None if better is None else f"{100 * better:.0f} %",
    ]


_HEADER = ("A", "B", "B - A", "95 % interval", "B is better")


def comparison_table(numbers: Mapping[str, Any]) -> str:
    """What is compared, the metrics and the classes, as text."""
    from tabulate import tabulate

    rows = [_row(name, summary) for name, summary in numbers["overall"].items()]
    rows += [_row(f"AP, stage {s['stage']}", s["AP"]) for s in numbers["stages"] or ()]
    rows += [_row(f"AP, {shown(c['class'])}", c["AP"]) for c in numbers["classes"]]
    table = tabulate(rows, headers=["", *_HEADER], missingval="-", disable_numparse=True)
    lines = [f"{key}: {shown(numbers[key]['folder'])}" for key in "AB"]
    return "\n".join([*lines, "", table, "", numbers["answer"]])


def _page(numbers: Mapping[str, Any], examples: list[charts.Part]) -> str:
    overall = numbers["overall"]
    facts = {
        key: ", ".join(str(numbers[key][k]) for k in ("folder", "checkpoint") if numbers[key][k])
        for key in "AB"
    }
    facts["data"] = (
        f"{numbers['dataset']}: {numbers['images']} images, {numbers['objects']} objects"
    )
    facts["method"] = (
        f"{numbers['resamples']:,} resamples of the images, drawn with replacement (seed "
        f"{numbers['seed']}), the same ones for A and B; COCO's AP of each"
    )
    note = (
        "The interval holds 95 % of the resamples. It says what other images of the same kind "
        "would give for these two sets of weights. What another run with another seed would give "
        "is not in it."
    )
    summary: list[charts.Part] = [
        ("html", charts.format_facts(facts)),
        ("words", numbers["answer"]),
        ("html", charts.format_table(["", *_HEADER], [_row(m, overall[m]) for m in METRICS])),
        ("text", note),
    ]
    ap = overall["AP"]
    known = [(m, overall[m]["difference"], overall[m]["interval"]) for m in METRICS if overall[m]]
    if numbers["verdict"]["answer"] != "same":
        left = [
            ("heading", "Differences of AP in all resamples"),
            ("image", charts.chart_resamples(numbers["resampled"], ap["interval"])),
        ]
        right = [
            ("heading", "By IoU and size of objects"),
            ("image", charts.chart_differences(known)),
        ]
        summary.append(("row", [left, right]))
    sections = [
        ("Is B better than A?", summary),
        ("Classes", _of_classes(numbers["classes"])),
        ("Stages", _of_stages(numbers["stages"])),
        ("Images", examples),
    ]
    return charts.render_page("Comparison of two runs", sections)


def _of_classes(classes: Sequence[Mapping[str, Any]]) -> list[charts.Part]:
    known = sorted(
        ((c["class"], c["AP"]) for c in classes if c["AP"] is not None),
        key=lambda pair: pair[1]["difference"],
    )
    missing = [(c["class"], None) for c in classes if c["AP"] is None]
    table = charts.format_table(["class", *_HEADER], [_row(*pair) for pair in [*known, *missing]])
    chart = charts.chart_differences(
        [(name, row["difference"], row["interval"]) for name, row in known]
    )
    note = (
        f"Of {len(known)} intervals about {0.05 * len(known):.1f} leave zero out by chance alone."
    )
    return [("row", [[("image", chart)], [("html", table), ("text", note)]])]


def _of_stages(stages: Sequence[Mapping[str, Any]] | None) -> list[charts.Part]:
    if stages is None:
        text = "Evaluate both with train.stage_evaluation=true, and their stages are compared here."
        return [("text", text)]
    rows = [(f"stage {s['stage']}", s["AP"]) for s in stages]
    table = charts.format_table(["AP after", *_HEADER], [_row(*row) for row in rows])
    chart = charts.chart_differences(
        [(name, row["difference"], row["interval"]) for name, row in rows if row]
    )
    return [("row", [[("image", chart)], [("html", table)]])]


def write_comparison(
    numbers: Mapping[str, Any], examples: list[charts.Part], output: Path
) -> list[Path]:
    """Write the page, and the numbers as JSON beside it.

    Args:
        numbers, examples: of :func:`compare_runs`.
        output: the page.

    Returns:
        the paths.
    """
    document = json.dumps(numbers, indent=1, allow_nan=False)
    write_text(output, _page(numbers, examples))
    write_text(output.with_suffix(".json"), document)
    return [output, output.with_suffix(".json")]
