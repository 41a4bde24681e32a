"""Trackers of experiments: where the scalars of a run go besides the console and metrics.json.

``train.trackers`` lists them, by name or as nodes with settings of their own. Addresses and keys of
servers are not settings: they come from the environment of whoever runs it, in the tracker's own
variables, so that a config does not say where a run is sent. The ``config.yaml`` of a run does not
switch on what sends it anywhere, unless it is trusted.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from ..durable import write_text
from ..errors import MissingPackageError, UnknownNameError, UserError
from ..texts import parse_json

__all__ = ["MLflow", "RunFacts", "TensorBoard", "Tracker", "WandB", "build_trackers"]

logger = logging.getLogger(__name__)

_IDS = "trackers.json"
"""In the folder of a run: what each tracker calls it, for whoever resumes it."""


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run.

    Attributes:
        output_dir: folder of the run.
        config: gives all of it, as plain values.
        max_iter: iterations of the whole run.
        start_iter: the first iteration; asked for when the first scalars come, as it is known late.
    """

    output_dir: Path
    config: Callable[[], Mapping[str, Any]]
    max_iter: int
    start_iter: Callable[[], int]


class TensorBoard:
    """TensorBoard's files in ``train.output_dir``."""

    def open(self, facts: RunFacts) -> EventWriter:
        """The writer of Detectron2."""
        return TensorboardXWriter(str(facts.output_dir))


