"""Export a detector as one file: an ONNX model, or a program that torch.export.load reads; or as a
folder for the Hugging Face hub.

Before the file is written its detections are compared with those of the detector, on random images
of sizes that were not traced. --benchmark also times both on the CPU. docs/export.md describes the
file's inputs and outputs.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..defaults import INPUT_TYPES, RUNTIMES
from ..durable import write_durably
from ..engine import user_errors
from ..engine.arguments import (
    add_overrides_argument,
    add_weights_arguments,
    parse_arguments,
)
from ..engine.parsers import Parser, make_parser
from ..errors import UserError
from ..texts import shown

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ..engine.predictor import Predictor

    Run = Callable[[torch.Tensor, torch.Tensor], Sequence]

TRACED_SIZE = (96, 160)
# (height, width) of the images of each batch: one and more, alike and not, divisible by 32 or not,
# larger and smaller than what is traced, upright and lying. Batches of more than 64 pixels, as
# programs of torch.export take no map of one cell.
PARITY_SIZES = (
    ((96, 96),),
    ((TRACED_SIZE[0] + 1, TRACED_SIZE[1] + 31),),
    ((200, 133), (171, 240)),
    ((129, 97), (33, 255), (256, 256)),
    ((320, 211),),
)

CALIBRATION_IMAGES = 48  # for int8

EXAMPLES = """
PROG --config-file CONFIG --output model.onnx
PROG --weights output/mine/model_best.pth --output model.onnx
PROG --config-file output/mine/config.yaml --output model.onnx --benchmark 480 640
PROG --config-file output/mine/config.yaml --output model.onnx --precision float16
PROG --config-file output/mine/config.yaml --output model.onnx --precision int8 --max-ap-loss 1
PROG --config-file output/mine/config.yaml --output model.onnx --runtime openvino
PROG --config-file output/mine/config.yaml --format torch_export --output model.pt2
PROG --config-file output/mine/config.yaml --hub-folder published --hub-name me/bolts
"""


# Of what other projects export to: TensorRT, TFLite, CoreML, OpenVINO, TensorFlow, TorchScript.
_OTHER_FORMATS = (
    ".engine",
    ".trt",
    ".tflite",
    ".mlmodel",
    ".mlpackage",
    ".xml",
    ".pb",
    ".torchscript",
)


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument(
        "--config-file", metavar="FILE", help="path or name; weights of a run need none"
    )
    parser.add_argument("--format", choices=("onnx", "torch_export"), default="onnx")
    parser.add_argument("--output", type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--hub-folder",
        type=Path,
        metavar="DIR",
        help="write weights (safetensors), config and model card there, for the Hugging Face hub; "
        "without --output nothing else",
    )
    parser.add_argument(
        "--hub-name",
        default="",
        metavar="OWNER/NAME",
        help="what the folder will be called on the hub, for the commands of its card",
    )
    parser.add_argument(
        "--input-type",
        choices=INPUT_TYPES,
        default="float32",
        help="type of the images that the file takes (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of products and convolutions in an ONNX file; float16 and int8 are judged by AP on "
        "the test set of the config, and int8 needs its training set. float16 is also that of the "
        "weights in --hub-folder, which are not judged (default: %(default)s)",
    )
    parser.add_argument(
        "--max-ap-loss",
        type=float,
        metavar="AP",
        help="the file is not written if AP falls by more (default: 0.5 for --precision float16 "
        "and int8; float32 is judged only where this is given)",
    )
    parser.add_argument(
        "--stages",
        type=int,
        metavar="K",
        help="leave out the stages after the first K (model.stages_at_test)",
    )
    for option, purpose in (
        ("--parity-size", "compare on one image of this size, too"),
        ("--benchmark", "time both on one image of this size"),
    ):
        parser.add_argument(option, nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help=purpose)
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        help="what runs the ONNX file when it is compared, judged and timed (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="timed runs of each (default: %(default)s)"
    )
    add_weights_arguments(parser)
    add_overrides_argument(parser, "changes to the config")
    return parser


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The arguments, of which each is possible by itself."""
    parser = get_parser(prog)
    args = parse_arguments(parser, argv)
    for name in ("parity_size", "benchmark"):
        size = getattr(args, name)
        if size and min(size) < 1:
            parser.error(f"--{name.replace('_', '-')} {size[0]} {size[1]}: sides must be positive")
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    if args.config_file is None:
        parser.error("name the detector: --config-file FILE, or the weights of a run as --weights")
    if args.output is None and args.hub_folder is None:
        parser.error("name what to write: --output FILE, or --hub-folder DIR")
    kinds = {".onnx": "onnx", ".pt2": "torch_export"}
    suffix = Path(args.output or "").suffix.lower()
    if suffix in _OTHER_FORMATS:
        parser.error(
            f"--output {shown(args.output)}: nothing is exported to {suffix}; there is ONNX "
            "(.onnx), which other programs convert, and --format torch_export (.pt2)"
        )
    if kinds.get(suffix, args.format) != args.format:
        parser.error(f"--output {shown(args.output)}: this is --format {kinds[suffix]}")
    if args.hub_name and args.hub_folder is None:
        parser.error("--hub-name goes with --hub-folder")
    if args.hub_name and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.hub_name):
        parser.error(f"--hub-name {args.hub_name}: it has the form OWNER/NAME")
    if args.precision != "float32" and args.format != "onnx":
        parser.error(f"--precision {args.precision} is for --format onnx")
    if args.precision == "int8" and args.output is None:
        parser.error("--precision int8 is for --output FILE")
    if args.runtime != RUNTIMES[0] and args.format != "onnx":
        parser.error(f"--runtime {args.runtime} is for --format onnx")
    return args


