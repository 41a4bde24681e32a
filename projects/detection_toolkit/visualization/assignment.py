"""Which labels the queries of a training image get, stage by stage, and why.

Letters: S stages, N queries, M objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..errors import UserError
from ..structures import Assignment, GroundTruth, box_iou
from ..training import LabelAssigner
from .fonts import use_fonts
from .labels import BoxLabel, place_labels
from .paper import TEXT_WIDTH, draw_box, fix_layout, new_figure, prepare_picture
from .pictures import class_name

__all__ = ["LabelDecision", "LabelSource", "draw_assignment", "explain_labels"]

_TEXT = 5.4  # points
_CHANGE_COLORS = {"kept": "0.35", "added": "#00703c", "removed": "#c0182b"}
_SIGNS = {"kept": "", "added": "+ ", "removed": "− "}


class LabelSource(NamedTuple):
    """A stage whose match gives a query a label."""

    stage: int
    """Counted from 0."""
    object_index: int
    iou: float
    """Of the object with the query's box at the stage that gets the label."""


class LabelDecision(NamedTuple):
    """What becomes of one label of one query at one stage."""

    stage: int
    query: int
    label: int
    change: str
    """"kept", "added", or "removed", compared with the stage's own one-to-one match."""
    own_object: int
    """Object that the stage matches the query to; -1 for none."""
    own_iou: float | None
    """Of that object with the query's box at this stage."""
    sources: tuple[LabelSource, ...]
    """Why the label is there; empty for a removed one."""


def explain_labels(
    assignment: Assignment,
    boxes: Tensor,
    truth: GroundTruth,
    assigner: LabelAssigner,
    *,
    image: int = 0,
) -> list[LabelDecision]:
    """The decisions of a label assigner, with their reasons, by stage and query.

    Args:
        assignment: one-to-one matches of all stages.
        boxes: (S, B, N, 4) ``xyxy`` of all stages.
        truth: the objects of the B images.
        assigner: whose decisions they are.
        image: of the batch.
    """
    index = assignment.object_index[:, image].cpu()  # (S, N)
    labels = truth.labels[image].tolist()
    iou = box_iou(boxes[:, image, :, None], truth.boxes[image]).cpu()  # (S, N, M)
    takes = assigner.sources(assignment, boxes, truth)[:, image].cpu()  # (S, N, S)
    decisions = []
    for t, row in enumerate(index.tolist()):
        for query, own in enumerate(row):
            given: dict[int, list[LabelSource]] = {}
            for k, source in enumerate(index[:, query].tolist()):
                if takes[t, query, k]:
                    why = LabelSource(k, source, float(iou[t, query, source]))
                    given.setdefault(labels[source], []).append(why)
            own_iou = float(iou[t, query, own]) if own >= 0 else None
            if own >= 0:
                change = "kept" if labels[own] in given else "removed"
                sources = tuple(given.pop(labels[own], ()))
                decisions.append(
                    LabelDecision(t, query, labels[own], change, own, own_iou, sources)
                )
            for label, why in sorted(given.items()):
                decisions.append(LabelDecision(t, query, label, "added", own, own_iou, tuple(why)))
    return decisions


