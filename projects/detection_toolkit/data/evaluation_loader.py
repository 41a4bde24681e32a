"""The loader of test images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.data import DataLoader

from ..texts import shown
from .loader_processes import end_workers_at_exit, init_worker, loader_process_errors

__all__ = ["EvaluationLoader"]

_NAMED = 8  # images of an error


class EvaluationLoader:
    """Batches of a ``DataLoader``, whose processes outlive a signal and are named when they end."""

    def __init__(self, loader: DataLoader, file_names: Sequence[str]):
        """
        Args:
            loader: as Detectron2's ``build_detection_test_loader`` makes it.
            file_names: of all images of its data set.
        """
        loader.worker_init_fn = init_worker
        self._loader = loader
        self._file_names = file_names
        self._yielded = 0
        self._processes: set[int] = set()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """
        Raises:
            LoaderProcessError: a loader process has ended by itself.
        """
        self._yielded = 0
        batches = iter(self._loader)
        end_workers_at_exit(batches)
        self._processes = {process.pid for process in getattr(batches, "_workers", ())}
        while True:
            try:
                with self.process_errors():
                    batch = next(batches)
            except StopIteration:
                return
            self._yielded += 1
            yield batch

    def process_errors(self) -> AbstractContextManager[None]:
        """For what uses the batches: PyTorch tells of a process's end wherever it finds the run.

        Raises:
            LoaderProcessError: a process of this loader has ended while this lasts.
        """
        return loader_process_errors(
            "test", describe=self._describe, processes=lambda: self._processes
        )

    def _describe(self) -> str:
        """Images that the processes were given and that have not come back."""
        ahead = self._loader.num_workers * (self._loader.prefetch_factor or 1)
        batches = list(self._loader.batch_sampler)
        done = sum(map(len, batches[: self._yielded]))
        given = [i for batch in batches[self._yielded : self._yielded + ahead] for i in batch]
        if not given:
            return ""
        names = ", ".join(shown(self._file_names[i]) for i in given[:_NAMED])
        return (
            f" {done} images had come; the next {len(given)} were being loaded: {names}"
            f"{', ...' if len(given) > _NAMED else ''}. With dataloader.test.num_workers=0 the "
            "image at fault, if it is one, shows itself."
        )
