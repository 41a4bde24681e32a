"""Are the numbers right: reference cases, and every form against the plain one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ....modeling import FeatureMaps, QueryDetector
from ....modeling.sampling import sample_features
from ....parity import CaseError, Settings, check_case
from ..context import Context, Row, rows_of
from ..forms import COMPILED, FORMS, execution, possible_forms, put_into_form, tf32
from ..plan import NamedConfig

__all__ = [
    "correct",
    "detector_in_form",
    "differences",
    "gradients_of",
    "random_images",
    "recorded",
    "sampled",
]

# Relative, of float64: as the forms differ in their order of sums alone. The fused kernel has its
# sums and coordinates in float32.
LIMIT, FUSED_LIMIT = 1e-6, 2e-3
# Of float32: products may be summed in another order while a graph is recorded.
RECORDED_LIMIT = 1e-4
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def correct(context: Context) -> Iterator[Row]:
    """Numeric cases, forms against each other, half precision against float32."""
    forms = possible_forms(("gather", "plain", "triton"), on_gpu=context.on_gpu)
    with tf32(enabled=False):
        for form in forms:
            for path in context.plan.case_files():
                yield from rows_of(f"{path.stem}, {form}", partial(_case, context, path, form))
        if context.on_gpu:
            yield from rows_of("sampling kernel", partial(_sampling_kernel, context))
        for model in context.plan.models:
            name = f"{model.name}, forms"
            forms = possible_forms(context.plan.forms, on_gpu=context.on_gpu, training=True)
            yield from rows_of(name, partial(_forms, context, model, forms))
            if context.on_gpu:
                yield from rows_of(f"{model.name}, recorded", partial(recorded, context, model))
            yield from rows_of(f"{model.name}, half precision", partial(_half, context, model))
    if context.on_gpu:
        with tf32(enabled=True):
            yield from _drift(context, None, "TF32")
    for name, dtype in HALF.items():
        if context.on_gpu or dtype == torch.bfloat16:
            yield from _drift(context, dtype, name)
    # Compiling takes long: of one model alone.
    compiled = [f for f in context.plan.forms if f in COMPILED]
    if context.on_gpu and compiled:
        model = context.plan.models[0]
        with tf32(enabled=False):
            forms = [context.plan.forms[0], *compiled]
            yield from rows_of(f"{model.name}, compiled", partial(_forms, context, model, forms))


def _case(context: Context, path: Path, form: str) -> Iterator[Row]:
    settings = Settings(device=str(context.device), execution=execution(form))
    report = check_case(path, settings)
    failing = [row for row in report.rows if not row.ok]
    values = {
        "quantities": len(report.rows),
        "failing": len(failing),
        "by rounding": sum(row.by_rounding for row in report.rows),
        "largest relative": max((row.max_rel for row in report.rows), default=0.0),
    }
    note = ", ".join(f"{row.quantity}: {row.verdict}" for row in failing[:3])
    yield Row(f"{path.stem}, {form}", values, report.ok, note)


def _drift(context: Context, dtype: torch.dtype | None, name: str) -> Iterator[Row]:
    """How far lower precision moves the quantities of the cases; there is no limit to it."""
    for path in context.plan.case_files():
        try:
            report = check_case(path, Settings(device=str(context.device), autocast=dtype))
        except CaseError as error:  # an operation may be missing in this type
            yield Row(f"{path.stem}, {name}", note=str(error)[:300])
            continue
        finite = [row.max_rel for row in report.rows if row.max_rel == row.max_rel]
        yield Row(f"{path.stem}, {name}", {"largest relative": max(finite, default=0.0)})


def detector_in_form(model: NamedConfig, form: str, device: torch.device) -> QueryDetector:
    """A detector of the config in training mode, past its initialisation, in float64."""
    cfg = copy.deepcopy(model.load())
    put_into_form(cfg, form)
    torch.manual_seed(0)
    detector = instantiate(cfg.model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # At its initial values a sampling point may lie where its derivative has two sides.
        for name, parameter in detector.named_parameters():
            if not name.startswith("backbone."):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.003 * noise
    return detector.to(device).train()


def random_images(size: tuple[int, int], num_classes: int, batch: int = 2) -> list[dict]:
    """Noise with a few objects, in Detectron2's format."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    images = []
    for i in range(batch):
        corner = torch.rand(3, 2, generator=generator) * torch.tensor([width, height]) * 0.5
        side = torch.rand(3, 2, generator=generator) * torch.tensor([width, height]) * 0.4 + 4
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], 1))
        instances.gt_classes = torch.randint(num_classes, (3,), generator=generator)
        pixels = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        images.append(
            {
                "image": pixels,
                "instances": instances,
                "image_id": i,
                "height": height,
                "width": width,
                "file_name": f"noise{i}",
            }
        )
    return images


def gradients_of(detector: QueryDetector, images: list[dict]) -> dict[str, Tensor]:
    """Losses, and the gradients of all parameters that have one."""
    losses = detector(images)
    sum(losses.values()).backward()
    found = {name: value.detach() for name, value in losses.items()}
    for name, parameter in detector.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return found