def open_exported(
    content: bytes, kind: str, input_type: str, threads: int, runtime: str = RUNTIMES[0]
) -> Run:
    """The exported detector as a function of uint8 images and their sizes."""
    import torch

    from ..export import open_runtime, run_session

    if kind == "onnx":
        session, _ = open_runtime(content, runtime, threads=threads)
        return lambda images, sizes: run_session(session, images.numpy(), sizes.numpy())
    module = torch.export.load(io.BytesIO(content)).module()
    dtype = getattr(torch, input_type)
    return torch.no_grad()(lambda images, sizes: module(images.to(dtype), sizes))


def benchmark(detector: nn.Module, run: Run, size: tuple[int, int], runs: int) -> tuple:
    """Median seconds of the detector and of what was exported, on one image of that size."""
    import torch

    from ..studies.timing import alternate

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    batch, sizes = image[None], torch.tensor([size])
    timed = {"eager": lambda: detector([{"image": image}]), "file": lambda: run(batch, sizes)}
    with torch.no_grad():
        seconds = alternate(timed, device=torch.device("cpu"), rounds=runs)
    return seconds["eager"], seconds["file"]


def calibration_images(predictor: Predictor) -> Iterator[np.ndarray]:
    """Images (3, H, W) of the config's training set, spread over it, as the detector takes them.

    Raises:
        FileNotFoundError, KeyError, ValueError: the training set is missing or damaged.
    """
    from detectron2.config import instantiate

    from ..data import read_image

    records = instantiate(predictor.cfg.dataloader.train.dataset)
    for record in records[:: max(1, len(records) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]:
        picture = read_image(record["file_name"], "BGR")
        yield predictor.preprocess(picture)["image"].numpy()


def judge_by_ap(predictor: Predictor, run: Run, max_loss: float) -> None:
    """Print AP of the detector and of what was exported, on the test set of the config.

    Raises:
        UserError: that of the exported one is lower by more than this, or there is no AP.
    """
    import torch
    from detectron2.data import MetadataCatalog

    from ..data import check_same_classes, dataset_names
    from ..engine import Trainer
    from ..export import ExportedDetector

    names = dataset_names(predictor.cfg.dataloader.test.dataset)
    ours, theirs = (
        metadata.get("thing_classes")
        for metadata in (predictor.metadata, MetadataCatalog.get(names[0]))
    )
    if ours is not None and theirs is not None:
        check_same_classes(ours, theirs, "the detector", "the test set")
    with tempfile.TemporaryDirectory() as folder:
        cfg = copy.deepcopy(predictor.cfg)
        cfg.train.output_dir = folder
        exported = ExportedDetector(lambda *given: run(*map(torch.from_numpy, given)))
        found = [Trainer.test(cfg, model) for model in (predictor.model, exported)]
    before, after = (x.get("bbox", {}).get("AP", math.nan) for x in found)
    print(f"AP on {', '.join(names)}: {before:.2f}, of the file {after:.2f}")
    if not after >= before - max_loss:
        raise UserError(f"AP falls by more than {max_loss}, so the file is not written")


def export(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the detector cannot be exported, its weights are of another config, or what
            was exported differs from it.
        ImportError: packages are missing.
        FileNotFoundError, KeyError: of the config and its weights.
        OSError: the file cannot be written.
    """
    from ..engine.inspection import build_inspected_detector
    from ..engine.logs import set_up_console
    from ..engine.publishing import check_folder, publish
    from ..export.runtime import require
    from ..memory import keep_memory_on_cpu
    from ..modeling import require_query_detector

    if args.hub_folder is not None:
        check_folder(args.hub_folder)
    if args.output is not None and args.output.is_dir():
        raise IsADirectoryError(f"--output {args.output} is a folder: name a file in it")
    if args.output is not None and args.format == "onnx":  # asked before minutes of work
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "ONNX export")
        if args.runtime == "openvino":
            require("openvino", "--runtime openvino", "openvino")
    set_up_console("detection_toolkit")
    predictor = build_inspected_detector(
        args.config_file, [*args.opts, "train.device=cpu"], trust_config=args.trust_config
    )
    keep_memory_on_cpu(predictor.model)
    if args.stages is not None:
        decoder = require_query_detector(predictor.model, "--stages").decoder
        decoder.limit_stages_at_test(args.stages)
        predictor.cfg.model.stages_at_test = args.stages
    if args.hub_folder is not None:
        publish(
            predictor,
            args.hub_folder,
            source=args.config_file,
            half=args.precision == "float16",
            hub_name=args.hub_name,
            trust_config=args.trust_config,
        )
        print(f"wrote {args.hub_folder}: read its README.md, which has no license yet")
    if args.output is not None:
        export_file(args, predictor)


def export_file(args: argparse.Namespace, predictor: Predictor) -> None:
    """Write ``--output``; see :func:`export`."""
    import torch

    from ..export import (
        Description,
        exportable_detector,
        measure_parity,
        to_float16,
        to_int8,
        to_onnx,
        to_torch_export,
        trace,
    )

    description = Description.from_test_augmentations(
        predictor.aug.augs,
        class_names=predictor.metadata.get("thing_classes"),
        image_format=predictor.input_format,
    )
    detector = exportable_detector(predictor.cfg.model, predictor.model.state_dict())

    print("exporting, which takes a while", flush=True)
    start = time.perf_counter()
    program = trace(detector, input_type=args.input_type, example_size=TRACED_SIZE)
    write = to_onnx if args.format == "onnx" else to_torch_export
    content = write(program, description)
    print(f"exported in {time.perf_counter() - start:.0f} s, {len(content) / 1e6:.1f} MB")
    del program, detector

    how = (args.format, args.input_type, torch.get_num_threads(), args.runtime)
    run = open_exported(content, *how)
    sizes = [*PARITY_SIZES, *([(tuple(args.parity_size),)] if args.parity_size else [])]
    parity = measure_parity(predictor.model, run, sizes)
    print(f"compared on {len(sizes)} batches: {parity}")
    if not parity.holds:
        raise UserError(
            f"what was exported differs from the detector, so {args.output} is not written"
        )
    if args.precision != "float32":
        if args.precision == "float16":
            content = to_float16(content)
        else:
            content = to_int8(content, calibration_images(predictor))
        print(f"in {args.precision} {len(content) / 1e6:.1f} MB")
        run = open_exported(content, *how)
    max_loss = args.max_ap_loss
    if args.precision != "float32" or max_loss is not None:
        judge_by_ap(predictor, run, 0.5 if max_loss is None else max_loss)
    write_durably(args.output, lambda file: file.write(content))
    print(f"wrote {args.output}")
    if args.benchmark:
        eager, exported = benchmark(predictor.model, run, tuple(args.benchmark), args.runs)
        names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
        name = names[args.runtime] if args.format == "onnx" else "exported program"
        print(
            f"{eager / exported:.2f} times as fast as PyTorch: {name} {1000 * exported:.1f} ms an "
            f"image, PyTorch {1000 * eager:.1f} ms (batches of one, {args.benchmark[0]}x"
            f"{args.benchmark[1]} pixels, {torch.get_num_threads()} threads, median of {args.runs})"
        )


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    args = parse_args(argv, prog)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors():
        export(args)
