"""Detect objects in pictures, folders, a video or the webcam, and draw them.

Without --config-file and weights it uses the checkpoint of the built-in shapes data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..defaults import DEFAULT_SCORE_THRESHOLD
from ..durable import renamed_when_complete, write_text
from ..engine import user_errors
from ..engine.arguments import add_config_arguments, find_pictures, parse_arguments
from ..engine.parsers import make_parser
from ..engine.shipped import shipped_config
from ..errors import UserError
from ..texts import shown

if TYPE_CHECKING:
    import cv2
    import numpy as np
    from detectron2.structures import Instances

    from ..engine import Predictor
    from ..export import OnnxPredictor

EXAMPLES = """
PROG --input a.jpg folder/ "more/*.png" --output out/
PROG --video-input clip.mp4 --output out/
PROG --config-file hf://OWNER/NAME --input folder/ --output out/
PROG --config-file output/mine/config.yaml --input folder/ --output out/ --save-json out/found.json
"""
WINDOW = "detections"
WRITTEN_AS_IS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ESCAPE = 27


class UnreadablePicture(UserError):
    """A file that cannot be decoded."""


def get_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line, with the flags of Detectron2's demo."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    add_config_arguments(parser, has_default=False)
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="a detector that tools/export.py has written, in place of config and weights",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="pictures, folders of pictures, or globs"
    )
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder to write to, made if missing; or a file, for one picture or a video (.mp4). "
        "Without it, results are shown in a window",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=DEFAULT_SCORE_THRESHOLD,
        help="least score of what is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        help="enlargement of the drawn pictures; unless given, small ones are enlarged so that "
        "the labels are legible",
    )
    parser.add_argument(
        "--save-json", metavar="FILE", help="also write the detections in COCO's result format"
    )
    return parser


def choose_outputs(files: Sequence[Path], output: str) -> list[Path]:
    """One file to write for each input, no two the same.

    Inputs of the same name, from different folders, are told apart by a number. Formats that are
    only read are written as PNG.

    Raises:
        UserError: a result would overwrite an input, or ``output`` is a file where a folder is
            needed.
    """
    target = Path(os.path.expanduser(output))
    if len(files) == 1 and target.suffix.lower() in WRITTEN_AS_IS and not target.is_dir():
        outputs = [target]
    else:
        if target.exists() and not target.is_dir():
            raise UserError(f"--output {output} is a file, but {len(files)} pictures need a folder")
        names = [
            file.stem + (file.suffix if file.suffix.lower() in WRITTEN_AS_IS else ".png")
            for file in files
        ]
        from ..visualization import distinct_names

        outputs = [target / name for name in distinct_names(names)]
    inputs = {file.resolve() for file in files}
    for path in outputs:
        if path.resolve() in inputs:
            raise UserError(f"{path} is an input: choose another --output")
    return outputs


def check_display() -> None:
    """Raise UserError where no window can be opened."""
    advice = "give --output FOLDER to write the results instead"
    if sys.platform.startswith("linux"):
        # Asked first: with no display, some OpenCV builds end the process instead of raising.
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError(f"there is no display to show results on: {advice}")
    import cv2

    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise UserError(f"this OpenCV cannot open windows: {advice}") from error


def read_picture(path: Path) -> np.ndarray:
    """BGR picture, turned as its EXIF data says.

    Raises:
        UnreadablePicture: the file cannot be decoded.
    """
    from ..data import read_image

    try:
        return read_image(path, "BGR")
    except OSError as error:
        raise UnreadablePicture(f"{shown(path)}: cannot be decoded ({error})") from error


def why_nothing(instances: Instances) -> str:
    """What to try where no detection is shown."""
    if not len(instances):
        return "none of any score: are these the weights of this config?"
    return (
        f"the best score is {float(instances.scores.max()):.2f}: lower --confidence-threshold; a "
        "detector that is to find these objects is trained on pictures like these"
    )


def run_on_pictures(args: argparse.Namespace, predictor: Predictor | OnnxPredictor, logger) -> int:
    """Detect in all pictures; returns how many could not be decoded."""
    import cv2
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from tqdm import tqdm

    from ..data import UnreadableImageError
    from ..visualization import draw_detections, save_picture, select_confident

    files = find_pictures(args.input)
    outputs = choose_outputs(files, args.output) if args.output else [None] * len(files)
    if args.save_json and Path(args.save_json).expanduser().is_dir():
        raise UserError(f"--save-json {args.save_json} is a folder: name a file in it")
    names = predictor.metadata.get("thing_classes", None)
    results, unreadable = [], []
    for file, output in zip(tqdm(files, unit="picture", disable=len(files) == 1), outputs):
        try:
            image = read_picture(file)
            start = time.perf_counter()
            instances = predictor(image)["instances"]
        except (UnreadableImageError, UnreadablePicture) as error:
            unreadable.append(file)
            tqdm.write(f"skipped {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        drawn = draw_detections(
            image[:, :, ::-1],
            instances,
            predictor.metadata,
            threshold=args.confidence_threshold,
            scale=args.scale,
        )
        kept = select_confident(instances, args.confidence_threshold)
        for result in instances_to_coco_json(kept, str(file)):
            index = result["category_id"]
            result["category_name"] = names[index] if names else str(index)
            results.append(result)
        note = f"{shown(file)}: {len(kept)} detections in {seconds:.2f} s"
        if not len(kept):
            note += f" ({why_nothing(instances)})"
        if output is not None:
            save_picture(drawn, output)
            tqdm.write(f"{note} -> {shown(output)}")
            continue
        tqdm.write(note)
        cv2.imshow(WINDOW, drawn[:, :, ::-1])
        if cv2.waitKey(0) == ESCAPE:
            break
    if args.save_json:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        write_text(Path(args.save_json).expanduser(), text)
    if unreadable:
        listed = ", ".join(map(shown, unreadable))
        logger.error("%d of %d pictures unreadable: %s", len(unreadable), len(files), listed)
    return len(unreadable)


def read_frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """BGR frames until the source ends."""
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield frame


def video_output(output: str, name: str) -> Path:
    """The .mp4 to write: the file named, or ``name``.mp4 in the folder named."""
    target = Path(os.path.expanduser(output))
    if target.is_dir() or target.suffix.lower() != ".mp4":
        if target.exists() and not target.is_dir():
            raise UserError(f"--output {output} is a file, but not an .mp4")
        target = target / f"{name}.mp4"
    return target


def run_on_video(args: argparse.Namespace, predictor: Predictor | OnnxPredictor, logger) -> int:
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
        count, detections, best = draw_video(args, predictor, logger, source, partial)
    where = f" -> {shown(path)}" if path else ""
    if not detections:
        where += f" ({why_nothing(best)})"
    logger.info("%s: %d frames, %d detections%s", shown_source, count, detections, where)
    return 0


def draw_video(
    args: argparse.Namespace,
    predictor: Predictor | OnnxPredictor,
    logger,
    source: int | str,
    path: Path | None,
) -> tuple[int, int, Instances]:
    """Frames, detections, and the best one, of a video that is drawn into an .mp4 or a window."""
    import cv2
    import numpy as np
    from tqdm import tqdm

    from ..visualization import draw_detections, select_confident

    shown_source = "the camera" if args.webcam else shown(args.video_input)
    capture = cv2.VideoCapture(source)
    writer, best, count, detections = None, None, 0, 0
    try:
        if not capture.isOpened():
            raise UserError(f"cannot open {shown_source} as video")
        total = 0 if args.webcam else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 25.0
        progress = tqdm(read_frames(capture), total=max(total, 0) or None, unit="frame")
        try:
            for frame in progress:
                instances = predictor(frame)["instances"]
                kept = select_confident(instances, args.confidence_threshold)
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
    return count, detections, best


def count_frames(path: Path) -> int:
    """Of a video, by its header; 0 if it has none."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return count


