#!/usr/bin/env python
"""What a model costs: parameters, multiply-adds, activations and memory, module by module.

    python tools/analyze_model.py --config-file CONFIG [CONFIG ...] [KEY=VALUE ...]
    python tools/analyze_model.py --by-stage --config-file CONFIG train.init_checkpoint=FILE

CONFIG is a path or a name such as stageinteractor/stageinteractor_r50_100q_1x.py. With one config
the table has a row a module, down to --depth; with several, a row a config. --operators adds a
table of FLOPs by operator, a column a config; its row "layers" holds convolutions, linear layers
and norms, which is what MMDetection's tool counts. --json writes all modules and operators of all
configs.

The model infers one image of --size pixels, which it pads as always; one without pixel_mean, such
as a classifier, is given the tensor itself. What authors publish is beside its costs where the tool
knows it.

Counts are fvcore's:

- FLOPs are multiply-adds of convolutions, linear layers and matrix products, among them those with
  generated filters, of attention, of norms, and of bilinear sampling. Element-wise operators count
  nothing, but for the gates that mix filters. They are those of the equations, whatever faster
  way of computing the same the config chooses (model.execution);
- activations are the numbers that convolutions, linear layers and matrix products give out;
- memory is the most that parameters, buffers and tensors of the whole model take at any moment of
  the inference, or while a module runs (on the CPU only).

Two-stage detectors get 1000 proposals and find 100 objects, whatever their weights.

--by-stage evaluates a trained detector on its test set instead: AP and milliseconds where it ends
after 1, 2, ... stages, which is what model.stages_at_test chooses.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from detection_toolkit.durable import write_text
from detection_toolkit.engine import user_errors
from detection_toolkit.engine.arguments import (
    add_overrides_argument,
    add_trust_argument,
    parse_arguments,
)
from detection_toolkit.engine.parsers import Parser

if TYPE_CHECKING:
    from detection_toolkit.studies.stage_costs import StageCosts

_SI, _ADAMIXER = "stageinteractor/stageinteractor_", "adamixer/adamixer_"
_DEFORMABLE = "deformable_detr/deformable_detr_"
PUBLISHED = {
    # Parameters: the released state dicts, buffers left out.
    _SI + "r50_100q_1x.py": dict(mparams=137.28),
    _SI + "r50_300q_crop_3x.py": dict(mparams=137.33),
    _SI + "r101_300q_3x.py": dict(mparams=156.32),
    _SI + "dx101_300q_3x.py": dict(mparams=158.52),
    _SI + "swin_s_300q_3x.py": dict(mparams=162.04),
    "sqr/adamixer_sqr_r50_100q_1x.py": dict(mparams=134.79),
    "sqr/adamixer_sqr_r101_7stages_300q_3x.py": dict(mparams=172.21),
    # FLOPs: AdaMixer, table 5.
    _ADAMIXER + "r50_100q_1x.py": dict(mparams=134.79),
    _ADAMIXER + "r50_300q_3x.py": dict(gflops=132),
    _ADAMIXER + "r101_300q_3x.py": dict(gflops=208),
    # Parameters: the released state dicts. FLOPs: Deformable DETR, table 1.
    _DEFORMABLE + "r50_50e.py": dict(mparams=40.12, gflops=173),
    _DEFORMABLE + "refine_r50_50e.py": dict(mparams=40.88),
    _DEFORMABLE + "two_stage_r50_50e.py": dict(mparams=41.21),
    # What DFvT's authors print, and their table of Mask R-CNN; docs/dfvt.md says why these do not
    # add up.
    "dfvt/classifier_tiny.py": dict(gflops=0.2714),
    "dfvt/classifier_small.py": dict(gflops=0.8143),
    "dfvt/classifier_base.py": dict(gflops=2.5038),
    "dfvt/mask_rcnn_dfvt_tiny_1x.py": dict(mparams=25, gflops=178),
    "dfvt/mask_rcnn_dfvt_small_1x.py": dict(mparams=32, gflops=198),
    "dfvt/mask_rcnn_dfvt_base_1x.py": dict(mparams=58, gflops=242),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", nargs="+", required=True, metavar="CONFIG")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels (default: 800 1333)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--depth", type=int, default=2, help="of the modules (default: 2)")
    parser.add_argument(
        "--by-stage", action="store_true", help="AP and milliseconds after each stage instead"
    )
    parser.add_argument("--operators", action="store_true", help="show FLOPs by operator, too")
    parser.add_argument("--skip-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted")
    add_trust_argument(parser)
    add_overrides_argument(parser, "override entries of the config")
    args = parse_arguments(parser, argv)
    if min(args.size) < 1:
        parser.error(f"--size {args.size[0]} {args.size[1]}: both must be positive")
    if args.depth < 0:
        parser.error(f"--depth {args.depth} must not be negative")
    if args.by_stage and len(args.config_file) > 1:
        parser.error("--by-stage is for one config")
    import torch

    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no GPU here")
    return args


def costs_by_stage(args: argparse.Namespace) -> list[StageCosts]:
    """Those of a trained detector, on the first of its test sets."""
    from detection_toolkit.data import dataset_names
    from detection_toolkit.engine import Trainer
    from detection_toolkit.engine.evaluators import coco_backend, max_dets_per_image
    from detection_toolkit.engine.inspection import build_inspected_detector
    from detection_toolkit.memory import keep_memory_on_cpu
    from detection_toolkit.studies.stage_costs import stage_costs

    predictor = build_inspected_detector(
        args.config_file[0],
        [*args.opts, f"train.device={args.device}"],
        trust_config=args.trust_config,
    )
    keep_memory_on_cpu(predictor.model)
    cfg = predictor.cfg
    name = dataset_names(cfg.dataloader.test.dataset)[0]
    return stage_costs(
        predictor.model,
        Trainer.build_test_loader(cfg, name),
        dataset_name=name,
        max_dets_per_image=max_dets_per_image(cfg),
        backend=coco_backend(cfg),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv)
    from detection_toolkit.studies.model_costs import (
        Published,
        analyze,
        model_table,
        module_table,
        operator_table,
    )

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    if args.by_stage:
        with user_errors():
            by_stage = costs_by_stage(args)
        from detection_toolkit.studies.stage_costs import stage_table

        print(stage_table(by_stage))
        if args.json:
            write_text(args.json, json.dumps([x._asdict() for x in by_stage], indent=1))
        return 0
    all_costs = []
    with user_errors():
        for i, config in enumerate(args.config_file, start=1):
            if len(args.config_file) > 1:
                print(f"[{i}/{len(args.config_file)}] {config}", file=sys.stderr, flush=True)
            costs = analyze(
                config,
                args.opts,
                size=tuple(args.size),
                device=args.device,
                with_memory=not args.skip_memory,
                published={name: Published(**numbers) for name, numbers in PUBLISHED.items()},
                trust_config=args.trust_config,
            )
            all_costs.append(costs)
    if len(all_costs) == 1:
        print(module_table(all_costs[0], args.depth), end="\n\n")
    print(model_table(all_costs))
    if args.operators:
        print("\n" + operator_table(all_costs))
    if args.json:
        write_text(args.json, json.dumps([asdict(c) for c in all_costs], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
