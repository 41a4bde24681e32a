"""The order of the training images, from which a resumed run goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from detectron2.data.samplers import TrainingSampler

__all__ = ["ResumableSampler", "find_sampler"]


class ResumableSampler(TrainingSampler):
    """Detectron2's endless ``TrainingSampler`` that can leave out what has been seen already.

    Attributes:
        start: images, over all processes, that an iterator leaves out at the beginning.
    """

    def __init__(self, size: int, *, seed: int | None = None):
        """
        Args:
            size: images of the data set.
            seed: of the order; default: a random one that all processes share.
        """
        super().__init__(size, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(
            self._infinite_indices(), self.start + self._rank, None, self._world_size
        )

    def state_dict(self, images_seen: int) -> dict[str, int]:
        """What a checkpoint keeps, after so many images over all processes."""
        return {"seed": self._seed, "size": self._size, "images_seen": images_seen}

    def load_state_dict(self, state: dict[str, int]) -> bool:
        """Go on from there in the next iterator; False if the data set is another one."""
        if state["size"] != self._size:
            return False
        self._seed = state["seed"]
        self.start = state["images_seen"]
        return True


def find_sampler(loader: Any) -> ResumableSampler | None:
    """The sampler inside of a loader that Detectron2's ``build_detection_train_loader`` built."""
    while loader is not None:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, ResumableSampler):
            return sampler
        loader = getattr(loader, "dataset", None)
    return None
