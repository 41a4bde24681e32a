"""Convert checkpoints of the authors' code for this implementation, and back.

--config-file is the config of the detector that the checkpoint belongs to (a path, or the name of
a packaged one); KEY=VALUE arguments override its entries. The result is a .pth or, with the
safetensors package, a .safetensors file, which train.init_checkpoint takes. There and back yields
the same tensors bit for bit, also those few that the authors' network holds without using them.

A file may also be named as hf://OWNER/NAME, of the Hugging Face hub, or as a folder that was
downloaded there. Where several publish a detector's weights, each under names of its own, --source
says whose the result has; the page of the detector in docs/ lists them, and what else its files may
be (classifiers, backbones).

Exit status: 0, or 1 with the names of the tensors if file and config do not fit; the output is then
left as it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..engine.arguments import (
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from ..engine.parsers import Parser, make_parser
from ..errors import UserError

EXAMPLES = """
PROG official.pth --config-file CONFIG --output ours.pth
PROG ours.pth --config-file CONFIG --output official.pth --to-official
"""


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog)
    parser.add_argument("checkpoint", help="file or folder to convert, or hf://OWNER/NAME")
    parser.add_argument("--config-file", required=True, help="config of the detector")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument("--to-official", action="store_true", help="convert in the other direction")
    parser.add_argument(
        "--source",
        default="",
        help="with --to-official: whose names, where several publish the detector's weights",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open files that run code when they are opened; only if you trust their source",
    )
    parser.add_argument(
        "--allow-missing-unused",
        action="store_true",
        help="accept an official file without the tensors that its network holds unused",
    )
    add_trust_argument(parser)
    add_overrides_argument(parser, "entries of the config")
    return parser


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The arguments, which fit together."""
    parser = get_parser(prog)
    args = parse_arguments(parser, argv)
    if args.source and not args.to_official:
        parser.error("--source goes with --to-official; whose a file is, its names tell")
    if args.output.resolve() == Path(args.checkpoint).resolve():
        parser.error("--output is the file to convert; choose another name")
    return args


def convert(args: argparse.Namespace) -> str:
    """Do it, and say what was done."""
    import torch
    from detectron2.config import instantiate

    from ..checkpoint.hub import local_file
    from ..checkpoint.official import (
        class_names,
        convert_official_state_dict,
        is_official_state_dict,
        official_file,
    )
    from ..checkpoint.official_files import (
        DESCRIPTION,
        read_checkpoint,
        split_weights,
        write_checkpoint,
        write_official,
    )
    from ..checkpoint.official_format import format_of_official
    from ..config import apply_overrides, get_config

    cfg = get_config(args.config_file, trust_config=args.trust_config)
    apply_overrides(cfg, args.opts)
    with torch.device("meta"):  # names and shapes are all that is needed of the model
        model = instantiate(cfg.model)
    path = local_file(args.checkpoint)
    checkpoint = read_checkpoint(path, allow_pickle=args.allow_pickle)
    weights, extras = split_weights(checkpoint, path, model.state_dict())
    if args.to_official:
        if is_official_state_dict(weights):
            raise UserError(f"{path} is an official checkpoint already")
        content = official_file(weights, model, extras=extras, source=args.source)
        write_official(args.output, content)
        count = len(split_weights(content, args.output)[0])
        return f"{args.output}: {count} tensors under their official names"
    converted = convert_official_state_dict(
        weights,
        model,
        require_unused=not args.allow_missing_unused,
        description=checkpoint.get(DESCRIPTION),
    )
    classes = class_names(checkpoint) or format_of_official(weights).classes
    write_checkpoint(args.output, converted.model, converted.extras, classes=classes)
    done = f"{args.output}: {len(converted.model)} tensors"
    if converted.extras:
        done += f", and {len(converted.extras)} without use kept for the way back"
    left = len(model.state_dict()) - len(converted.model)
    return f"{done}; {left} more tensors of the model are not among them" if left else done


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv, prog)
    try:
        print(convert(args))
    except (ImportError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
