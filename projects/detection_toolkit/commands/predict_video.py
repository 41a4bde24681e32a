"""The part of ``predict`` that reads a video or the webcam."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from ..durable import renamed_when_complete
from ..errors import UserError
from ..texts import shown
from .predict import ESCAPE, WINDOW, save_results, why_nothing

if TYPE_CHECKING:
    from detectron2.structures import Instances

    from ..engine.tiling import PicturePredictor

__all__ = ["run_on_video"]


class Found(NamedTuple):
    """Of a whole video."""

    frames: int
    detections: int
    best: Instances
    results: list[dict]


def run_on_video(args: argparse.Namespace, predictor: PicturePredictor, logger) -> int:
    """Detect in a video or in what the camera sees, frame by frame; returns 0."""
    # An absolute path: FFmpeg takes names such as concat:a for more than names.
    source = 0 if args.webcam else os.path.abspath(os.path.expanduser(args.video_input))
    shown_source = "the camera" if args.webcam else shown(args.video_input)
    if not args.webcam:
        if not os.path.isfile(source):
            raise UserError(f"no such video: {shown_source}")
        from ..data.videos import check_video

        check_video(source)
    path = None
    if args.output:
        path = video_output(args.output, "webcam" if args.webcam else Path(source).stem)
        if not args.webcam and path.resolve() == Path(source).resolve():
            raise UserError(f"{path} is the input: choose another --output")
    with contextlib.nullcontext() if path is None else renamed_when_complete(path) as partial:
        found = draw_video(args, predictor, logger, source, partial)
    save_results(args, found.results)
    where = f" -> {shown(path)}" if path else ""
    if not found.detections:
        where += f" ({why_nothing(found.best)})"
    logger.info(
        "%s: %d frames, %d detections%s", shown_source, found.frames, found.detections, where
    )
    return 0


def video_output(output: str, name: str) -> Path:
    """The .mp4 to write: the file named, or ``name``.mp4 in the folder named."""
    target = Path(os.path.expanduser(output))
    if target.is_dir() or target.suffix.lower() != ".mp4":
        if target.exists() and not target.is_dir():
            raise UserError(f"--output {output} is a file, but not an .mp4")
        target = target / f"{name}.mp4"
    return target


def draw_video(
    args: argparse.Namespace,
    predictor: PicturePredictor,
    logger,
    source: int | str,
    path: Path | None,
) -> Found:
    """Detect in a video, and draw it into an .mp4 or a window."""
    from ..engine.detections import coco_results
    from ..engine.tracking import Tracker
    from ..visualization import draw_detections, select_confident

    shown_source = "the camera" if args.webcam else shown(args.video_input)
    names = predictor.metadata.get("thing_classes", None)
    capture = cv2.VideoCapture(source)
    writer, best, count, detections = None, None, 0, 0
    results: list[dict] = []
    try:
        if not capture.isOpened():
            raise UserError(f"cannot open {shown_source} as video")
        total = 0 if args.webcam else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 25.0
        tracker = None
        if args.track:
            tracker = Tracker(frame_rate=rate, threshold=args.confidence_threshold)
        found = detect(read_frames(capture, args.webcam, rate), predictor, args.batch_size)
        progress = tqdm(found, total=max(total, 0) or None, unit="frame", disable=None)
        try:
            for seconds, frame, instances in progress:
                if tracker is None:
                    kept = select_confident(instances, args.confidence_threshold)
                else:
                    kept = tracker.update(instances)
                if args.save_json:
                    for result in coco_results(kept, count, names):
                        results.append({**result, "time": round(seconds, 6)})
                drawn = draw_detections(frame[:, :, ::-1], kept, predictor.metadata, scale=1.0)
                drawn = np.ascontiguousarray(drawn[:, :, ::-1])
                count, detections = count + 1, detections + len(kept)
                best = instances[:1] if best is None else best
                if len(instances) and (not len(best) or instances.scores[0] > best.scores[0]):
                    best = instances[:1]
                if path is None:
                    cv2.imshow(WINDOW, drawn)
                    if cv2.waitKey(1) == ESCAPE:
                        break
                    continue
                if writer is None:
                    writer = open_writer(path, rate, drawn.shape)
                writer.write(drawn)
        except KeyboardInterrupt:  # the way to end a recording of the camera
            logger.info("Stopped")
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not count:
        raise UserError(f"no frame of {shown_source} could be decoded")
    if path is not None and count_frames(path) < count:
        raise UserError("the video cannot be written as a whole: is the disk full?")
    return Found(count, detections, best, results)


def read_frames(
    capture: cv2.VideoCapture, is_camera: bool, rate: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Seconds from the first frame on, and BGR frame, until the source ends."""
    start = None
    for index in itertools.count():
        ok, frame = capture.read()
        if not ok:
            return
        now = time.monotonic() if is_camera else index / rate
        start = now if start is None else start
        yield now - start, frame


def detect(
    frames: Iterable[tuple[float, np.ndarray]], predictor: PicturePredictor, batch_size: int
) -> Iterator[tuple[float, np.ndarray, Instances]]:
    """The frames with what is found in each."""
    remaining = iter(frames)
    while batch := list(itertools.islice(remaining, batch_size)):
        found = predictor.predict([frame for _, frame in batch], batch_size=batch_size)
        for (seconds, frame), instances in zip(batch, found):
            yield seconds, frame, instances


def count_frames(path: Path) -> int:
    """Of a video, by its header; 0 if it has none."""
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return count


def open_writer(path: Path, rate: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    """An MP4 writer for frames of that shape (H, W, 3)."""
    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), fourcc, rate, (shape[1], shape[0]))
    if not writer.isOpened():
        raise UserError(f"OpenCV cannot write a video into {shown(path.parent)}")
    return writer
