"""CUDA graphs: a function is recorded once for inputs of the same sizes, then replayed.

With few queries a GPU computes faster than Python can tell it what to do. A replay launches the
same kernels at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .constants import collect_constants

__all__ = ["Recordings"]

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
WARM_UP = 2  # calls before a recording: kernels are loaded and tuned


class Recordings:
    """Replays of functions without gradient, on a GPU; as many sizes are kept as a limit allows.

    A copy of it, for a copy of the model, is empty.
    """

    def __init__(self, limit: int = 32):
        """
        Args:
            limit: recordings that are kept; the one that was not used for longest goes first.
        """
        self._limit = limit
        self._replays: OrderedDict[Any, Callable[[Sequence[Tensor]], Tensors]] = OrderedDict()
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._replays)

    def __deepcopy__(self, memo: Any) -> Recordings:
        return Recordings(self._limit)

    def __reduce__(self) -> tuple:
        return Recordings, (self._limit,)

    def __call__(
        self, function: Function, inputs: Sequence[Tensor], tensors: Iterable[Tensor]
    ) -> Tensors:
        """What ``function(*inputs)`` returns.

        Args:
            function: of tensors alone, to a tuple of tensors. It must not wait for the device, and
                always be the same one.
            inputs: its arguments, on the GPU.
            tensors: the parameters and buffers that it reads. If one has moved, all recordings are
                forgotten; new values in the same place are seen by a replay.

        Raises:
            UserError: the function cannot be recorded.
        """
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self._replays.clear()
            self._pool = None  # it goes with the last of its graphs
            self._addresses = addresses
        key = (*_precision(), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        replay = self._replays.get(key)
        if replay is None:
            replay = self._replays[key] = self._record(function, inputs)
            if len(self._replays) > self._limit:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        return replay(inputs)

    def _record(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> Callable[[Sequence[Tensor]], Tensors]:
        current = torch.cuda.current_stream()
        # What is kept must not be of inference mode, or later calls could not write into it.
        # Autocast would cache rounded weights in memory that it frees.
        with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache():
            kept = [torch.empty_like(x) for x in inputs]
            for own, value in zip(kept, inputs):
                own.copy_(value)
            side = torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(*kept)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Recordings are replayed one after another, so that they may share their memory.
                with (
                    collect_constants() as read,
                    torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
                ):
                    outputs = function(*kept)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(
                    f"the detector cannot be recorded as a CUDA graph ({error}): set "
                    "model.execution.cuda_graphs=false"
                ) from error
        self._pool = graph.pool() if self._pool is None else self._pool

        return _Recording(graph, kept, outputs, read)


class _Recording(NamedTuple):
    """A graph, and all memory outside of its pool that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Tensors
    constants: list[Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensors:
        for own, value in zip(self.inputs, inputs):
            own.copy_(value)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)


def _precision() -> tuple:
    """What the arithmetic of a recording depends on besides its inputs."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _autocast_without_cache() -> torch.autocast:
    enabled, dtype, *_ = _precision()
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)
