"""What the parts of a detector take: seconds, operations, bytes, and the bound that these imply.

Operations are those of products and convolutions as PyTorch's own counter sees them. Bytes are
those that the layers of a part must at least read and write: parameters, inputs and outputs, each
once; of maps only the rows that points are sampled from. What happens between layers, and all that
is done element by element, adds to the time and not to the bound.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..modeling import FeatureMaps
from .timing import synchronize

__all__ = ["Part", "count_operations", "parts_of", "time_parts"]


_PARTS_OF_A_STAGE = ("attention", "sampling", "mixing")
_REST = "FFN and heads"


@dataclass
class Part:
    """One row of the table."""

    name: str
    seconds: float
    operations: float
    bytes: float

    def bound(self, product_rate: float, copy_rate: float) -> float:
        """Seconds below which these operations and bytes cannot go at these rates."""
        return max(self.operations / product_rate, self.bytes / copy_rate)


def parts_of(detector: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that make up each part of a detector's forward pass.

    Of a stage, attention, sampling and mixing go by the names of its modules; what else it has is
    "FFN and heads".
    """
    backbone = detector.backbone
    parts: dict[str, list[nn.Module]] = {"backbone": [backbone.bottom_up]}
    parts["neck"] = [m for name, m in _called(backbone) if name != "bottom_up"]
    apart = ("backbone", "decoder", "criterion")
    parts |= {name: [m] for name, m in detector.named_children() if name not in apart}
    for name in (*_PARTS_OF_A_STAGE, _REST):
        parts[name] = []
    for stage in detector.decoder.stages:
        for name, module in _called(stage):
            part = next((part for part in _PARTS_OF_A_STAGE if part in name), _REST)
            parts[part].append(module)
    return parts


def _called(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by their names; in the place of lists, which are not called, what is in them."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((name, item) for item in child)
        else:
            yield name, child


@contextmanager
def _hooks(modules: Iterable[nn.Module], before: Callable, after: Callable) -> Iterator[None]:
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def time_parts(
    run: Callable[[], object],
    parts: dict[str, list[nn.Module]],
    *,
    device: torch.device,
    rounds: int,
) -> list[Part]:
    """Median seconds of each part of ``run``, an inference, with its operations and bytes.

    Parts whose modules are not called are left out.
    """
    names = {id(module): name for name, modules in parts.items() for module in modules}
    modules = [module for group in parts.values() for module in group]
    started: dict[int, float] = {}
    totals: list[dict[str, float]] = []

    def before(module: nn.Module, _: object) -> None:
        synchronize(device)
        started[id(module)] = time.perf_counter()

    def after(module: nn.Module, *_: object) -> None:
        synchronize(device)
        totals[-1][names[id(module)]] += time.perf_counter() - started[id(module)]

    run()
    with _hooks(modules, before, after):
        for _ in range(rounds):
            totals.append(defaultdict(float))
            run()
    seconds = {name: sorted(total[name] for total in totals)[len(totals) // 2] for name in parts}
    operations = _operations_of_parts(run, parts)
    moved = _bytes_of_parts(run, parts)
    return [
        Part(name, seconds[name], operations[name], moved[name]) for name in parts if seconds[name]
    ]


def count_operations(run: Callable[[], object]) -> float:
    """Floating point operations of the products and convolutions in ``run``."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _operations_of_parts(
    run: Callable[[], object], parts: dict[str, list[nn.Module]]
) -> dict[str, float]:
    counter = FlopCounterMode(display=False)
    names = {id(module): name for name, modules in parts.items() for module in modules}
    at: dict[int, float] = {}
    found: dict[str, float] = defaultdict(float)

    def before(module: nn.Module, _: object) -> None:
        at[id(module)] = counter.get_total_flops()

    def after(module: nn.Module, *_: object) -> None:
        found[names[id(module)]] += counter.get_total_flops() - at[id(module)]

    modules = [module for group in parts.values() for module in group]
    with counter, _frozen(modules), _hooks(modules, before, after):
        run()
    return found


@contextmanager
def _frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Without parameters that are trained.

    PyTorch's counter asks inputs of modules that require gradients for their history, and views of
    parameters have none in inference mode.
    """
    trained = [x for module in modules for x in module.parameters() if x.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _bytes_of_parts(
    run: Callable[[], object], parts: dict[str, list[nn.Module]]
) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)

    def record(name: str) -> Callable:
        def after(module: nn.Module, inputs: object, output: object) -> None:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in (*own, *_tensors(inputs), *_tensors(output)):
                found[name] += tensor.numel() * tensor.element_size()

        return after

    def record_sampling(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        # Four rows of every level are read for each one that is written.
        (maps,) = (value for value in inputs if isinstance(value, FeatureMaps))
        rows = 4 * len(maps.levels) + 1
        found[names[id(module)]] += rows * output.numel() * output.element_size()

    names = {id(module): name for name, modules in parts.items() for module in modules}
    handles = []
    for name, modules in parts.items():
        for module in modules:
            if hasattr(module, "points"):
                handles.append(module.register_forward_hook(record_sampling))
            for leaf in module.modules():
                if not list(leaf.children()):
                    handles.append(leaf.register_forward_hook(record(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
