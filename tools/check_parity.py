#!/usr/bin/env python
"""Compare this implementation with numeric cases of the official one.

    python tools/check_parity.py CASE.npz ...

Builds what each case's config describes, loads the case's weights through the converter of
official checkpoints, runs it, and prints one row a quantity: case, quantity, largest absolute
and relative difference, limit, verdict. Relative differences are relative to the largest number of
the reference array; those of gradients compare L2 norms.

Limits: logits, features and filters 1e-4 (--atol); boxes and sampling points 5e-3 pixels; losses
1e-5 relative; gradients 2e-3 relative (the attention's tau 1e-2); assignments, labels and targets
identical, or of the same total cost where objects tie. A row that is out of tolerance is looked at
again in float64, and with the inputs changed in their last bit; if rounding explains it, the row
is accepted and its verdict says why.

Exit status: 0 if every row is within tolerance and every array of every file was compared, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import detection_toolkit  # noqa: F401  (before PyTorch: how its threads wait)
from detection_toolkit.engine.parsers import Parser

if TYPE_CHECKING:
    from torch import nn

    from detection_toolkit.parity import Report, Row

DTYPES = ("float32", "float64")
FORMS = ("default", "direct", "plain", "onednn")
HALF = ("bfloat16", "float16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.npz")
    parser.add_argument(
        "--atol",
        type=float,
        default=1e-4,
        help="largest absolute difference of logits, features and filters (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--tf32", action="store_true", help="let CUDA use TF32, which is off otherwise"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="default",
        help="of the detector: default, what the configs choose; direct, all optimisations off "
        "(model.execution); plain, the transcription that benchmarks compare with; onednn, default "
        "with float32 products by oneDNN on a CPU",
    )
    parser.add_argument(
        "--autocast",
        choices=HALF,
        help="report the drift of half precision; the rows then have no limits",
    )
    parser.add_argument(
        "--summary",
        action="store_true",
        help="one row for all stages, images, levels and parameters of a quantity",
    )
    args = parser.parse_args(argv)
    if not args.atol > 0:
        parser.error(f"--atol must be positive, not {args.atol}")
    if args.autocast and args.dtype != "float32":
        parser.error("--autocast goes with --dtype float32")
    import torch

    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device!r} is no device")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from detection_toolkit.modeling import Execution
    from detection_toolkit.modeling.execution import PLAIN
    from detection_toolkit.parity import CaseError, Settings, check_case

    executions = {"onednn": {"products": "onednn"}, "direct": PLAIN, "plain": PLAIN}
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.manual_seed(0)
    settings = Settings(
        dtype=getattr(torch, args.dtype),
        device=args.device,
        atol=args.atol,
        autocast=args.autocast and getattr(torch, args.autocast),
        execution=Execution(**executions.get(args.form, {})),
        replace_parts=load_plain() if args.form == "plain" else None,
    )
    reports = []
    errors = 0
    names = ("case", "quantity", "max abs", "max rel", "limit", "verdict")
    print(_line(*names, summary=args.summary))
    for path in args.cases:
        try:
            report = check_case(path, settings)
        except (CaseError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            errors += 1
            continue
        reports.append(report)
        print_report(report, summary=args.summary)
    return conclude(reports, errors)


def load_plain() -> Callable[[nn.Module], nn.Module]:
    """What makes the plain transcription of a part; the benchmarks have it, and are no package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "plain.py"
    spec = importlib.util.spec_from_file_location("plain", path)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    return plain.to_plain


def print_report(report: Report, *, summary: bool) -> None:
    rows = summarize(report.rows) if summary else report.rows
    for row in rows:
        numbers = (f"{row.max_abs:.2e}", f"{row.max_rel:.2e}")
        cells = (report.case, row.quantity, *numbers, row.limit, row.verdict)
        print(_line(*cells, summary=summary))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """One row for each quantity whatever its stage, image, level or parameter: the worst. Rows
    whose verdict is special stay as they are."""
    from detection_toolkit.parity import Row

    groups: dict[tuple[str, str], list[Row]] = {}
    special = []
    for row in rows:
        if not row.ok or row.by_rounding:
            special.append(row)
        else:
            groups.setdefault((general_name(row.quantity), row.verdict), []).append(row)
    merged = []
    for (name, verdict), members in groups.items():
        worst = max(members, key=lambda row: row.excess)
        merged.append(
            Row(
                f"{name} [{len(members)}]" if len(members) > 1 else name,
                max(row.max_abs for row in members),
                max(row.max_rel for row in members),
                worst.excess,
                worst.limit,
                verdict,
            )
        )
    return merged + special


def general_name(quantity: str) -> str:
    """``stage3/bank2/M`` -> ``stage*/bank*/M``; gradients and statistics lose the parameter."""
    match = re.match(r"((?:train_\w+/)?(?:grad(?:norm|_norm)?|after))/(?:(.*)\.)?(\w+)$", quantity)
    if match and match.group(2):
        return f"{match.group(1)}/*" + ("iof_tau" if match.group(3) == "iof_tau" else "")
    numbered = r"(?<![^/])(stage|img|bank|case|feat|mix_preln|out|s|b|)\d+(?=[/_]|$)"
    return re.sub(numbered, r"\1*", quantity)


def conclude(reports: Sequence[Report], errors: int) -> int:
    rows = [row for report in reports for row in report.rows]
    failing = [row for row in rows if not row.ok]
    rounding = sum(row.by_rounding for row in rows)
    print(
        f"{len(reports)} cases, {len(rows)} rows: {len(rows) - len(failing)} ok "
        f"({rounding} of them after a look at rounding), {len(failing)} out of tolerance or not "
        f"compared, {errors} files unusable"
    )
    return 1 if failing or errors else 0


def _line(*cells: str, summary: bool) -> str:
    case, quantity, absolute, relative, limit, verdict = cells
    width = 34 if summary else 70  # of most quantities
    return f"{case:31} {quantity:{width}} {absolute:>8} {relative:>8}  {limit:16} {verdict}"


if __name__ == "__main__":
    sys.exit(main())
