"""What each group is given, and that the two ways of running groups agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_batch
from sqr_models import NUM_STAGES, losses_and_gradients, make_plain, with_recollection
from torch import nn

from detection_toolkit.structures import Queries, StageOutput, map_tensors
from maps import make_maps
from sqr import (
    RecollectionSchedule,
    ScheduleError,
    dense_schedule,
    plain_schedule,
    recollect,
    selective_schedule,
)
from stageinteractor import DynamicFilters, FilterBank, FilterBankDecoder

SCHEDULES = {
    "plain": plain_schedule(NUM_STAGES),
    "selective": selective_schedule(NUM_STAGES),
    "dense": dense_schedule(NUM_STAGES),
    "late 1": selective_schedule(NUM_STAGES, late_start=1),
    "late 2": selective_schedule(NUM_STAGES, late_start=2),
    "short": RecollectionSchedule((0, 0, 2, 3), (1, 2, 4, 6)),  # some states are dropped at once
}
FAMILIES = ("adamixer", "stageinteractor")


class Scribe(nn.Module):
    """A stage that appends its digit to the content, and notes what it was given."""

    def __init__(self, digit):
        super().__init__()
        self.digit = digit
        self.given = []

    def forward(self, queries, maps, bank):
        content, xyzr = queries.content, queries.geometry
        made = 10 * content + self.digit
        filters = [entry.channel[:, 0, 0] for entry in bank.entries]
        for row in range(len(content)):
            state = (content[row, 0, 0], xyzr[row, 0, 0], *(x[row] for x in filters))
            self.given.append(tuple(map(float, state)))
        spatial = made[..., None, None]
        after = Queries(made, 10 * xyzr + self.digit)
        output = StageOutput(made, made[..., :1].expand_as(xyzr), after)
        return output, bank.deposit(DynamicFilters(made, spatial))


def written_by_hand(schedule, image):
    """The same by hand: what each stage is given as (content, geometry, filters of the bank)."""
    pool = [(image, image, [])]  # number, and the numbers of the stages that it has passed
    given = []
    for t, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        rows, new = [], []
        for content, begin, passed in pool[start:end]:
            filters, state = [], begin
            for k in range(t):
                # The filter of stage k is made of the content with which the state came to it,
                # whether it then passed the stage or not.
                filters.append(10 * state + k + 1)
                if k in passed:
                    state = 10 * state + k + 1
            assert state == content
            rows.append((float(content), float(content), *map(float, filters)))
            new.append((10 * content + t + 1, begin, [*passed, t]))
        pool += new
        given.append(rows)
    return given


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("num_images", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_carry_content_geometry_and_a_filter_of_every_stage(name, num_images, batched):
    schedule = SCHEDULES[name]
    decoder = FilterBankDecoder([Scribe(t + 1) for t in range(NUM_STAGES)], reuse_start=1)
    numbers = torch.arange(1.0, num_images + 1, dtype=torch.float64)
    numbers = numbers[:, None, None]
    queries = Queries(numbers.expand(-1, 2, 3), numbers.expand(-1, 2, 4))
    outputs = recollect(decoder, schedule, make_maps([], []), queries, batched=batched)
    by_hand = [written_by_hand(schedule, b + 1) for b in range(num_images)]
    for t, stage in enumerate(decoder.stages):
        assert sorted(stage.given) == sorted(row for image in by_hand for row in image[t])
        # Every output belongs to its group and its image.
        for i, group in enumerate(schedule.groups(t)):
            for b in range(num_images):
                content = by_hand[b][t][i][0]
                for after in outputs[group].queries[:2]:
                    assert (after[b] == 10 * content + t + 1).all()


def test_the_bank_of_a_plain_cascade_is_the_decoders_own():
    decoder = FilterBankDecoder([Scribe(t + 1) for t in range(NUM_STAGES)], reuse_start=2)
    start = queries = Queries(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
    maps, bank = make_maps([], []), FilterBank()
    for t in range(NUM_STAGES):
        output, bank = decoder.run_stage(t, queries, maps, bank)
        queries = output.queries
    expected = [list(stage.given) for stage in decoder.stages]
    for stage in decoder.stages:
        stage.given.clear()
    schedule = selective_schedule(NUM_STAGES)
    recollect(decoder, schedule, maps, start)
    assert [stage.given[-1:] for stage in decoder.stages] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_without_recollection_training_is_the_plain_detectors_bit_for_bit(family):
    plain = make_plain(family, dtype=torch.float32)
    batch = make_batch([2, 0, 3])
    expected, expected_gradients = losses_and_gradients(plain, batch)
    for batched in (True, False):
        detector = with_recollection(plain, plain_schedule(NUM_STAGES), batched=batched)
        losses, gradients = losses_and_gradients(detector, batch)
        assert list(losses) == list(expected)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)
        for name, gradient in expected_gradients.items():
            assert torch.equal(gradients[name], gradient), name


def tensors(output):
    return (output.logits, output.boxes, output.queries.content, output.queries.geometry)


def plain_and_all(family, schedule, **options):
    plain = make_plain(family)
    detector = with_recollection(plain, schedule, **options)
    images = plain.preprocess_image(make_batch([1, 1, 1]))
    return plain.predict(images).stages, detector.predict(images).stages


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_group_of_each_stage_is_the_plain_cascade(family, name):
    schedule = SCHEDULES[name]
    last = [schedule.groups(t)[-1] for t in range(NUM_STAGES)]
    expected, one_by_one = plain_and_all(family, schedule, batched=False)
    assert len(one_by_one) == schedule.num_groups
    for t, stage in enumerate(expected):
        assert all(map(torch.equal, tensors(one_by_one[last[t]]), tensors(stage)))
    expected, batched = plain_and_all(family, schedule, batched=True)
    for t, stage in enumerate(expected):
        torch.testing.assert_close(tensors(batched[last[t]]), tensors(stage))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(st.sampled_from(sorted(SCHEDULES)), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_groups_agree_batched_one_by_one_and_computed_again(family, name, counts):
    batch = make_batch(counts, seed=len(counts))
    results = []
    for checkpoint in ("false", "true"):
        plain = make_plain(family, f"model.execution.checkpoint={checkpoint}")
        for batched in (True, False):
            detector = with_recollection(plain, SCHEDULES[name], batched=batched)
            results.append(losses_and_gradients(detector, batch))
    losses, gradients = results[0]
    for other_losses, other_gradients in results[1:]:
        torch.testing.assert_close(other_losses, losses)
        torch.testing.assert_close(other_gradients, gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_images", [1, 3])
def test_groups_and_images_do_not_see_one_another(family, num_images):
    """A batch of groups against one group and one image at a time, by the plain decoder's parts."""
    schedule = SCHEDULES["selective"]
    plain = make_plain(family)
    images = plain.preprocess_image(make_batch([1] * num_images))
    detector = with_recollection(plain, schedule)
    together = detector.predict(images).stages
    maps = plain.extract_features(images)
    for b in range(num_images):
        alone = replace(
            maps,
            levels=tuple(x[b : b + 1] for x in maps.levels),
            image_sizes=maps.image_sizes[b : b + 1],
        )
        # As (queries, bank), where a stage leaves its filters with what it has read.
        pool, group = [(plain.initial_queries(alone), plain.decoder.initial_carry())], 0
        for t in range(NUM_STAGES):
            for position in schedule.inputs(t):
                queries, bank = pool[position]
                output, bank = plain.decoder.run_stage(t, queries, alone, bank)
                pool[position] = queries, bank
                pool.append((output.queries, bank))
                mine = map_tensors(lambda x, b=b: x[b : b + 1], together[group])
                torch.testing.assert_close(tensors(mine), tensors(output))
                group += 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batched", [True, False])
