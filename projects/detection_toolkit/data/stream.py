"""The endless stream of training images, whose every part is a function of (seed, position).

A position counts the images of the whole job, over all processes, from the first step on. It says
which image it is and how it is augmented, so that neither the number of loader processes nor an
interruption changes what a step sees.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .loader_processes import end_workers_at_exit, init_worker, loader_process_errors

__all__ = ["Draw", "GroupedStream", "SeededDataset", "TrainLoader", "collate_views"]


class Draw(NamedTuple):
    """One image of the stream."""

    position: int
    """Number of images of the whole job before it."""
    index: int
    """Of the image in the data set."""


class GroupedStream:
    """Batches of the order that a Detectron2 sampler gives, each of one group of images.

    All processes form the same sequence of batches from the same order, and take every n-th of
    them: the state is the same everywhere, and serves any number of processes. Images wait until
    as many of their group have come as a process takes at once, as in Detectron2's
    ``AspectRatioGroupedDataset``.
    """

    def __init__(self, sampler: Sampler, groups: Sequence[int], batch_size: int):
        """
        Args:
            sampler: Detectron2's ``TrainingSampler`` or ``RepeatFactorTrainingSampler``, whose
                order all processes share; of any other, each process takes what it yields.
            groups: of every image in the data set.
            batch_size: images a step of one process.
        """
        self._sampler = sampler
        self._groups = groups
        self._batch_size = batch_size
        self._position = 0
        self._waiting: dict[int, list[Draw]] = {}
        self._is_shared = isinstance(sampler, (TrainingSampler, RepeatFactorTrainingSampler))
        # Where the order began; before it, another data set was seen.
        self._origin = 0

    @property
    def seed(self) -> int:
        """Of the order, and with a position of its augmentation."""
        return int(getattr(self._sampler, "_seed", 0) or 0)

    def __iter__(self) -> Iterator[list[Draw]]:
        """This process's batches, from the current state on."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        share, number = (rank, world_size) if self._is_shared else (0, 1)
        mine: list[Draw] = []
        for formed, batch in enumerate(self._form_batches(rank, world_size)):
            if formed % number == share:
                mine = batch
            # The state is that of a step when the last process, too, has its batch.
            if formed % number == number - 1:
                yield mine

    def _form_batches(self, rank: int, world_size: int) -> Iterator[list[Draw]]:
        """Batches of all processes that share the order."""
        for group in sorted(self._waiting):
            # More than wait usually, after a run whose batches were larger.
            while len(self._waiting[group]) >= self._batch_size:
                yield self._take(group)
        for index in itertools.islice(self._order(), self._position - self._origin, None):
            # Where processes do not share the order, their positions alternate.
            position = self._position if self._is_shared else self._position * world_size + rank
            self._position += 1
            group = self._groups[int(index)]
            self._waiting.setdefault(group, []).append(Draw(position, int(index)))
            if len(self._waiting[group]) >= self._batch_size:
                yield self._take(group)

    def _take(self, group: int) -> list[Draw]:
        waiting = self._waiting[group]
        batch = waiting[: self._batch_size]
        del waiting[: self._batch_size]
        return batch

    def _order(self) -> Iterator[int]:
        return self._sampler._infinite_indices() if self._is_shared else iter(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; see :meth:`load_state_dict`."""
        return {
            "seed": self.seed,
            "size": len(self._groups),
            "position": self._position,
            "origin": self._origin,
            "waiting": [list(draw) for draws in self._waiting.values() for draw in draws],
        }

    def rewind(self, state: dict[str, Any]) -> None:
        """Back to a state of this stream."""
        self._position = int(state["position"])
        self._origin = int(state["origin"])
        self._waiting = {}
        for draw in sorted(Draw(*map(int, values)) for values in state["waiting"]):
            self._waiting.setdefault(self._groups[draw.index], []).append(draw)

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from the state of a stream of the same data; returns what is lost by it, or None.

        With a data set of another size the order begins anew, at the next position, so that no
        augmentation is seen twice.
        """
        if not self._is_shared:
            return (
                f"the order of a {type(self._sampler).__name__} cannot be continued, it begins anew"
            )
        if state["size"] != len(self._groups):
            position = int(state["position"])
            self.rewind({"position": position, "origin": position, "waiting": []})
            return (
                f"the training set has {len(self._groups)} images instead of {state['size']}, so "
                "its order begins anew"
            )
        self._sampler._seed = int(state["seed"])
        self.rewind(state)
        return None


class SeededDataset(Dataset):
    """Maps a :class:`Draw` to a model's input, with random numbers that follow from its position.

    Where the mapper returns None (an image that is skipped), the next one takes its place, a
    number of images further on that follows from the position, too; where it does so for every
    image, a ``ValueError`` says so.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        mapper: Callable[..., Any],
        *,
        seed: int = 0,
        with_others: bool = False,
        mix_until: int | None = None,
    ):
        """
        Args:
            dataset: dataset dicts, made anew by every access.
            mapper: gives a model's input, a list of them, or None. It may draw from the global
                generators of Python, NumPy and PyTorch's CPU.
            seed: the stream's.
            with_others: the mapper takes the whole data set as a second argument. It does not hold
                it: processes that are not forked would be sent a copy.
            mix_until: from this position on, images are mapped by ``mapper.alone()``.
        """
        self.seed = seed
        self._with_others = with_others
        self._dataset = dataset
        self._mapper = PicklableWrapper(mapper)  # for systems where processes are not forked
        self._mix_until = math.inf if mix_until is None else mix_until
        self._mapper_alone = None
        if mix_until is not None:
            self._mapper_alone = PicklableWrapper(mapper.alone())  # type: ignore[attr-defined]

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """The dataset dicts."""
        return self._dataset

    @property
    def view_names(self) -> Sequence[str]:
        """Of the inputs that a mapper of several makes of an image; empty for one input."""
        return getattr(self._mapper, "view_names", ())

    def over(self, records: Sequence[dict[str, Any]]) -> SeededDataset:
        """The same, mapper and random numbers too, over as many other dataset dicts."""
        other = copy.copy(self)
        other._dataset = records
        return other

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> Any:
        words = np.random.SeedSequence([self.seed, draw.position]).generate_state(4)
        with _global_generators(words):
            index, size = draw.index, len(self._dataset)
            step = int(words[3]) % size
            while math.gcd(step, size) != 1:  # then it reaches every image
                step = (step + 1) % size
            others = (self._dataset,) if self._with_others else ()
            is_mixed = draw.position < self._mix_until
            mapper = self._mapper if is_mixed else self._mapper_alone
            for _ in range(size):
                sample = mapper(self._dataset[index], *others)
                if sample is not None:
                    return sample
                index = (index + step) % size
            raise UserError(f"the mapper has skipped every one of the {size} images")


@contextlib.contextmanager
def _global_generators(words: np.ndarray) -> Iterator[None]:
    """Seed what augmentations draw from, and put it back as it was."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    # torch.manual_seed would seed the GPUs as well.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def collate_views(samples: list[Any]) -> list[dict[str, Any]]:
    """The model's inputs of a batch: the first of every image, then the second of every image, ...

    Args:
        samples: of every image what the mapper has made of it, an input or a list of them.
    """
    views = [sample if isinstance(sample, list) else [sample] for sample in samples]
    return [view for nth in itertools.zip_longest(*views) for view in nth if view is not None]


class _RecordedBatches:
    """What a ``DataLoader`` draws, ahead of what has been used; remembers the state after each."""

    def __init__(self, stream: GroupedStream):
        self.stream = stream
        self.states: deque[dict[str, Any]] = deque()

    def __iter__(self) -> Iterator[list[Draw]]:
        self.states.clear()
        for batch in self.stream:
            self.states.append(self.stream.state_dict())
            yield batch


class TrainLoader:
    """An endless iterable of batches that knows its position, whatever its processes prefetch."""

    def __init__(
        self,
        stream: GroupedStream,
        dataset: SeededDataset,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        """
        Args:
            stream: of the batches.
            dataset: maps :class:`Draw` to a model's input.
            num_workers, pin_memory: see PyTorch's ``DataLoader``.
        """
        self.stream = stream
        self.dataset = dataset
        self._batches = _RecordedBatches(stream)
        self._state = stream.state_dict()
        # A generator of its own: the loader would draw from the global one with every iterator.
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            generator=torch.Generator().manual_seed(stream.seed),
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=collate_views,
            worker_init_fn=init_worker,
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Batches from the last one on that has been taken.

        Raises:
            LoaderProcessError: a loader process has ended by itself.
        """
        self.stream.rewind(self._state)
        self.dataset.seed = self.stream.seed
        batches = iter(self._loader)
        end_workers_at_exit(batches)
        while True:
            try:
                with loader_process_errors("train"):
                    batch = next(batches)
            except StopIteration:  # of a finite sampler
                return
            self._state = self._batches.states.popleft()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that has been taken."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from there with the next iterator; returns what is lost by it, or None."""
        lost = self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()
        return lost
