"""Look at a data set before anything is trained on it.

Reads every entry and decodes every image; prints what is wrong and what training would do about
it, the classes, and last whether it is ready to train. Pictures show images with their boxes and
class names, and the worst cases. Nothing is changed.

With --model, a trained detector is asked as well: annotations that it contradicts are listed, the
surest first, and drawn.

Exit code 1: training would stop, or be less than it should be. 0: it would not. What a model
contradicts does not count.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..defaults import MAX_PIXELS
from ..durable import write_text
from ..engine import user_errors
from ..engine.arguments import add_trust_argument
from ..engine.parsers import Parser, make_parser
from ..errors import UserError
from ..program import training_line
from ..texts import printable, shown

if TYPE_CHECKING:
    from ..data.findings import Finding
    from ..data.inspection import DatasetReport
    from ..engine import Predictor

EXAMPLES = """
PROG my/data.yaml --num-queries 100
PROG my/train.json my/images --num-queries 100
PROG my/train.json my/images --test my/val.json my/val_images
PROG my/train.json my/images --model output/mine
PROG my/train.json my/images --model model.pth --config-file CONFIG --num-suspects 60
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument(
        "json_file",
        metavar="PATH",
        nargs="?",
        help="annotations in COCO's format, before IMAGES; or a data set in any known format (a "
        "folder, data.yaml or file), whose splits are checked as training takes them",
    )
    parser.add_argument("image_root", metavar="IMAGES", nargs="?", help="folder of the images")
    parser.add_argument("--data", metavar="PATH", help="the same as PATH alone")
    parser.add_argument(
        "--image-root", metavar="FOLDER", dest="root", help="of the images of --data, if elsewhere"
    )
    parser.add_argument("--format", help="of --data, where what is there does not say it")
    parser.add_argument(
        "--test",
        nargs="+",
        metavar=("JSON", "IMAGES"),
        help="of a test set in COCO's format, with its own images or the same folder: checked as "
        "well, and for what both have",
    )
    parser.add_argument(
        "--num-queries", type=int, help="of the detector: images with more objects are listed"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="images may lie outside of the folder"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="larger images count as unreadable"
    )
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="output/check_dataset",
        help="for samples.png, worst.png and report.json (default: %(default)s)",
    )
    parser.add_argument(
        "--num-pictures", type=int, default=16, help="images a sheet (default: %(default)s)"
    )
    model = parser.add_argument_group("label errors")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a run, or a checkpoint: annotations that its detector contradicts",
    )
    model.add_argument(
        "--config-file",
        metavar="FILE",
        help="config of the checkpoint, where none lies beside it: a path, or a packaged name",
    )
    model.add_argument(
        "--min-score",
        type=float,
        default=0.5,
        help="least score of a detection that contradicts (default: %(default)s)",
    )
    model.add_argument(
        "--num-suspects",
        type=int,
        default=30,
        help="so many are printed and drawn; the JSON has all (default: %(default)s)",
    )
    add_trust_argument(model)
    return parser


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The arguments, which fit together."""
    parser = get_parser(prog)
    args = parser.parse_args(argv)
    if args.image_root is None and args.json_file is not None:
        if args.data is not None:
            parser.error("PATH and --data are the same")
        args.data, args.json_file = args.json_file, None
    if args.data is None and args.json_file is None:
        parser.error("a data set is missing: PATH, or JSON and IMAGES")
    if args.json_file is not None and Path(args.json_file).expanduser().is_dir():
        parser.error(
            f"{shown(args.json_file)} is a folder: give it alone, or a COCO JSON and its IMAGES"
        )
    if args.data is not None and args.json_file is not None:
        parser.error("--data takes the place of JSON and IMAGES")
    if args.data is None and (args.root or args.format):
        parser.error("--image-root and --format go with --data")
    if args.test and (args.data is not None or len(args.test) > 2):
        parser.error(
            "--test goes with JSON and IMAGES, and takes a JSON, and a folder where the images are "
            "not the same"
        )
    if args.config_file and not args.model:
        parser.error("--config-file goes with --model")
    return args


def print_findings(findings: Iterable[Finding]) -> None:
    """One line for each, and examples."""
    for finding in findings:
        mark = "HARM" if finding.severity == "harm" else finding.severity
        print(f"{mark:8}  {finding.count} {finding.message}")
        for example in finding.examples:
            print(f"            {printable(example)}")
        if finding.count > len(finding.examples) > 1:
            print("            ...")


def print_report(report: DatasetReport) -> None:
    """What was found, and the classes."""
    from tabulate import tabulate

    print(
        f"{report.num_images} images, {report.num_boxes} boxes of {len(report.classes)} classes, "
        f"at most {report.most_objects} objects in an image\n"
    )
    print_findings(report.findings)
    if not report.findings:
        print("nothing is wrong")
    most = max(report.classes.values(), default=0)
    if most:
        ordered = sorted(report.classes.items(), key=lambda item: -item[1])
        rows = [(_bar(count / most), count, shown(name)) for name, count in ordered]
        print("\n" + tabulate(rows, headers=["", "boxes", "class"]))


def _bar(share: float) -> str:
    return "#" * max(round(30 * share), int(share > 0))


def write_files(report: DatasetReport, args: argparse.Namespace, prefix: str = "") -> None:
    """report.json, samples.png and worst.png."""
    from ..visualization import save_picture
    from ..visualization.datasets import draw_samples, draw_worst

    folder = Path(args.output)
    document = {
        "images": report.num_images,
        "boxes": report.num_boxes,
        "classes": report.classes,
        "harmful": report.is_harmful,
        "findings": {finding.kind: asdict(finding) for finding in report.findings},
    }
    text = json.dumps(document, indent=2, default=str)
    path = folder / f"{prefix}report.json"
    write_text(path, text)
    print(f"\n{path} lists every image concerned")
    for name, draw, what in (
        ("samples", draw_samples, "images with their boxes"),
        ("worst", draw_worst, "the worst images"),
    ):
        sheet = draw(report, args.num_pictures, max_pixels=args.max_pixels)
        if sheet is not None:
            print(f"{save_picture(sheet, folder / f'{prefix}{name}.png')} shows {what}")


def inspect(args: argparse.Namespace) -> Iterator[tuple[str, DatasetReport]]:
    """Of each split, what it is called; with a progress bar."""
    from tqdm import tqdm

    from ..data.formats import FORMATS, open_source
    from ..data.inspection import inspect_data, inspect_dataset

    options = {
        "num_queries": args.num_queries,
        "allow_outside": args.allow_outside,
        "max_pixels": args.max_pixels,
        "workers": args.workers,
        "progress": lambda items, total: tqdm(items, "reading images", total, unit=" images"),
    }
    if args.data is None:
        yield "train", inspect_dataset(args.json_file, args.image_root, **options)
        if args.test:
            root = (args.test[1:] or [args.image_root])[0]
            yield "test", inspect_dataset(args.test[0], root, **options)
        return
    where = {"format": args.format, "image_root": args.root}
    source = open_source(args.data, allow_outside=args.allow_outside, **where)
    print(f"{shown(args.data)}: {FORMATS[source.format].title} ({shown(source.evidence)})")
    splits: tuple[str | None, ...] = source.splits or (None,)
    if "train" in splits and "val" not in splits:  # some of the training images are held out
        splits = ("train", "val", *(s for s in splits if s != "train"))
    for split in splits:
        yield split or "train", inspect_data(args.data, split, **where, **options)


_TITLES = {"train": "Training set", "val": "Validation set", "test": "Test set"}


def build_predictor(args: argparse.Namespace) -> Predictor:
    """The detector of ``--model``."""
    from ..engine import Predictor
    from ..memory import keep_memory_on_cpu

    if args.config_file is None:
        predictor = Predictor.from_run(args.model, trust_config=args.trust_config)
    else:
        predictor = Predictor.from_config(
            args.config_file, args.model, trust_config=args.trust_config
        )
    keep_memory_on_cpu(predictor.model)
    return predictor


def suspect_labels(
    predictor: Predictor, report: DatasetReport, args: argparse.Namespace, prefix: str = ""
) -> None:
    """Print, draw and write down what a detector contradicts."""
    from tabulate import tabulate
    from tqdm import tqdm

    from ..engine.label_errors import find_label_errors
    from ..evaluation.label_errors import KINDS
    from ..visualization.label_errors import render_suspects

    found = find_label_errors(
        predictor,
        report,
        threshold=args.min_score,
        max_pixels=args.max_pixels,
        progress=lambda items: tqdm(items, "asking the model", unit=" images", disable=None),
    )
    findings = [e.as_dict(report.images[e.image_id]["file_name"]) for e in found]
    rows = [
        [
            f"{f['score']:.2f}",
            shown(f["file_name"]),
            "-" if f["annotation_id"] is None else shown(f["annotation_id"]),
            KINDS[f["kind"]],
            shown(e.says),
        ]
        for e, f in zip(found[: args.num_suspects], findings)
    ]
    print()
    if rows:
        header = ["score", "file", "annotation", "suspect", "annotated"]
        print(tabulate(rows, headers=header, disable_numparse=True))
    counts = Counter(f["kind"] for f in findings)
    parts = "; ".join(f"{text}: {counts[kind]}" for kind, text in KINDS.items())
    print(f"\n{len(findings)} suspects ({parts})")
    page = render_suspects(
        findings,
        report,
        title="Suspect annotations",
        about={
            "model": str(args.model),
            "data": f"{report.num_images} images, {report.num_boxes} boxes",
        },
        words=KINDS,
        count=args.num_suspects,
        max_pixels=args.max_pixels,
    )
    folder = Path(args.output)
    write_text(folder / f"{prefix}label_errors.html", page)
    write_text(folder / f"{prefix}label_errors.json", json.dumps(findings, indent=1))
    print(f"{folder}/{prefix}label_errors.html shows the first; the .json beside it lists all")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv, prog)
    with user_errors():
        from ..data.findings import first_harm
        from ..data.inspection import compare_splits

        if not 0 < args.min_score < 1:
            raise UserError(f"--min-score must lie between 0 and 1, got {args.min_score}")
        predictor = build_predictor(args) if args.model else None
        verdicts: list[str] = []
        harmful = False
        train = None
        for split, report in inspect(args):
            title = _TITLES[split]
            prefix = "" if train is None else f"{split}_"
            if train is not None or args.data:
                print(f"\n{title}{f' {args.test[0]}' if args.test else ''}:")
            print_report(report)
            write_files(report, args, prefix)
            if predictor is not None:
                suspect_labels(predictor, report, args, prefix)
            verdicts.append(f"{title}: {report.verdict}")
            harmful = harmful or report.is_harmful
            if train is None:
                train = report
                continue
            between = compare_splits(train, report)
            print()
            print_findings(between)
            if (harm := first_harm(between)) is not None:
                verdicts.append(f"Training set and {title.lower()}: {harm.examples[0]}.")
                harmful = True
        if len(verdicts) == 1:
            verdicts = [verdicts[0].partition(": ")[2]]
        print("\n" + "\n".join(verdicts))
        if args.data and not (harmful or args.model):
            line = training_line(args.data, image_root=args.root, format=args.format)
            print(shown(f"train on it:   {line}"))
    return int(harmful)