class Tracker:
    """A tracker of experiments, of which :meth:`open` makes a writer.

    A subclass has ``name``, ``package`` and ``extra``, and what each of the methods without a body
    says. Whatever they raise costs a warning, and the rest of what would have been tracked.
    """

    name: str
    package: str
    extra: str

    def open(self, facts: RunFacts) -> EventWriter:
        """
        Raises:
            MissingPackageError: the package is not installed.
        """
        if importlib.util.find_spec(self.package) is None:
            raise MissingPackageError(
                f"train.trackers has {self.name}, which is not installed: pip install {self.extra}"
            )
        return _TrackerWriter(self, facts)

    def start(self, facts: RunFacts, run_id: str | None) -> str:
        """Begin a run, or go on with the one that has an id.

        Returns:
            its id.
        """
        raise NotImplementedError

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Take the scalars of an iteration."""
        raise NotImplementedError

    def finish(self, *, is_complete: bool) -> None:
        """End the run, which may have been interrupted."""
        raise NotImplementedError


class _TrackerWriter(EventWriter):
    """Hands scalars to a tracker until it fails; never stops a run."""

    def __init__(self, tracker: Tracker, facts: RunFacts):
        self._tracker = tracker
        self._facts = facts
        self._is_started = False
        self._has_failed = False
        self._written = -1
        self._last = -1

    def write(self) -> None:
        storage = get_event_storage()
        self._last = storage.iter
        by_iteration: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(20).items():
            if iteration > self._written:
                by_iteration.setdefault(iteration, {})[name] = float(value)
        if not by_iteration:
            return
        self._written = max(by_iteration)
        self._attempt(lambda: self._send(by_iteration))

    def close(self) -> None:
        if self._is_started:
            is_complete = self._last >= self._facts.max_iter - 1
            self._attempt(lambda: self._tracker.finish(is_complete=is_complete))

    def _send(self, by_iteration: Mapping[int, Mapping[str, float]]) -> None:
        if not self._is_started:
            self._start()
        for iteration in sorted(by_iteration):
            self._tracker.log(by_iteration[iteration], iteration)

    def _start(self) -> None:
        path = self._facts.output_dir / _IDS
        ids = _read_ids(path)
        # What lies there otherwise is of a run that had no checkpoint yet.
        known = ids.get(self._tracker.name) if self._facts.start_iter() > 0 else None
        run_id = self._tracker.start(self._facts, known)
        self._is_started = True
        write_text(path, json.dumps({**ids, self._tracker.name: run_id}, indent=2))

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:  # of another project, and of networks
            self._has_failed = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            logger.warning(
                "%s fails, and is left out from here on; the run goes on, and metrics.json has "
                "everything: %s",
                self._tracker.name,
                reason,
            )


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(ids, dict):
        return {}
    return {k: v for k, v in ids.items() if isinstance(v, str) and re.fullmatch(r"[\w-]+", v)}


class WandB(Tracker):
    """Weights & Biases. ``WANDB_MODE=offline`` and other variables of its own count."""

    name, package, extra = "wandb", "wandb", "wandb"

    def __init__(
        self, *, project: str | None = None, run_name: str | None = None, tags: Sequence[str] = ()
    ):
        """
        Args:
            project: default: WANDB_PROJECT, or "detection".
            run_name: default: the name of the run's folder.
            tags: of the run.
        """
        self.project = project
        self.run_name = run_name
        self.tags = tuple(tags)
        self._run: Any = None

    def start(self, facts: RunFacts, run_id: str | None) -> str:
        wandb = importlib.import_module(self.package)
        self._run = wandb.init(
            project=self.project or os.environ.get("WANDB_PROJECT") or "detection",
            name=self.run_name or facts.output_dir.resolve().name,
            tags=list(self.tags) or None,
            dir=str(facts.output_dir),
            config=dict(facts.config()),
            id=run_id,
            resume=None if run_id is None else "allow",
        )
        return self._run.id

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def finish(self, *, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


class MLflow(Tracker):
    """MLflow. ``MLFLOW_TRACKING_URI`` and other variables of its own count."""

    name, package, extra = "mlflow", "mlflow", "mlflow-skinny sqlalchemy alembic"

    def __init__(self, *, experiment: str | None = None, run_name: str | None = None):
        """
        Args:
            experiment: default: MLFLOW_EXPERIMENT_NAME, or "detection".
            run_name: default: the name of the run's folder.
        """
        self.experiment = experiment
        self.run_name = run_name
        self._client: Any = None
        self._run_id = ""

    def start(self, facts: RunFacts, run_id: str | None) -> str:
        mlflow = importlib.import_module(self.package)
        self._client = mlflow.MlflowClient()
        if run_id is not None:
            self._run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "detection"
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run_name = self.run_name or facts.output_dir.resolve().name
        self._run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
        parameters = [
            mlflow.entities.Param(_mlflow_key(key), str(value)[:500])
            for key, value in _leaves(facts.config())
        ]
        for i in range(0, len(parameters), 100):  # so many a call
            self._client.log_batch(self._run_id, params=parameters[i : i + 100])
        return self._run_id

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        metrics = [
            entities.Metric(_mlflow_key(key), value, now, iteration)
            for key, value in values.items()
            if math.isfinite(value)  # not every store takes others
        ]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + 1000])

    def finish(self, *, is_complete: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if is_complete else "KILLED")


def _mlflow_key(name: str) -> str:
    """With no other letters than MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:250]


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all that is no group."""
    if isinstance(node, Mapping):
        pairs = [(str(key), value) for key, value in node.items()]
    elif isinstance(node, (list, tuple)) and any(isinstance(x, (Mapping, list)) for x in node):
        pairs = [(str(i), value) for i, value in enumerate(node)]
    else:
        return [(path, node)]
    return [
        leaf for key, value in pairs for leaf in _leaves(value, f"{path}.{key}" if path else key)
    ]


_NAMES: Mapping[str, Callable[[], Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def build_trackers(entries: Sequence[Any], facts: RunFacts) -> list[EventWriter]:
    """The writers that ``train.trackers`` lists.

    Args:
        entries: names, or nodes as ``L(WandB)(project="mine")`` makes them.
        facts: of the run.

    Raises:
        UnknownNameError: there is no tracker of that name.
        MissingPackageError: its package is not installed.
        UserError: a node is no tracker.
    """
    return [_make(entry).open(facts) for entry in entries]


def _make(entry: Any) -> Any:
    if isinstance(entry, str):
        if entry not in _NAMES:
            raise UnknownNameError(f"train.trackers has {entry!r}; there are {', '.join(_NAMES)}")
        return _NAMES[entry]()
    tracker = None
    if isinstance(entry, Mapping) and "_target_" in entry:
        try:
            tracker = instantiate(dict(entry))
        except TypeError as error:
            raise UserError(f"train.trackers: a tracker cannot be built: {error}") from error
    if not hasattr(tracker, "open"):
        raise UserError(
            f"train.trackers takes names ({', '.join(_NAMES)}) and nodes such as "
            f'L(WandB)(project="mine"), got {entry!r}'
        )
    return tracker
