"""The page itself, built with Gradio."""

from __future__ import annotations

import base64
import functools
import html
import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from matplotlib.colors import to_hex

from ..errors import MissingPackageError
from ..texts import shown
from ..visualization import DEFAULT_SCORE_THRESHOLD, level_colors, stage_colors
from .viewing import (
    ExampleImages,
    PictureRefused,
    StageViewer,
    ViewedPicture,
    coco_results,
    list_detections,
)

try:
    import gradio as gr
except ImportError as missing:
    raise MissingPackageError(
        f"the page needs Gradio 6, for Python 3.10 or newer: pip install 'gradio>=6' ({missing})"
    ) from missing

__all__ = ["PAGE_POLICY", "STYLE", "Page"]

logger = logging.getLogger(__name__)

_NO_QUERY = -1
_NONE = ("none", _NO_QUERY)
_DEFECT = "Something went wrong with this picture; the server's log says what."

PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy: the browser itself refuses to load anything from elsewhere, and to show
the page within another one."""

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


_Event = TypeVar("_Event", bound=Callable[..., dict])


def _counted(event: _Event) -> _Event:
    """An event of the page, which says how many are in work, and logs what it fails of."""

    @functools.wraps(event)
    def call(page: Page, *args: Any) -> dict:
        with page._running_lock:
            page._running += 1
        try:
            return event(page, *args)
        except Exception as error:
            logger.exception("the page could not be changed")
            raise gr.Error(_DEFECT, print_exception=False) from error
        finally:
            with page._running_lock:
                page._running -= 1

    return cast(_Event, call)


class _Blocks(gr.Blocks):
    """Gradio's page, which says in one line what is wrong with a call.

    Whoever leaves the page out can send values of any kind, and Gradio prints a traceback for each.
    """

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise  # of an event, which has logged it
            reason = shown(str(error).partition("\n")[0][:200])
            logger.warning("a call cannot be answered (%s: %s)", type(error).__name__, reason)
            text = "That cannot be shown here. Choose a picture again."
            raise gr.Error(text, print_exception=False) from error


class Page:
    """Components, and the functions that fill them: ``{component: its new value}``."""

    def __init__(self, viewer: StageViewer, examples: ExampleImages | None, *, max_upload: int):
        self.viewer = viewer
        self.examples = examples
        self.max_upload = max_upload
        self._viewed_examples: dict[int, ViewedPicture] = {}
        self._running = 0
        self._running_lock = threading.Lock()

    @property
    def running(self) -> int:
        """Events that are computed right now, whether or not somebody still waits for them."""
        return self._running

    def build(self, title: str, subtitle: str) -> gr.Blocks:
        stages = self.viewer.num_stages
        with _Blocks(
            title=title,
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(600, 1800),  # of uploads, and what was drawn of them: seconds
        ) as page:
            # What belongs to one user, and is not kept when many others came since.
            self.viewed = gr.State(None, time_to_live=3600)
            gr.HTML(
                f"<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>", elem_id="heading"
            )
            with gr.Row(elem_id="main"):
                with gr.Column(scale=7, min_width=340):
                    self.status = gr.HTML(_note("Choose a picture."), elem_id="status")
                    self.picture = gr.Image(
                        format="png",
                        interactive=False,
                        show_label=False,
                        buttons=["download", "fullscreen"],
                        elem_id="picture",
                        alt_text="the picture with the detections of the stage",
                    )
                    self.legend = gr.HTML("", elem_id="legend")
                with gr.Column(scale=3, min_width=320, elem_id="controls"):
                    self.upload = gr.File(
                        label=f"Your picture, up to {self.max_upload / 2**20:g} MB",
                        type="filepath",
                        height=124,
                        elem_id="upload",
                    )
                    self.gallery = gr.Gallery(
                        self._thumbnails(),
                        label="examples",
                        show_label=False,
                        columns=6,
                        rows=1,
                        height="auto",
                        object_fit="cover",
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        format="png",
                        visible=self.examples is not None,
                        elem_id="examples",
                    )
                    self.stage = gr.Slider(
                        1,
                        stages,
                        value=stages,
                        step=1,
                        label="Stage",
                        info="detections as if the decoder ended after it",
                        buttons=[],
                        visible=stages > 1,
                        elem_id="stage",
                    )
                    self.confidence = gr.Slider(
                        0.05,
                        0.95,
                        value=DEFAULT_SCORE_THRESHOLD,
                        step=0.05,
                        label="Confidence",
                        info="least score of a detection",
                        buttons=[],
                        elem_id="confidence",
                    )
                    self.query = gr.Dropdown(
                        [_NONE],
                        value=_NO_QUERY,
                        label="Follow a query",
                        info="or click on a detection in the picture",
                        elem_id="query",
                    )
                    self.download = gr.HTML("", elem_id="download")
            self.strip = gr.Image(
                format="png",
                interactive=False,
                show_label=False,
                buttons=["download", "fullscreen"],
                visible=False,
                elem_id="strip",
                alt_text="sampling points, boxes and scores of the query at every stage",
            )
            self.table = gr.HTML("", elem_id="table")
            self._connect(page)
        return page

    def _connect(self, page: gr.Blocks) -> None:
        choice = [self.viewed, self.stage, self.confidence]
        shown = [self.status, self.picture, self.legend, self.table, self.download]
        everything = [self.viewed, self.stage, self.query, *shown, self.strip]
        detects = {
            "concurrency_id": "detect",
            "api_visibility": "private",
            "show_progress_on": [self.picture],
        }
        draws = {
            "concurrency_id": "draw",
            "api_visibility": "private",
            "show_progress": "hidden",  # a slider's picture would flicker
        }
        if self.examples is not None:
            page.load(self.open_first, [self.confidence], everything, **detects)
            self.gallery.select(self.pick_example, [self.confidence], everything, **detects)
        self.upload.upload(
            self.take_upload, [self.upload, self.confidence], [self.upload, *everything], **detects
        )
        self.stage.input(
            self.redraw, [*choice, self.query], shown, trigger_mode="always_last", **draws
        )
        self.confidence.input(
            self.change_confidence,
            [*choice, self.query],
            [self.query, *shown],
            trigger_mode="always_last",
            **draws,
        )
        follow = {
            "fn": self.follow_query,
            "inputs": [self.viewed, self.query],
            "outputs": [self.strip],
            "concurrency_id": "draw",
            "api_visibility": "private",
        }
        self.query.input(self.redraw, [*choice, self.query], shown, **draws).then(**follow)
        self.picture.select(
            self.click_picture, [*choice, self.query], [self.query, *shown], **draws
        ).then(**follow)

    def _thumbnails(self) -> list[np.ndarray] | None:
        if self.examples is None:
            return None
        images = [self.examples.image(number) for number in range(len(self.examples))]
        return [image[:, :, ::-1] for image in images]

    # What events call. Values come in the order in which _connect names them.

    @_counted
    def open_first(self, confidence: float) -> dict:
        return self._show(lambda: self._example(0), confidence)

    @_counted
    def pick_example(self, confidence: float, event: gr.SelectData) -> dict:
        return self._show(lambda: self._example(event.index), confidence)

    @_counted
    def take_upload(self, path: str | None, confidence: float) -> dict:
        if path is None:
            return {self.upload: None}
        # Gradio deletes the file later: its path follows from its content, so another
        # user's upload of the same picture, which still waits for its turn, is the same file.
        update = self._show(lambda: self.viewer.view_file(path), confidence)
        return {self.upload: None, **update}

    def _show(self, view: Callable[[], ViewedPicture], confidence: float) -> dict:
        try:
            viewed = view()
        except PictureRefused as error:
            return {self.status: _note(f"{error}.", error=True)}
        except Exception:
            logger.exception("a picture could not be shown")
            return {self.status: _note(_DEFECT, error=True)}
        last = viewed.num_stages
        return {
            self.viewed: viewed,
            self.stage: gr.update(value=last),
            **self._name_queries(viewed, confidence, _NO_QUERY),
            self.strip: gr.update(value=None, visible=False),
            **self.redraw(viewed, last, confidence, _NO_QUERY),
        }

    @_counted
    def redraw(
        self, viewed: ViewedPicture | None, stage: int, confidence: float, query: int | None
    ) -> dict:
        if viewed is None:
            return {self.status: _note("Choose a picture first.", error=True)}
        index, followed = self._as_index(viewed, stage), _as_query(query)
        found = viewed.detections(index, confidence)
        rows = list_detections(self.viewer, found)
        return {
            self.status: _note(_summarise(viewed, index, confidence, len(found))),
            self.picture: self.viewer.draw(viewed, index, confidence, followed),
            self.legend: self._explain(viewed, index, followed),
            self.table: _table(rows, followed),
            self.download: _download_link(
                coco_results(self.viewer, found, viewed.name),
                f"{Path(viewed.name).stem}_stage{index + 1}_detections.json",
            ),
        }

    @_counted
    def change_confidence(
        self, viewed: ViewedPicture | None, stage: int, confidence: float, query: int | None
    ) -> dict:
        update = self.redraw(viewed, stage, confidence, query)
        if viewed is not None:
            names = self.viewer.name_queries(viewed, confidence, _as_query(query))
            # Not the value: its user may have chosen another one in the meantime.
            update[self.query] = gr.update(choices=[_NONE, *names])
        return update

    @_counted
    def click_picture(
        self,
        viewed: ViewedPicture | None,
        stage: int,
        confidence: float,
        query: int | None,
        event: gr.SelectData,
    ) -> dict:
        if viewed is None:
            return self.redraw(viewed, stage, confidence, query)
        point = event.index
        if not (isinstance(point, list) and len(point) == 2 and all(map(_is_number, point))):
            return self.redraw(viewed, stage, confidence, query)  # not of the page
        x, y = point
        index = self._as_index(viewed, stage)
        clicked = viewed.query_at(x, y, stage=index, threshold=confidence)
        query = _NO_QUERY if clicked is None else clicked
        return {
            **self._name_queries(viewed, confidence, query),
            **self.redraw(viewed, stage, confidence, query),
        }

    @_counted
    def follow_query(self, viewed: ViewedPicture | None, query: int | None) -> dict:
        followed = _as_query(query)
        if viewed is None or followed is None:
            return {self.strip: gr.update(value=None, visible=False)}
        drawn = self.viewer.draw_stages_of(viewed, followed)
        return {self.strip: gr.update(value=drawn, visible=True)}

    def _name_queries(self, viewed: ViewedPicture, confidence: float, query: int | None) -> dict:
        followed = _as_query(query)
        names = self.viewer.name_queries(viewed, confidence, followed)
        value = _NO_QUERY if followed is None else followed
        return {self.query: gr.update(choices=[_NONE, *names], value=value)}

    def _example(self, number: Any) -> ViewedPicture:
        if not _is_number(number) or int(number) not in range(len(self.examples)):
            raise PictureRefused("there is no such example")
        number = int(number)
        if number not in self._viewed_examples:
            name = self.examples.name(number)
            self._viewed_examples[number] = self.viewer.view(self.examples.image(number), name)
        return self._viewed_examples[number]

    def _as_index(self, viewed: ViewedPicture, stage: float) -> int:
        # Gradio lets NaN pass.
        return min(max(int(stage) if _is_number(stage) else 1, 1), viewed.num_stages) - 1

    def _explain(self, viewed: ViewedPicture, stage: int, query: int | None) -> str:
        if query is None:
            return "Each class has a colour. Click on a detection to see how it came about."
        shades = stage_colors(viewed.num_stages)[: stage + 1]
        boxes = "".join(_swatch(to_hex(c), str(t)) for t, c in enumerate(shades, start=1))
        parts = [f"<span>box after stage {boxes}</span>", "<span>dashed: box before</span>"]
        if viewed.traces[stage].points is not None:
            strides = self.viewer.predictor.model.strides
            levels = "".join(
                _swatch(to_hex(c), str(s), kind="dot")
                for s, c in zip(strides, level_colors(len(strides)))
            )
            parts.append(f"<span>sampling point at a level of stride {levels}</span>")
        if viewed.traces[stage].shares is not None:
            parts.append("<span>each head has its marker, as large as the point counts</span>")
        return "".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_query(value: int | None) -> int | None:
    return None if value is None or value == _NO_QUERY else int(value)


def _note(text: str, *, error: bool = False) -> str:
    kind, role = ("error", "alert") if error else ("note", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def _summarise(viewed: ViewedPicture, stage: int, confidence: float, count: int) -> str:
    height, width = viewed.original_size
    picture = f"{viewed.name}, {width}×{height} pixels"
    if viewed.seen_size is not None:
        picture += f" (the detector saw {viewed.seen_size[1]}×{viewed.seen_size[0]})"
    if count:
        noun = "detection" if count == 1 else "detections"
        return f"{picture}: {count} {noun} after stage {stage + 1} of {viewed.num_stages}."
    scores = viewed.traces[stage].detections.scores
    best = f"the best one has {float(scores.max()):.2f}" if len(scores) else "there is none at all"
    return (
        f"{picture}: no detection after stage {stage + 1} has a score of {confidence:.2f} or more; "
        f"{best}."
    )


def _table(rows: list, followed: int | None) -> str:
    if not rows:
        return ""
    heads = ("", "class", "score", "x", "y", "width", "height", "query")
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = [
            str(number),
            html.escape(row.label),
            f"{row.score:.3f}",
            *(f"{value:.1f}" for value in (row.x, row.y, row.width, row.height)),
            str(row.query),
        ]
        mark = ' class="followed"' if row.query == followed else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        "<table><caption>Detections, with boxes in pixels of the picture as it came</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _download_link(results: list[dict[str, Any]], file_name: str) -> str:
    # The file is in the link: nothing has to be kept on the server until somebody wants it.
    content = base64.b64encode(json.dumps(results, indent=1).encode()).decode()
    name = html.escape(file_name, quote=True)
    return (
        f'<a download="{name}" href="data:application/json;base64,{content}">'
        f"Download as COCO JSON</a>"
    )


def _swatch(color: str, text: str, *, kind: str = "square") -> str:
    return f'<b><i class="{kind}" style="background:{color}"></i>{html.escape(text)}</b> '
