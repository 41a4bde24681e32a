#!/usr/bin/env python
"""Convert DFvT weights of the authors' code for this implementation, and back.

    python tools/convert_dfvt_checkpoint.py official.pth --config-file CONFIG --output ours.pth
    python tools/convert_dfvt_checkpoint.py imagenet.pth --classifier small --output ours.pth
    python tools/convert_dfvt_checkpoint.py ours.pth --config-file CONFIG --output official.pth \\
        --to-official

CONFIG is the config of a detector whose backbone.bottom_up is a DFvT (a path, or a name such as
dfvt/mask_rcnn_dfvt_small_1x.py); KEY=VALUE arguments override its entries. The official file may be

- the ImageNet classifier or the detection backbone: the result holds the weights of the detector's
  backbone, and train_net.py takes it as train.init_checkpoint; the ImageNet weights leave the four
  output norms and three output convolutions of the backbone as initialised;
- the authors' whole Mask R-CNN: the result holds the whole detector if that is Mask R-CNN, else its
  backbone's part.

With --classifier the result is for dfvt.DFvTClassifier.

Exit status: 0, or 1 with the names of the tensors if file and model do not fit; the output is then
left as it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate

from detection_toolkit.checkpoint.official_files import (
    read_checkpoint,
    split_weights,
    write_checkpoint,
    write_official,
)
from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.errors import UserError
from dfvt import VARIANTS, DFvTClassifier
from dfvt.checkpoint import (
    convert_official_state_dict,
    convert_to_official,
    is_official_state_dict,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file to convert")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--config-file", help="config of the detector")
    target.add_argument("--classifier", choices=sorted(VARIANTS), help="the classifier of a size")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument("--to-official", action="store_true", help="convert in the other direction")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open files that run code when they are opened; only if you trust their source",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="entries of the config")
    # Options may stand among the overrides.
    args = parser.parse_intermixed_args(argv)
    if args.output.resolve() == args.checkpoint.resolve():
        parser.error("--output is the file to convert; choose another name")
    if args.classifier and args.overrides:
        parser.error("KEY=VALUE arguments go with --config-file")
    return args


def convert(args: argparse.Namespace) -> str:
    """Do it, and say what was done."""
    with torch.device("meta"):  # names and shapes are all that is needed of the model
        if args.classifier:
            model = DFvTClassifier(**VARIANTS[args.classifier])
        else:
            model = instantiate(apply_overrides(get_config(args.config_file), args.overrides).model)
    checkpoint = read_checkpoint(args.checkpoint, allow_pickle=args.allow_pickle)
    weights, _ = split_weights(checkpoint, args.checkpoint)
    if args.to_official:
        if is_official_state_dict(weights):
            raise UserError(f"{args.checkpoint} is an official checkpoint already")
        official = convert_to_official(weights, model)
        write_official(args.output, official)
        return f"{args.output}: {len(official)} tensors under their official names"
    converted = convert_official_state_dict(weights, model)
    write_checkpoint(args.output, converted, {})
    left = len(model.state_dict()) - len(converted)
    rest = f"; {left} more tensors of the model are not among them" if left else ""
    return f"{args.output}: {len(converted)} tensors{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(convert(args))
    except (ImportError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
