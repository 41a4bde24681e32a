"""Detect objects in pictures, folders, a video or the webcam, and draw them.

Without --config-file and weights it uses the checkpoint of the built-in shapes data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..defaults import DEFAULT_SCORE_THRESHOLD, RUNTIMES, TILE_OVERLAP
from ..durable import write_text
from ..engine import user_errors
from ..engine.arguments import (
    add_config_arguments,
    find_pictures,
    named_files,
    parse_arguments,
)
from ..engine.parsers import Parser, make_parser
from ..engine.shipped import shipped_config
from ..errors import UserError
from ..texts import shown

if TYPE_CHECKING:
    import numpy as np
    from detectron2.structures import Instances

    from ..engine import Predictor
    from ..engine.tiling import PicturePredictor
    from ..export import OnnxPredictor

EXAMPLES = """
PROG --input a.jpg folder/ "more/*.png" --output out/
PROG --video-input clip.mp4 --output out/
PROG --config-file hf://OWNER/NAME --input folder/ --output out/
PROG --config-file output/mine/config.yaml --input folder/ --output out/ --save-json out/found.json
PROG --input folder/ --output out/ --batch-size 8
PROG --input large.jpg --output out/ --tile 640 --tile-overlap 0.3
PROG --video-input clip.mp4 --output out/ --track --save-json out/tracks.json
"""
WINDOW = "detections"
WRITTEN_AS_IS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ANIMATED = (".gif", ".webp")  # what may hold several pictures
ESCAPE = 27


class UnreadablePicture(UserError):
    """A file that cannot be decoded."""


def get_parser(prog: str | None = None) -> Parser:
    """The command line, with the flags of Detectron2's demo."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    add_config_arguments(parser, has_default=False)
    parser.add_argument(
        "--onnx",
        metavar="FILE",
        help="a detector that tools/export.py has written, in place of config and weights",
    )
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help=f"with --onnx: what runs the file (default: {RUNTIMES[0]})",
    )
    parser.add_argument(
        "--provider",
        metavar="NAME",
        help="with --onnx: what ONNX Runtime computes with, such as cuda (default: cpu)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="pictures, folders of pictures, or globs; or one video or animated GIF",
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
        "--save-json",
        metavar="FILE",
        help="also write the detections in COCO's result format; those of a video have the "
        "frame, from 0 on, as image_id, and its time in seconds",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="pictures, frames or tiles that go through the network together, where they have one "
        "size (default: %(default)s)",
    )
    parser.add_argument(
        "--tile",
        metavar="WIDTH[xHEIGHT]",
        help="detect in tiles of so many pixels, in which small objects of large pictures keep "
        "their size, and in the whole picture",
    )
    parser.add_argument(
        "--tile-overlap",
        type=float,
        metavar="SHARE",
        help=f"share of a tile that the next one shows, too (default: {TILE_OVERLAP})",
    )
    parser.add_argument(
        "--tiles-only", action="store_true", help="leave out the whole picture beside the tiles"
    )
    parser.add_argument(
        "--track",
        action="store_true",
        help="number the objects of a video: by ByteTrack, of the package trackers",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Before anything is loaded; ``tile`` becomes a ``Tiling``, a video as input a video input.

    So does an animated GIF that is given alone, unless a picture is to be written.

    Raises:
        UserError: arguments that do not fit together, or values that cannot be.
        ImportError: ``--track`` without its packages.
    """
    if args.input:
        from ..data.videos import VIDEO_SUFFIXES

        files = named_files(args.input)
        videos = [
            str(file)
            for file in files
            if file.suffix.lower() in VIDEO_SUFFIXES and not file.is_dir()
        ]
        if videos and len(files) > 1:
            raise UserError(f"{shown(videos[0])} is a video: give it by itself")
        if not videos and len(files) == 1 and files[0].suffix.lower() == ".gif":
            from ..data.images import is_animation

            as_picture = args.output and Path(args.output).suffix.lower() in WRITTEN_AS_IS
            videos = [str(files[0])] if is_animation(files[0]) and not as_picture else []
        if videos:
            args.video_input, args.input = videos[0], None
    if args.onnx is None and (args.runtime or args.provider):
        raise UserError("--runtime and --provider are for --onnx FILE")
    if args.runtime == "openvino" and args.provider:
        raise UserError("--provider is for --runtime onnxruntime: OpenVINO runs on the CPU here")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.save_json and Path(args.save_json).expanduser().is_dir():
        raise UserError(f"--save-json {args.save_json} is a folder: name a file in it")
    if args.tile is None and (args.tile_overlap is not None or args.tiles_only):
        raise UserError("--tile-overlap and --tiles-only need --tile WIDTH[xHEIGHT]")
    if args.tile is not None:
        from ..engine.tiling import Tiling

        sides = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", args.tile.lower())
        if sides is None:
            raise UserError(f"--tile {shown(args.tile)}: give pixels, as in 640 or 640x480")
        args.tile = Tiling(
            int(sides[1]),
            int(sides[2] or sides[1]),
            TILE_OVERLAP if args.tile_overlap is None else args.tile_overlap,
            whole=not args.tiles_only,
        )
    if args.track:
        if args.input:
            raise UserError("--track is for --video-input and --webcam: pictures have no order")
        from ..engine.tracking import Tracker

        Tracker(frame_rate=25.0, threshold=args.confidence_threshold)  # are its packages there?


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


def why_nothing(instances: Instances, *, advise: bool = True) -> str:
    """Why no detection is shown, and what to try."""
    if not len(instances):
        return "none of any score" + ": are these the weights of this config?" * advise
    return f"the best score is {float(instances.scores.max()):.2f}" + (
        ": lower --confidence-threshold; a detector that is to find these objects is trained on "
        "pictures like these" * advise
    )


class Detected(NamedTuple):
    """A picture and what was found in it."""

    file: Path
    output: Path | None
    picture: np.ndarray
    instances: Instances
    seconds: float


def detect_in_files(
    files: Iterable[tuple[Path, Path | None]],
    predictor: PicturePredictor,
    batch_size: int,
    skip: Callable[[Path, Exception], None],
) -> Iterator[Detected]:
    """Detect in a batch of pictures at a time.

    Args:
        files: each with what is to be written.
        skip: is told of files that cannot be decoded or are too thin.
    """
    from ..data import UnreadableImageError

    remaining = iter(files)
    while batch := list(itertools.islice(remaining, batch_size)):
        read = []
        for file, output in batch:
            try:
                read.append((file, output, read_picture(file)))
            except UnreadablePicture as error:
                skip(file, error)
        try:
            parts = [(read, detect(predictor, [picture for *_, picture in read]))]
        except UnreadableImageError:  # of one of them: which one, it does not say
            parts = []
            for one in read:
                try:
                    parts.append(([one], detect(predictor, [one[2]])))
                except UnreadableImageError as error:
                    skip(one[0], error)
        for members, (found, seconds) in parts:
            for (file, output, picture), instances in zip(members, found):
                yield Detected(file, output, picture, instances, seconds)


def detect(
    predictor: PicturePredictor, pictures: Sequence[np.ndarray]
) -> tuple[list[Instances], float]:
    """What is found in each of a batch, and seconds for one."""
    start = time.perf_counter()
    found = list(predictor.predict(pictures, batch_size=max(len(pictures), 1)))
    return found, (time.perf_counter() - start) / max(len(pictures), 1)


def save_results(args: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    """Write --save-json, if there is one: a list, with one result in a line."""
    if args.save_json:
        lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
        write_text(Path(args.save_json).expanduser(), f"[\n{lines}\n]\n")


def run_on_pictures(args: argparse.Namespace, predictor: PicturePredictor, logger) -> int:
    """Detect in all pictures; returns how many could not be decoded."""
    import cv2
    from tqdm import tqdm

    from ..data.images import is_animation
    from ..engine.detections import coco_results
    from ..visualization import draw_detections, save_picture, select_confident

    files = find_pictures(args.input)
    outputs = choose_outputs(files, args.output) if args.output else [None] * len(files)
    names = predictor.metadata.get("thing_classes", None)
    results: list[dict] = []
    unreadable: list[Path] = []

    def skip(file: Path, error: Exception) -> None:
        unreadable.append(file)
        tqdm.write(f"skipped {error}", file=sys.stderr)

    progress = tqdm(
        zip(files, outputs), total=len(files), unit="picture", disable=len(files) == 1 or None
    )
    advise = True
    for found in detect_in_files(progress, predictor, args.batch_size, skip):
        drawn = draw_detections(
            found.picture[:, :, ::-1],
            found.instances,
            predictor.metadata,
            threshold=args.confidence_threshold,
            scale=args.scale,
        )
        kept = select_confident(found.instances, args.confidence_threshold)
        results += coco_results(kept, str(found.file), names)
        note = f"{shown(found.file)}: {len(kept)} detections in {found.seconds:.2f} s"
        if found.file.suffix.lower() in ANIMATED and is_animation(found.file):
            note += ", in the first picture of an animation"
        if not len(kept):
            note += f" ({why_nothing(found.instances, advise=advise)})"
            advise = False
        if found.output is not None:
            save_picture(drawn, found.output)
            tqdm.write(f"{note} -> {shown(found.output)}")
            continue
        tqdm.write(note)
        cv2.imshow(WINDOW, drawn[:, :, ::-1])
        if cv2.waitKey(0) == ESCAPE:
            break
    save_results(args, results)
    if unreadable:
        listed = ", ".join(map(shown, unreadable))
        logger.error("%d of %d pictures unreadable: %s", len(unreadable), len(files), listed)
    return len(unreadable)


def build_predictor(args: argparse.Namespace) -> Predictor | OnnxPredictor:
    """The detector that the command line names.

    Raises:
        UserError: it names two.
        ImportError: ``--onnx`` without ONNX Runtime.
        FileNotFoundError, KeyError, ValueError: the files are missing or unfit.
    """
    if args.onnx is None:
        from ..engine import Predictor
        from ..memory import keep_memory_on_cpu

        predictor = Predictor.from_config(
            args.config_file or shipped_config(),
            overrides=args.opts,
            trust_config=args.trust_config,
        )
        keep_memory_on_cpu(predictor.model)
        if args.config_file is None and not any("init_checkpoint" in text for text in args.opts):
            names = ", ".join(predictor.metadata.get("thing_classes", ()))
            logging.getLogger("demo").info(
                "without --config-file this is the shipped detector, which knows drawn shapes "
                "alone (%s)",
                names,
            )
        return predictor
    if args.config_file or args.opts:
        raise UserError(
            "--onnx holds a whole detector: leave --config-file, --weights and overrides out"
        )
    from ..export import OnnxPredictor, provider_names

    if args.runtime == "openvino":
        return OnnxPredictor(args.onnx, runtime=args.runtime)
    return OnnxPredictor(args.onnx, providers=provider_names(args.provider or "cpu"))


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code: 0, or 1 when an input could not be decoded or used."""
    args = parse_arguments(get_parser(prog), argv)
    from ..engine.logs import set_up_console

    logger = set_up_console("demo")
    set_up_console("detection_toolkit")
    with user_errors():
        check_arguments(args)
        if not args.output:
            check_display()
        predictor = build_predictor(args)
        if args.tile is not None:
            from ..engine.tiling import TiledPredictor

            predictor = TiledPredictor(predictor, args.tile)
        if args.input:
            run = run_on_pictures
        else:
            from .predict_video import run_on_video as run
        return 1 if run(args, predictor, logger) else 0
