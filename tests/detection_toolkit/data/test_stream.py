"""The stream of training images is a function of (seed, position), for any number of processes."""

import itertools
import os
import random
import signal

import cv2
import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.data.transforms import RandomFlip
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE
from torch.utils.data import DataLoader, SequentialSampler

from detection_toolkit.data import (
    DetectionMapper,
    LoaderProcessError,
    build_train_loader,
    get_detection_dataset,
)
from detection_toolkit.data.stream import Draw, GroupedStream, SeededDataset

GROUPS = [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1]


@pytest.fixture
def job(monkeypatch):
    """Take the place of one process of several."""

    def be(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return be


def make_stream(batch_size=2, seed=3, groups=GROUPS):
    return GroupedStream(TrainingSampler(len(groups), seed=seed), groups, batch_size)


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_batches_are_of_one_group_and_miss_no_image():
    draws = list(itertools.chain(*take(make_stream(), 400)))
    batches = [draws[i : i + 2] for i in range(0, len(draws), 2)]
    assert all(GROUPS[a.index] == GROUPS[b.index] for a, b in batches)
    positions = sorted(draw.position for draw in draws)
    assert len(set(positions)) == len(positions)
    # All but those that wait.
    assert len(set(range(positions[-1] + 1)) - set(positions)) <= 2
    order = list(itertools.islice(TrainingSampler(len(GROUPS), seed=3), 900))
    assert all(order[draw.position] == draw.index for draw in draws)


def test_processes_share_the_batches_of_one(job):
    alone = take(make_stream(), 12)
    shares = []
    for rank in range(3):
        job(rank, 3)
        shares.append(take(make_stream(), 4))
    assert [batch for step in zip(*shares) for batch in step] == alone


def test_the_state_is_the_same_in_every_process(job):
    states = []
    for rank in range(3):
        job(rank, 3)
        stream = make_stream()
        take(stream, 5)
        states.append(stream.state_dict())
    assert states[0] == states[1] == states[2]


@given(
    before=st.integers(0, 30),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.lists(st.integers(0, 1), min_size=1, max_size=12),
)
def test_a_stream_that_goes_on_sees_every_position_once(before, sizes, groups):
    """Also with batches of another size."""
    first = make_stream(sizes[0], groups=groups)
    drawn = take(first, before)
    second = make_stream(sizes[1], seed=99, groups=groups)
    assert second.load_state_dict(first.state_dict()) is None
    drawn += take(second, 20)
    positions = [draw.position for batch in drawn for draw in batch]
    assert len(set(positions)) == len(positions)
    missing = set(range(max(positions) + 1)) - set(positions)
    assert len(missing) <= 2 * max(sizes)
    if sizes[0] == sizes[1]:
        assert drawn == take(make_stream(sizes[0], groups=groups), before + 20)


def test_images_that_waited_for_a_larger_batch_come_in_the_same_order_in_every_case():
    first = make_stream(5)
    take(first, 2)
    state = first.state_dict()
    whole = make_stream(2)
    whole.load_state_dict(state)
    expected = take(whole, 12)
    stream = make_stream(2)
    stream.load_state_dict(state)
    drawn = []
    for _ in range(12):  # interrupted after every step
        drawn += take(stream, 1)
        state = stream.state_dict()
        stream = make_stream(2)
        stream.load_state_dict(state)
    assert drawn == expected


def test_another_number_of_processes_goes_on_with_the_same_batches(job):
    expected = take(make_stream(), 12)
    job(1, 2)
    stream = make_stream()
    take(stream, 3)
    state = stream.state_dict()
    job(0, 1)
    stream = make_stream(seed=7)
    assert stream.load_state_dict(state) is None
    assert take(stream, 6) == expected[6:]


def test_a_data_set_of_another_size_begins_anew_at_a_later_position():
    stream = make_stream()
    take(stream, 5)
    other = make_stream(groups=[0, 1, 0])
    assert "has 3 images instead of 11" in other.load_state_dict(stream.state_dict())
    draws = list(itertools.chain(*take(other, 10)))
    assert min(draw.position for draw in draws) >= stream.state_dict()["position"]
    assert {draw.index for draw in draws} == {0, 1, 2}


def test_other_samplers_of_detectron2_can_be_continued_and_foreign_ones_say_so():
    factors = torch.tensor([1.0, 2.5, 1.3, 1.0])
    whole = GroupedStream(RepeatFactorTrainingSampler(factors, seed=2), [0, 1, 1, 0], 2)
    expected = take(whole, 20)
    first = GroupedStream(RepeatFactorTrainingSampler(factors, seed=2), [0, 1, 1, 0], 2)
    take(first, 9)
    second = GroupedStream(RepeatFactorTrainingSampler(factors, seed=5), [0, 1, 1, 0], 2)
    assert second.load_state_dict(first.state_dict()) is None
    assert take(second, 11) == expected[9:]

    foreign = GroupedStream(SequentialSampler(range(4)), [0, 0, 0, 0], 2)
    assert [[d.index for d in batch] for batch in take(foreign, 9)] == [[0, 1], [2, 3]]
    assert "order of a SequentialSampler cannot be continued" in foreign.load_state_dict({})


def draw_numbers(record):
    return {**record, "drawn": (random.random(), np.random.rand(), float(torch.rand(())))}


def test_what_an_image_draws_follows_from_its_position_alone():
    dataset = SeededDataset([{"a": 0}, {"a": 1}], draw_numbers, seed=3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = dataset[Draw(7, 0)]
    assert dataset[Draw(7, 1)]["drawn"] == first["drawn"]
    assert dataset[Draw(8, 0)]["drawn"] != first["drawn"]
    assert SeededDataset([{"a": 0}], draw_numbers, seed=4)[Draw(7, 0)]["drawn"] != first["drawn"]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@given(size=st.integers(1, 30), readable=st.integers(0, 29), position=st.integers(0, 5))
def test_the_one_readable_image_is_found(size, readable, position):
    readable %= size
    tried = []

    def mapper(number):
        tried.append(number)
        return number if number == readable else None

    dataset = SeededDataset(list(range(size)), mapper)
    assert dataset[Draw(position, 0)] == readable
    assert len(tried) <= size


def test_a_mapper_that_skips_everything_is_not_asked_for_ever():
    answers = iter([None] * 7)
    with pytest.raises(ValueError, match="skipped every one of the 7 images"):
        SeededDataset(list(range(7)), lambda number: next(answers))[Draw(0, 0)]


@pytest.fixture
def loader(tmp_path):
    document = make_document(num_images=9)
    for image in document["images"][::2]:
        image["height"], image["width"] = 96, 64
    json_file, root = write_dataset(tmp_path, document)
    dataset = get_detection_dataset(json_file=json_file, image_root=root)

    def make(num_workers, seed=3):
        return build_train_loader(
            dataset=dataset,
            mapper=DetectionMapper(True, augmentations=[RandomFlip(prob=0.5)]),
            total_batch_size=2,
            num_workers=num_workers,
            sampler=TrainingSampler(len(dataset), seed=seed),
        )

    return make


def content(batches):
    return [[(x["image_id"], x["image"].sum(0).tolist()) for x in batch] for batch in batches]


def test_loader_processes_change_nothing_and_prefetching_loses_nothing(loader):
    expected = content(itertools.islice(loader(0), 16))
    assert content(itertools.islice(loader(1), 16)) == expected
    first = loader(3)
    assert content(itertools.islice(first, 5)) == expected[:5]
    second = loader(2, seed=8)
    assert second.load_state_dict(first.state_dict()) is None
    assert content(itertools.islice(second, 11)) == expected[5:]


def test_iterating_again_goes_on(loader):
    expected = content(itertools.islice(loader(0), 6))
    same = loader(0)
    assert content(itertools.islice(same, 3)) + content(itertools.islice(same, 3)) == expected


def test_a_loader_draws_none_of_trainings_random_numbers(loader):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(itertools.islice(loader(0), 3))
    list(itertools.islice(loader(1), 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


class Fatal:
    """A mapper whose process is killed, as by a system short of memory."""

    def __call__(self, record):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_loader_process_is_named_at_the_first_batch(tmp_path):
    json_file, root = write_dataset(tmp_path)
    dataset = get_detection_dataset(json_file=json_file, image_root=root)
    loader = build_train_loader(dataset=dataset, mapper=Fatal(), total_batch_size=2, num_workers=1)
    with pytest.raises(LoaderProcessError, match="a loader process .* lower .*num_workers"):
        next(iter(loader))


class Mistaken:
    """A mapper with a mistake in it, which PyTorch reports as of a "DataLoader worker", too."""

    def __call__(self, record):
        raise RuntimeError("shapes do not fit")


def test_a_mistake_in_a_loader_process_is_not_taken_for_its_end(tmp_path):
    json_file, root = write_dataset(tmp_path)
    dataset = get_detection_dataset(json_file=json_file, image_root=root)
    loader = build_train_loader(
        dataset=dataset, mapper=Mistaken(), total_batch_size=2, num_workers=1
    )
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        next(iter(loader))


class ThreadNumbers(torch.utils.data.Dataset):
    """PyTorch's and OpenCV's, while an image is mapped."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        with DetectionMapper(is_train=False, augmentations=[]).named_errors("a.png"):
            return torch.get_num_threads(), cv2.getNumThreads()


def test_a_loader_process_takes_one_core_whatever_threads_its_parent_has():
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)  # starts OpenCV's threads
    loader = DataLoader(ThreadNumbers(), num_workers=2, collate_fn=lambda x: x[0], timeout=PATIENCE)
    try:
        assert list(loader) == [(1, 1), (1, 1)]
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