def draw_assignment(
    image: np.ndarray,
    boxes: Tensor,
    assignment: Assignment,
    truth: GroundTruth,
    decisions: Sequence[LabelDecision],
    metadata: Metadata | None = None,
    *,
    assigner: LabelAssigner,
    max_rows: int = 14,
) -> Figure:
    """Matches of every stage, labels by a label assigner, and a table of reasons.

    The queries of the table are labelled in the pictures, where there is room.

    Args:
        image: (H, W, 3) RGB as the detector sees it.
        boxes: (S, N, 4) of all stages, ``xyxy`` in pixels of ``image``.
        assignment: of a batch of this image alone.
        truth: likewise, with at least one object.
        decisions: of the assigner, by :func:`explain_labels`.
        metadata: its ``thing_classes`` name the classes.
        assigner: whose name and threshold the titles tell.
        max_rows: queries in the table; those whose labels change come first.

    Raises:
        ValueError: the image has no object.
    """
    num_objects = truth.num_objects[0]
    if not num_objects:
        raise UserError("the image has no objects: there is nothing to assign")
    num_stages = len(boxes)
    colors = [colormaps["tab10"](m % 10) for m in range(num_objects)]
    queries, left_out = _choose_rows(decisions, max_rows)

    aspect = min(max(image.shape[0] / image.shape[1], 0.4), 1.5)
    row = 0.95 * TEXT_WIDTH / num_stages * aspect + 0.17
    table = 0.5 + 0.27 * max(1, len(queries))
    figure = new_figure(2 * row + 0.1 + table)
    parts = figure.subfigures(3, 1, height_ratios=[row + 0.08, row, table])

    rows: list[tuple[Any, list[BoxLabel], bool]] = []  # axes, labels, also letters of objects
    axes = parts[0].subplots(1, num_stages, squeeze=False)[0]
    axes[0].set_ylabel("one-to-one match", fontsize=7)
    for t, axis in enumerate(axes):
        matched = (assignment.object_index[t, 0] >= 0).nonzero()[:, 0].tolist()
        prepare_picture(axis, image, f"stage {t + 1}: {len(matched)} matches")
        _draw_truth(axis, truth, colors)
        labels = []
        for query in matched:
            m = int(assignment.object_index[t, 0, query])
            draw_box(axis, boxes[t, query].tolist(), colors[m], width=1.3)
            if query in queries:
                text = f"q{query}→{_letter(m)}"
                labels.append(_query_label(boxes[t, query], text, "white", colors[m]))
        rows.append((axis, labels, False))

    axes = parts[1].subplots(1, num_stages, squeeze=False)[0]
    axes[0].set_ylabel(f"{assigner.name.replace('_', '-')} labels", fontsize=7)
    for t, axis in enumerate(axes):
        here = [d for d in decisions if d.stage == t]
        counts = {change: sum(d.change == change for d in here) for change in _SIGNS}
        title = f"{counts['kept']} kept, {counts['added']} added, {counts['removed']} removed"
        prepare_picture(axis, image, title, pale=True)
        _draw_truth(axis, truth, colors)
        labels = []
        for decision in here:
            if decision.change == "kept":
                continue
            box = boxes[t, decision.query]
            style = "-" if decision.change == "added" else (0, (1, 1))
            color = _CHANGE_COLORS[decision.change]
            draw_box(axis, box.tolist(), color, width=1.3, ls=style)
            if decision.query in queries:
                text = f"{_SIGNS[decision.change]}q{decision.query}"
                labels.append(_query_label(box, text, color, "white"))
        rows.append((axis, labels, True))

    axis = parts[2].subplots()
    _draw_table(axis, decisions, queries, num_stages, colors, metadata)
    note = f" ({left_out} more queries have labels)" if left_out else ""
    if assigner.iou_threshold is not None:
        note += f"; a label needs IoU ≥ {assigner.iou_threshold:g}"
    axis.set_title(
        f"label of each query at each stage, IoU of its box with the object, source stages{note}",
        fontsize=6.3,
        pad=3,
    )
    use_fonts(figure)
    fix_layout(figure)
    followed = {d.own_object for d in decisions if d.query in queries}
    followed |= {s.object_index for d in decisions if d.query in queries for s in d.sources}
    for axis, labels, with_letters in rows:
        taken = []
        if with_letters:
            letters = place_labels(axis, _letters(truth, followed), size=_TEXT, centred=True)
            taken = [letter.get_window_extent() for letter in letters if letter is not None]
        place_labels(axis, labels, size=_TEXT, taken=taken)
    return figure


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index)