def differences(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to the norm of the reference, and of what it is.

    Raises:
        ValueError: the two hold different names.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"only one form has {sorted(ours.keys() ^ reference.keys())[:4]}")
    gradients = [float(v.norm()) for k, v in reference.items() if k.startswith("gradient")]
    whole = max(gradients, default=0.0)
    worst, where = 0.0, ""
    for name, value in reference.items():
        # What is zero but for rounding is compared with the largest gradient.
        scale = max(float(value.norm()), 1e-6 * whole)
        difference = float((ours[name] - value).norm()) / scale
        if math.isnan(difference):
            return difference, name
        if difference > worst:
            worst, where = difference, name
    return worst, where


def _forms(context: Context, model: NamedConfig, forms: Sequence[str]) -> Iterator[Row]:
    """Losses and gradients of the forms against those of the first."""
    plan = context.plan
    reference = None
    for form in forms:
        detector = detector_in_form(model, form, context.device)
        images = random_images(plan.compared_size, detector.num_classes)
        found = gradients_of(detector, images)
        if reference is None:
            reference = found
            continue
        worst, where = differences(found, reference)
        limit = FUSED_LIMIT if FORMS[form].get("sampling") == "triton" else LIMIT
        values = {"against": forms[0], "largest relative": worst, "of": where, "limit": limit}
        yield Row(f"{model.name}, {form}, losses and gradients", values, worst <= limit)


def recorded(context: Context, model: NamedConfig) -> Iterator[Row]:
    """Detections of two sizes, replayed with weights that are newer than the recording."""
    detector = detector_in_form(model, "recorded", context.device).float().eval()
    height, width = context.plan.compared_size
    batches = [
        random_images(size, detector.num_classes) for size in ((height, width), (width, height))
    ]

    def answers(*, replayed: bool) -> dict[str, Tensor]:
        detector.execution.cuda_graphs = replayed
        with torch.inference_mode():
            found = [detector(batch)[0]["instances"] for batch in batches]
        return {
            f"{name} {i}": value
            for i, x in enumerate(found)
            for name, value in (("boxes", x.pred_boxes.tensor), ("scores", x.scores))
        }

    answers(replayed=True)
    with torch.no_grad():
        for parameter in detector.decoder.parameters():
            parameter.mul_(1.01)
    worst, where = differences(answers(replayed=True), answers(replayed=False))
    values = {"against": "triton", "largest relative": worst, "of": where, "limit": RECORDED_LIMIT}
    yield Row(f"{model.name}, recorded, detections", values, worst <= RECORDED_LIMIT)


def _half(context: Context, model: NamedConfig) -> Iterator[Row]:
    """Losses of the same weights in half precision; reported, not judged."""
    detector = detector_in_form(model, "gather", context.device).float()
    images = random_images(context.plan.compared_size, detector.num_classes)
    with torch.no_grad():
        expected = sum(detector(images).values())
        for name, dtype in HALF.items():
            if not context.on_gpu and dtype == torch.float16:
                continue
            with torch.autocast(context.device.type, dtype):
                found = sum(detector(images).values())
            drift = float((found - expected).abs() / expected)
            yield Row(f"{model.name}, {name}, total loss", {"largest relative": drift})


def sampled(
    device: torch.device, form: str, dtype: torch.dtype, *, points: int = 5
) -> dict[str, Tensor]:
    """Values and gradients of sampling in a form, from maps of a type, at float32 coordinates."""
    generator = torch.Generator().manual_seed(0)
    sizes, groups, channels = ((24, 32), (12, 16)), 4, 16
    levels = [
        torch.randn(2, groups * channels, *size, generator=generator)
        .to(device, dtype, memory_format=torch.channels_last)
        .requires_grad_()
        for size in sizes
    ]
    xy = torch.rand(2, 7, groups, points, 2, generator=generator) * 150 - 12
    xy = xy.to(device).requires_grad_()
    weights = torch.rand(2, 7, groups, points, len(sizes), generator=generator)
    weights = weights.to(device).requires_grad_()
    image_sizes = torch.tensor([(96, 128)] * 2, device=device)
    maps = FeatureMaps(tuple(levels), (4, 8), image_sizes, (96, 128))
    maps = maps.laid_out(execution(form), torch.float32)
    values = sample_features(maps, xy, weights)
    values.square().sum().backward()
    names = ("map0", "map1", "xy", "weights")
    found = {"values": values.detach()}
    for name, leaf in zip(names, (*levels, xy, weights)):
        found[f"gradient of {name}"] = leaf.grad.float()
    return found


def _sampling_kernel(context: Context) -> Iterator[Row]:
    for name, dtype in {"float32": torch.float32, **HALF}.items():
        reference = sampled(context.device, "plain", dtype)
        worst, where = differences(sampled(context.device, "triton", dtype), reference)
        # A gradient of a half-precision map is rounded to that type.
        limit = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        values = {"against": "plain", "largest relative": worst, "of": where, "limit": limit}
        yield Row(f"sampling kernel, {name}", values, worst <= limit)
