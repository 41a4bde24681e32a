"""The plan of docs/sqr.md, by which the schedules' costs are measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from detectron2.config import instantiate

from detection_toolkit.config import apply_overrides, get_config
from detection_toolkit.studies.plan import load_plan
from sqr import dense_schedule, plain_schedule, selective_schedule

PLAN = load_plan("ablations/sqr_schedules.yaml")
SCHEDULES = {
    "none": plain_schedule(6),
    "selective": selective_schedule(6),
    "dense": dense_schedule(6),
    **{f"late{start}": selective_schedule(6, late_start=start) for start in range(1, 5)},
}


def model_config(variant: str):
    overrides = [*PLAN.overrides, *PLAN.variants[variant]]
    return apply_overrides(get_config(PLAN.config), overrides).model


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_variant_has_the_schedule_of_its_name(name):
    assert instantiate(model_config(name).decoder.route.schedule) == SCHEDULES[name]


def test_the_first_variant_is_the_one_that_others_are_compared_with():
    assert next(iter(PLAN.variants)) == "none"
    assert {name.split("_")[0] for name in PLAN.variants} == set(SCHEDULES)


def test_ways_of_running_the_groups():
    for name in PLAN.variants:
        model = model_config(name)
        assert model.decoder.route.get("batched", True) is ("sequential" not in name)
        assert model.execution.checkpoint is ("checkpoint" in name)


def test_the_page_tells_the_supervisions_of_each_schedule():
    page = (Path(__file__).resolve().parents[2] / "docs" / "sqr.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (\d+) \|", page, re.MULTILINE))
    assert {name: int(rows[name]) for name in SCHEDULES} == {
        name: schedule.num_groups for name, schedule in SCHEDULES.items()
    }