def _choose_rows(decisions: Sequence[LabelDecision], max_rows: int) -> tuple[list[int], int]:
    changes: dict[int, int] = {}
    for d in decisions:
        changes[d.query] = changes.get(d.query, 0) + (d.change != "kept")
    order = sorted(changes, key=lambda q: (-changes[q], q))
    return sorted(order[:max_rows]), max(0, len(order) - max_rows)


def _draw_truth(axis, truth, colors) -> None:
    for m, color in enumerate(colors):
        box = truth.boxes[0, m].tolist()
        draw_box(axis, box, "white", width=1.0)
        draw_box(axis, box, color, width=1.0, ls=(0, (3, 2)))


def _letters(truth: GroundTruth, objects: set[int]) -> list[BoxLabel]:
    background = dict(boxstyle="square,pad=0.12", lw=0, fc="white", alpha=0.8)
    return [
        BoxLabel(truth.boxes[0, m].tolist(), _letter(m), {"bbox": background})
        for m in sorted(objects - {-1})
    ]


def _query_label(box: Tensor, text: str, color, background) -> BoxLabel:
    style = dict(boxstyle="square,pad=0.12", lw=0, fc=background, alpha=0.85)
    return BoxLabel(box.tolist(), text, {"color": color, "bbox": style})


def _draw_table(axis, decisions, queries, num_stages, colors, metadata) -> None:
    axis.set_xlim(0, num_stages)
    axis.set_ylim(max(1, len(queries)), 0)
    cells: dict[tuple[int, int], list[LabelDecision]] = {}
    for d in decisions:
        cells.setdefault((d.query, d.stage), []).append(d)
    for y, query in enumerate(queries):
        for t in range(num_stages):
            here = cells.get((query, t), [])
            own = here[0].own_object if here else -1
            color = (*colors[own][:3], 0.22) if own >= 0 else "white"
            axis.add_patch(Rectangle((t, y), 1, 1, fc=color, ec="0.6", lw=0.4))
            for line, d in enumerate(here):
                axis.text(
                    t + 0.5,
                    y + (line + 0.5) / len(here),
                    _reason(d, metadata),
                    fontsize=_TEXT - 0.3 * (num_stages > 5) - 0.4 * (len(here) > 1),
                    ha="center",
                    va="center",
                    color=_CHANGE_COLORS[d.change],
                    weight="normal" if d.change == "kept" else "bold",
                )
            if not here:
                axis.text(
                    t + 0.5,
                    y + 0.5,
                    "background",
                    fontsize=_TEXT - 0.6,
                    color="0.75",
                    ha="center",
                    va="center",
                )
    axis.set_yticks([y + 0.5 for y in range(len(queries))], labels=[f"q{q}" for q in queries])
    axis.set_xticks(
        [t + 0.5 for t in range(num_stages)], labels=[f"stage {t + 1}" for t in range(num_stages)]
    )
    axis.tick_params(labelsize=_TEXT + 0.6, length=0, pad=2)
    if not queries:
        axis.text(num_stages / 2, 0.5, "no query has a label", ha="center", va="center", fontsize=7)
    legend = "   ".join(f"{sign}label: {change}" for change, sign in _SIGNS.items())
    axis.set_xlabel(
        f"{legend}    cell colour: object that the stage itself matches", fontsize=6.3, labelpad=2
    )


def _reason(d: LabelDecision, metadata: Metadata | None) -> str:
    name = class_name(metadata, d.label)
    if d.change == "removed":
        return f"− {name}: {_letter(d.own_object)} {d.own_iou:.2f}"
    if d.change == "kept":
        if d.own_object in {s.object_index for s in d.sources}:
            return f"{name}: {_letter(d.own_object)} {d.own_iou:.2f}"
    by_object: dict[int, list[LabelSource]] = {}
    for source in d.sources:
        by_object.setdefault(source.object_index, []).append(source)
    why = ", ".join(
        f"{_letter(m)} {sources[0].iou:.2f} from {','.join(str(s.stage + 1) for s in sources)}"
        for m, sources in by_object.items()
    )
    return f"{_SIGNS[d.change]}{name}: {why}"