def test_all_groups_sample_the_same_maps_without_copies(family, batched):
    detector = with_recollection(make_plain(family), SCHEDULES["dense"], batched=batched)
    made, sampled, rows = [], [], []
    detector.backbone.register_forward_hook(lambda _, __, maps: made.extend(maps.values()))

    def note(_, inputs):
        sampled.append(inputs[2].levels)
        rows.append(len(inputs[0]))

    for stage in detector.decoder.stages:
        stage.sampling.register_forward_pre_hook(note)
    detector(make_batch([1, 2]))
    assert all(a is b for maps in sampled for a, b in zip(maps, made))
    assert rows == ([2, 4, 8, 16] if batched else [2] * 15)


def test_no_gradient_flows_through_the_geometry_of_a_state():
    plain = make_plain("adamixer")
    detector = with_recollection(plain, SCHEDULES["selective"])
    outputs = detector.predict(plain.preprocess_image(make_batch([1]))).stages
    tower = plain.decoder.stages[0].box_tower.out.weight
    own = torch.autograd.grad(outputs[0].boxes.sum(), tower, retain_graph=True)[0]
    assert own.abs().sum() > 0
    later = torch.stack([x.boxes.sum() for x in outputs[1:]]).sum()
    assert torch.autograd.grad(later, tower, allow_unused=True) == (None,)


def test_gradients_flow_through_the_content_of_a_state():
    plain = make_plain("adamixer")
    schedule = SCHEDULES["selective"]
    images = plain.preprocess_image(make_batch([1]))
    outputs = with_recollection(plain, schedule).predict(images).stages
    # The first group of stage 2 has passed stage 0, but not stage 1.
    loss = outputs[schedule.groups(2)[0]].logits.sum()
    passed, left_out = (plain.decoder.stages[t].ffn.linear1.weight for t in (0, 1))
    gradients = torch.autograd.grad(loss, [passed, left_out])
    assert gradients[0].abs().sum() > 0 and not gradients[1].any()


def test_a_schedule_for_another_decoder_is_refused():
    decoder = FilterBankDecoder([Scribe(1), Scribe(2)], reuse_start=1)
    start = Queries(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
    with pytest.raises(ScheduleError, match="stage 2"):
        recollect(decoder, selective_schedule(3), make_maps([], []), start)
