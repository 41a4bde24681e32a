"""Which queries each stage is given in training.

All states of the queries are kept in one list, the pool: position 0 is the initial queries, then
come the outputs of stage 0, those of stage 1, and so on. A stage reads a slice of the pool; every
state in it makes one *group*, which passes the stage on its own, and whose output goes to the end
of the pool. So group g, counted over all stages, is at position g + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from detection_toolkit.errors import UserError

__all__ = [
    "RecollectionSchedule",
    "ScheduleError",
    "dense_schedule",
    "plain_schedule",
    "selective_schedule",
]


class ScheduleError(UserError):
    """A schedule cannot be followed; the message names the stage."""


@dataclass(frozen=True)
class RecollectionSchedule:
    """The slice [start, end) of the pool that each stage reads.

    The slice of a stage ends where the pool ends, so that its last group is always the plain
    cascade, and begins no earlier than that of the stage before, so that a state stays in use
    without a gap.

    Args:
        starts: a_t of the S stages.
        ends: b_t of the S stages.

    Raises:
        ScheduleError: the slices break one of these rules, are empty, or reach beyond the pool.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        # Configs have lists.
        object.__setattr__(self, "starts", _as_integers("starts", self.starts))
        object.__setattr__(self, "ends", _as_integers("ends", self.ends))
        if len(self.starts) != len(self.ends):
            stage = min(len(self.starts), len(self.ends))
            raise ScheduleError(
                f"stage {stage} lacks its {'end' if len(self.ends) == stage else 'start'}: the "
                f"schedule has {len(self.starts)} starts and {len(self.ends)} ends"
            )
        if not self.starts:
            raise ScheduleError("stage 0 has no slice: the schedule is empty")
        pool, previous = 1, 0
        for t, (start, end) in enumerate(zip(self.starts, self.ends)):
            slice_ = f"stage {t} reads [{start}, {end}) of the pool"
            if start < 0:
                raise ScheduleError(f"{slice_}, which begins before the initial queries at 0")
            if end <= start:
                raise ScheduleError(f"{slice_}, which is empty")
            if end > pool:
                raise ScheduleError(
                    f"{slice_}, which overlaps with its own outputs: before it there are "
                    f"{pool} states"
                )
            if end < pool:
                raise ScheduleError(
                    f"{slice_} and so drops the plain cascade, which is the last of the {pool} "
                    f"states before it: the slice must end at {pool}"
                )
            if start < previous:
                raise ScheduleError(
                    f"{slice_}, but stage {t - 1} began at {previous}: a state that a stage left "
                    "out cannot come back later"
                )
            pool, previous = pool + end - start, start

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.starts)

    @property
    def groups_per_stage(self) -> tuple[int, ...]:
        """How many groups, and so supervisions, each stage has."""
        return tuple(end - start for start, end in zip(self.starts, self.ends))

    @property
    def num_groups(self) -> int:
        """Supervisions of all stages together."""
        return sum(self.groups_per_stage)

    def inputs(self, stage: int) -> range:
        """Positions in the pool that a stage reads."""
        return range(self.starts[stage], self.ends[stage])

    def groups(self, stage: int) -> range:
        """Numbers of a stage's groups; the last is the plain cascade."""
        # The outputs of the stages before fill the pool up to the end of the slice.
        first = self.ends[stage] - 1
        return range(first, first + len(self.inputs(stage)))

    @property
    def stage_of_group(self) -> tuple[int, ...]:
        """Stage of every group."""
        return tuple(t for t in range(self.num_stages) for _ in self.inputs(t))

    def check_fits(self, num_stages: int) -> None:
        """Compare with a decoder.

        Raises:
            ScheduleError: the decoder has another number of stages.
        """
        if self.num_stages < num_stages:
            raise ScheduleError(
                f"stage {self.num_stages} of the decoder has no slice: the schedule is for "
                f"{self.num_stages} stages, the decoder has {num_stages}"
            )
        if self.num_stages > num_stages:
            raise ScheduleError(
                f"the schedule has a slice for stage {num_stages}, which the decoder lacks: the "
                f"schedule is for {self.num_stages} stages, the decoder has {num_stages}"
            )

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Ways of a query through the decoder, from the initial queries to a group that no stage
        reads on.

        Returns:
            for each path S groups, the one that it passes at each stage. At a stage that the path
            leaves out the query stays as it is: there it is the group before, or -1 if the path
            has not begun.
        """
        source = [p - 1 for t in range(self.num_stages) for p in self.inputs(t)]
        continuations = self._continuations()
        stage_of_group = self.stage_of_group
        paths = []
        for last in range(self.num_groups):
            if last in continuations:
                continue
            path = [-1] * self.num_stages
            group, end = last, self.num_stages
            while group >= 0:
                begin = stage_of_group[group]
                path[begin:end] = [group] * (end - begin)
                group, end = source[group], begin
            paths.append(tuple(path))
        return tuple(paths)

    def path_of_group(self) -> tuple[int, ...]:
        """For each group the place, in :meth:`paths`, of the path that it is on.

        States that several stages read have several futures. That of a group is the one in which
        it leaves out no stage: to the first stage that reads its output.
        """
        last_group_to_path = {path[-1]: i for i, path in enumerate(self.paths())}
        continuations = self._continuations()
        places = []
        for group in range(self.num_groups):
            while group in continuations:
                group = continuations[group]
            places.append(last_group_to_path[group])
        return tuple(places)

    def _continuations(self) -> dict[int, int]:
        """Group -> group of the first stage that reads its output."""
        continuations: dict[int, int] = {}
        for t in range(self.num_stages):
            for position, group in zip(self.inputs(t), self.groups(t)):
                continuations.setdefault(position - 1, group)
        return continuations


def _as_integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ScheduleError(f"{name} of a schedule are a list, a number a stage, not {values!r}")
    for t, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ScheduleError(f"{name} of a schedule are integers; stage {t} has {value!r}")
    return tuple(values)


def _from_starts(starts: Sequence[int]) -> RecollectionSchedule:
    ends = []
    pool = 1
    for start in starts:
        ends.append(pool)
        pool = 2 * pool - start
    return RecollectionSchedule(tuple(starts), tuple(ends))


def plain_schedule(num_stages: int) -> RecollectionSchedule:
    """No recollection, the ordinary cascade: each stage reads the output of the stage before."""
    _check_num_stages(num_stages)
    return _from_starts(range(num_stages))


def dense_schedule(num_stages: int) -> RecollectionSchedule:
    """Every stage reads every state (dense query recollection): 2^t groups at stage t."""
    _check_num_stages(num_stages)
    return _from_starts([0] * num_stages)


def selective_schedule(num_stages: int, *, late_start: int = 0) -> RecollectionSchedule:
    """Selective query recollection: stage t reads all outputs of stages t - 2 and t - 1.

    The groups of the stages are Fibonacci's numbers 1, 2, 3, 5, 8, 13, ...; the initial queries
    count as the output of a stage before stage 0.

    Args:
        num_stages: S.
        late_start: stages 1 to ``late_start`` read the output of the stage before alone, as
            without recollection, so that it begins later and costs less.

    Raises:
        ScheduleError: no stage is left that could recollect.
    """
    _check_num_stages(num_stages)
    if isinstance(late_start, bool) or not isinstance(late_start, int) or late_start < 0:
        raise ScheduleError(f"late_start must be an integer of at least 0, got {late_start!r}")
    if late_start > max(num_stages - 2, 0):
        raise ScheduleError(
            f"with late_start={late_start} recollection begins at stage {late_start + 1}, but the "
            f"last stage is {num_stages - 1}: choose less, or plain_schedule for none"
        )
    starts: list[int] = []
    before, newest, pool = 0, 0, 1  # where the outputs of stages t - 2 and t - 1 begin, and end
    for t in range(num_stages):
        starts.append(newest if t <= late_start else before)
        before, newest, pool = newest, pool, 2 * pool - starts[t]
    return _from_starts(starts)


def _check_num_stages(num_stages: int) -> None:
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        raise ScheduleError(f"num_stages must be an integer of at least 1, got {num_stages!r}")