def open_writer(path: Path, rate: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    """An MP4 writer for frames of that shape (H, W, 3)."""
    import cv2

    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), fourcc, rate, (shape[1], shape[0]))
    if not writer.isOpened():
        raise UserError(f"OpenCV cannot write a video into {shown(path.parent)}")
    return writer


def build_predictor(args: argparse.Namespace) -> Predictor | OnnxPredictor:
    """The detector that the command line names.

    Raises:
        UserError: it names two.
        ImportError: ``--onnx`` without ONNX Runtime.
        FileNotFoundError, KeyError, ValueError: the files are missing or unfit.
    """
    if args.onnx is None:
        from ..engine import Predictor

        return Predictor.from_config(
            args.config_file or shipped_config(),
            overrides=args.opts,
            trust_config=args.trust_config,
        )
    if args.config_file or args.opts:
        raise UserError(
            "--onnx holds a whole detector: leave --config-file, --weights and overrides out"
        )
    from ..export import OnnxPredictor

    return OnnxPredictor(args.onnx)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code: 0, or 1 when an input could not be decoded or used."""
    args = parse_arguments(get_parser(prog), argv)
    from ..engine.logs import set_up_console

    logger = set_up_console("demo")
    set_up_console("detection_toolkit")
    with user_errors():
        if not args.output:
            check_display()
        predictor = build_predictor(args)
        run = run_on_pictures if args.input else run_on_video
        return 1 if run(args, predictor, logger) else 0
