"""Schedules: the published ones, their rules, and what breaks them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqr import (
    RecollectionSchedule,
    ScheduleError,
    dense_schedule,
    plain_schedule,
    selective_schedule,
)

PUBLISHED = {
    "selective": (selective_schedule(6), "0 0 1 2 4 7", "1 2 4 7 12 20", 32),
    "selective, 7 stages": (selective_schedule(7), "0 0 1 2 4 7 12", "1 2 4 7 12 20 33", 53),
    "dense": (dense_schedule(6), "0 0 0 0 0 0", "1 2 4 8 16 32", 63),
    "none": (plain_schedule(6), "0 1 2 3 4 5", "1 2 3 4 5 6", 6),
    "late 1": (selective_schedule(6, late_start=1), "0 1 1 2 3 5", "1 2 3 5 8 13", 20),
    "late 2": (selective_schedule(6, late_start=2), "0 1 2 2 3 4", "1 2 3 4 6 9", 13),
    "late 3": (selective_schedule(6, late_start=3), "0 1 2 3 3 4", "1 2 3 4 5 7", 9),
    "late 4": (selective_schedule(6, late_start=4), "0 1 2 3 4 4", "1 2 3 4 5 6", 7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name):
    schedule, starts, ends, supervisions = PUBLISHED[name]
    assert schedule.starts == tuple(map(int, starts.split()))
    assert schedule.ends == tuple(map(int, ends.split()))
    assert schedule.num_groups == supervisions


@st.composite
def schedules(draw):
    """Any valid schedule of up to six stages."""
    starts, ends, pool, start = [], [], 1, 0
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(start, pool - 1))
        starts.append(start)
        ends.append(pool)
        pool += pool - start
    return RecollectionSchedule(tuple(starts), tuple(ends))


def follow(schedule):
    """Stage and input of every group, by simulating the pool: None is the initial queries."""
    pool, groups = [None], []
    for t, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        for source in pool[start:end]:
            groups.append((t, source))
            pool.append(len(groups) - 1)
    return groups


@given(schedules())
def test_groups_are_numbered_in_the_order_of_the_pool(schedule):
    groups = follow(schedule)
    assert schedule.num_groups == len(groups)
    assert schedule.stage_of_group == tuple(t for t, _ in groups)
    for t in range(schedule.num_stages):
        for position, group in zip(schedule.inputs(t), schedule.groups(t)):
            assert groups[group] == (t, position - 1 if position else None)
        last = schedule.groups(t)[-1]
        assert groups[last][1] == (schedule.groups(t - 1)[-1] if t else None)


def test_a_single_stage_has_nothing_to_recollect():
    assert selective_schedule(1) == plain_schedule(1) == dense_schedule(1)


@given(st.integers(2, 9), st.data())
def test_selective_stages_read_the_outputs_of_the_two_stages_before(num_stages, data):
    late_start = data.draw(st.integers(0, num_stages - 2))
    schedule = selective_schedule(num_stages, late_start=late_start)
    groups = follow(schedule)

    def outputs(t):
        return [None] if t < 0 else list(schedule.groups(t))

    for t in range(num_stages):
        sources = [groups[g][1] for g in schedule.groups(t)]
        earlier = outputs(t - 2) if t > late_start else []
        assert sources == [*earlier, *outputs(t - 1)]


@given(schedules())
def test_a_path_is_the_way_of_a_query_through_the_stages(schedule):
    groups, paths = follow(schedule), schedule.paths()
    assert len(set(paths)) == len(paths)
    for path in paths:
        before = None
        for t, group in enumerate(path):
            if group >= 0 and groups[group][0] == t:
                assert groups[group][1] == before  # each group is given what the last one left
                before = group
            else:  # the path leaves the stage out
                assert group == (-1 if before is None else before)
    assert tuple(schedule.groups(t)[-1] for t in range(schedule.num_stages)) in paths


@given(schedules())
def test_every_group_is_on_its_path_which_goes_on_at_once(schedule):
    groups, paths = follow(schedule), schedule.paths()
    for group, place in enumerate(schedule.path_of_group()):
        path = paths[place]
        t = groups[group][0]
        assert path[t] == group
        if t + 1 < schedule.num_stages:
            readers = [g for g in schedule.groups(t + 1) if groups[g][1] == group]
            assert path[t + 1] == (readers[0] if readers else group)


def test_paths_of_four_stages():
    # 0: initial; stage 0: 0; stage 1: 1, 2; stage 2: 3, 4, 5; stage 3: 6 ... 10.
    schedule = selective_schedule(4)
    assert schedule.paths() == (
        (-1, 1, 1, 6),  # past stages 0 and 2
        (0, 2, 2, 7),  # past stage 2
        (0, 0, 3, 8),  # past stage 1
        (-1, 1, 4, 9),  # past stage 0
        (0, 2, 5, 10),  # the plain cascade
    )
    assert schedule.path_of_group() == (4, 3, 4, 2, 3, 4, 0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("starts", "ends", "message"),
    [
        ([], [], "stage 0 has no slice"),
        ([0, 1], [1], "stage 1 lacks its end"),
        ([0], [1, 2], "stage 1 lacks its start"),
        ([0, 1, 2], [1, 2, 2], r"stage 2 reads \[2, 2\) of the pool, which is empty"),
        ([0, 1, 2], [1, 1, 3], r"stage 1 reads \[1, 1\)"),
        ([0, -1], [1, 2], "stage 1 .* begins before the initial queries"),
        ([0, 0, 1], [1, 3, 4], r"stage 1 reads \[0, 3\) .* overlaps with its own outputs"),
        ([0, 0, 0], [1, 2, 3], "stage 2 .* drops the plain cascade.*must end at 4"),
        ([0, 1, 0], [1, 2, 3], "stage 2 .* stage 1 began at 1"),
        ([0, 0.5], [1, 2], "integers; stage 1 has 0.5"),
        ([False], [1], "stage 0 has False"),
        (3, [1], "starts of a schedule are a list, a number a stage, not 3"),
        ([0], "1", "ends of a schedule are a list"),
    ],
)
def test_schedules_that_cannot_be_followed_are_refused(starts, ends, message):
    with pytest.raises(ScheduleError, match=message):
        RecollectionSchedule(starts, ends)


@pytest.mark.parametrize("make", [plain_schedule, dense_schedule, selective_schedule])
@pytest.mark.parametrize("num_stages", [0, -1, 2.0, True])
def test_numbers_of_stages_that_make_no_sense_are_refused(make, num_stages):
    with pytest.raises(ScheduleError, match="num_stages"):
        make(num_stages)


@pytest.mark.parametrize("late_start", [-1, 5, 6, 1.5, True])
def test_late_starts_that_leave_no_stage_are_refused(late_start):
    with pytest.raises(ScheduleError, match="late_start|stage 6|stage 7"):
        selective_schedule(6, late_start=late_start)


def test_a_schedule_for_another_decoder_names_the_stage():
    schedule = selective_schedule(4)
    schedule.check_fits(4)
    with pytest.raises(ScheduleError, match="stage 4 of the decoder has no slice"):
        schedule.check_fits(6)
    with pytest.raises(ScheduleError, match="a slice for stage 3, which the decoder lacks"):
        schedule.check_fits(3)
