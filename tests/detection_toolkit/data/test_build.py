import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import LazyConfig, instantiate
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.env import seed_all_rng

from detection_toolkit.config import get_config
from detection_toolkit.data import (
    DetectionMapper,
    LoaderProcessError,
    UnreadableImageError,
    build_test_loader,
    build_train_loader,
    get_detection_dataset,
)


def make_dataset(tmp_path, document=None, **kwargs):
    json_file, image_root = write_dataset(tmp_path, document, **kwargs)
    return get_detection_dataset(json_file=json_file, image_root=image_root, filter_empty=False)


def make_train_loader(dataset, **kwargs):
    mapper = DetectionMapper(True, augmentations=[])
    arguments = {"mapper": mapper, "total_batch_size": 2, "num_workers": 0, **kwargs}
    return build_train_loader(dataset=dataset, **arguments)


def make_test_loader(dataset):
    mapper = DetectionMapper(False, augmentations=[])
    return build_test_loader(dataset=dataset, mapper=mapper, num_workers=0)


def image_ids(batches):
    return [[x["image_id"] for x in batch] for batch in batches]


def test_training_never_ends_and_sees_every_image_once_a_round(tmp_path):
    loader = make_train_loader(make_dataset(tmp_path))
    seen = list(itertools.chain(*image_ids(itertools.islice(loader, 6))))
    assert [sorted(seen[i : i + 4]) for i in (0, 4, 8)] == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_follows_the_seed(tmp_path, num_workers):
    dataset = make_dataset(tmp_path, num_images=12)

    def order(seed):
        seed_all_rng(seed)
        loader = make_train_loader(dataset, num_workers=num_workers)
        return image_ids(itertools.islice(loader, 8))

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_sampler_can_be_given(tmp_path):
    sampler = TrainingSampler(4, shuffle=False)
    loader = make_train_loader(make_dataset(tmp_path), sampler=sampler)
    assert image_ids(itertools.islice(loader, 3)) == [[1, 2], [3, 4], [1, 2]]


def test_landscape_and_portrait_are_batched_apart(tmp_path):
    document = make_document(num_images=8)
    for image in document["images"][::2]:
        image["height"], image["width"] = 96, 64
    loader = make_train_loader(make_dataset(tmp_path, document))
    batches = list(itertools.islice(loader, 10))
    kinds = [{x["width"] > x["height"] for x in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    mixed = make_train_loader(make_dataset(tmp_path, document), aspect_ratio_grouping=False)
    batches = list(itertools.islice(mixed, 30))
    assert any(len({x["width"] for x in batch}) == 2 for batch in batches)


def test_images_without_objects_reach_the_batch(tmp_path):
    document = make_document(num_images=2, boxes_per_image=1)
    document["annotations"] = document["annotations"][:1]
    (batch,) = itertools.islice(make_train_loader(make_dataset(tmp_path, document)), 1)
    assert {x["image_id"]: len(x["instances"]) for x in batch} == {1: 1, 2: 0}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_stop_the_run_or_are_skipped_on_request(tmp_path, num_workers, caplog):
    dataset = make_dataset(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"1\.png"):
        list(itertools.islice(make_train_loader(dataset, num_workers=num_workers), 6))
    loader = make_train_loader(dataset, num_workers=num_workers, skip_unreadable=True)
    seen = set(itertools.chain(*image_ids(itertools.islice(loader, 12))))
    assert seen == {2, 3, 4}
    if num_workers == 0:  # others have a log of their own
        messages = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
        assert len(messages) == 1 and messages[0].endswith("1.png (1 so far)")


def test_missing_images_are_named_before_the_first_step(tmp_path, caplog):
    dataset = make_dataset(tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    named = r"1 of the 4 images of dataloader\.{} are missing, the first one is .*2\.png"
    with pytest.raises(FileNotFoundError, match=named.format("train") + ".*skip_unreadable=true"):
        make_train_loader(dataset)
    with pytest.raises(FileNotFoundError, match=named.format("test") + "(?!.*skip_unreadable)"):
        build_test_loader(dataset=dataset, mapper=DetectionMapper(False, augmentations=[]))
    loader = make_train_loader(dataset, skip_unreadable=True)
    assert [m for m in caplog.messages if "are missing and will be skipped" in m]
    seen = set(itertools.chain(*image_ids(itertools.islice(loader, 12))))
    assert seen == {1, 3, 4}
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="4 of the 4 images"):
        make_train_loader(dataset, skip_unreadable=True)


def test_an_image_in_other_letters_is_named(tmp_path):
    dataset = make_dataset(tmp_path)
    (tmp_path / "images" / "2.png").rename(tmp_path / "images" / "2.PNG")
    with pytest.raises(FileNotFoundError, match=r"2\.png \(there is 2\.PNG\): put them there"):
        make_test_loader(dataset)


def test_another_mapper_may_take_file_names_for_something_else(tmp_path):
    dataset = [{"file_name": f"key {i}", "width": 2, "height": 1} for i in range(3)]
    loader = build_test_loader(dataset=dataset, mapper=lambda d: d["file_name"], num_workers=0)
    assert list(itertools.chain(*loader)) == ["key 0", "key 1", "key 2"]


def test_nothing_but_unreadable_images_ends_the_run(tmp_path):
    dataset = make_dataset(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"no picture")
    loader = make_train_loader(dataset, skip_unreadable=True)
    with pytest.raises(UnreadableImageError, match="none of the 4 images can be read"):
        next(iter(loader))


class Patient(DetectionMapper):
    """Fails in another way when it is asked too often."""

    calls = 0

    def __call__(self, record):
        self.calls += 1
        assert self.calls < 50, "it is asked over and over"
        return super().__call__(record)


def test_entries_that_share_unreadable_files_end_the_run_all_the_same(tmp_path):
    dataset = make_dataset(tmp_path)
    for record in dataset:
        record["file_name"] = str(tmp_path / f"{record['image_id'] % 2}.png")
        Path(record["file_name"]).write_bytes(b"no picture")
    mapper = Patient(True, augmentations=[])
    loader = make_train_loader(dataset, mapper=mapper, skip_unreadable=True)
    with pytest.raises(UnreadableImageError, match="none of the 2 images can be read"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers, batch_size", [(0, 1), (0, 3), (2, 1)])
def test_a_test_loader_yields_every_image_once_in_order(tmp_path, num_workers, batch_size):
    loader = build_test_loader(
        dataset=make_dataset(tmp_path),
        mapper=DetectionMapper(False, augmentations=[]),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    batches = image_ids(loader)
    assert list(itertools.chain(*batches)) == [1, 2, 3, 4]
    assert len(batches[0]) == batch_size


class Fatal(DetectionMapper):
    """Its process is killed at one image, when those before it have been used."""

    def __init__(self, used):
        super().__init__(False, augmentations=[])
        self.used = used

    def __call__(self, record):
        if record["image_id"] == 3:
            while not self.used.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(record)


def test_a_dead_process_of_a_test_loader_is_explained_with_the_images_it_had(tmp_path):
    dataset = make_dataset(tmp_path, num_images=9)
    used = tmp_path / "used"
    loader = build_test_loader(dataset=dataset, mapper=Fatal(used), batch_size=2, num_workers=1)
    message = (
        r"a loader process of the test data has ended.* 2 images had come; the next 4 were being "
        r"loaded: \S*3\.png, \S*4\.png, \S*5\.png, \S*6\.png\. .*dataloader\.test\.num_workers=0"
    )
    seen = []
    # Around the loop, as PyTorch tells of it wherever the run is.
    with pytest.raises(LoaderProcessError, match=message), loader.process_errors():
        for batch in loader:
            seen += [x["image_id"] for x in batch]
            used.touch()
    assert seen == [1, 2]


def test_what_happens_to_other_processes_is_not_said_of_a_test_loaders(tmp_path):
    dataset = make_dataset(tmp_path)
    loader = build_test_loader(
        dataset=dataset, mapper=DetectionMapper(False, augmentations=[]), num_workers=1
    )
    next(iter(loader))
    with pytest.raises(RuntimeError, match="^DataLoader worker"), loader.process_errors():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")


def test_empty_data_sets_are_refused():
    mapper = DetectionMapper(False, augmentations=[])
    with pytest.raises(ValueError, match="training set has no images"):
        make_train_loader([])
    with pytest.raises(ValueError, match="test set has no images"):
        build_test_loader(dataset=[], mapper=mapper)


@pytest.mark.parametrize("processes, batch", [(1, 0), (1, -2), (2, 3), (8, 12)])
def test_a_batch_that_the_processes_cannot_share_is_refused(
    tmp_path, monkeypatch, processes, batch
):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
    with pytest.raises(ValueError, match=rf"total_batch_size={batch} .* {processes} process"):
        make_train_loader(make_dataset(tmp_path), total_batch_size=batch)


@pytest.mark.parametrize(
    "config", ["common/data/shapes.py", "common/data/coco.py", "common/data/coco_crop.py"]
)
def test_a_config_takes_any_coco_json_from_the_command_line(tmp_path, config):
    json_file, image_root = write_dataset(tmp_path)
    cfg = LazyConfig.apply_overrides(
        get_config(config),
        [
            *(
                f"dataloader.{split}.dataset.{key}={value}"
                for split in ("train", "test")
                for key, value in (("json_file", json_file), ("image_root", image_root))
            ),
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            "dataloader.train.total_batch_size=2",
        ],
    )
    (batch,) = itertools.islice(instantiate(cfg.dataloader.train), 1)
    assert len(batch) == 2
    assert all(x["image"].dtype == torch.uint8 for x in batch)
    assert sorted(itertools.chain(*image_ids(instantiate(cfg.dataloader.test)))) == [1, 2, 3, 4]


def test_the_test_images_have_the_format_of_the_training_images():
    cfg = get_config("common/data/coco.py")
    cfg.dataloader.train.mapper.image_format = "BGR"
    assert cfg.dataloader.test.mapper.image_format == "BGR"


@pytest.mark.parametrize("make", [make_train_loader, make_test_loader])
def test_sizes_that_the_images_do_not_have_are_found_before_the_first_step(tmp_path, make):
    document = make_document()
    dataset = make_dataset(tmp_path, document)
    make(dataset)
    dataset[2]["height"] = 65
    with pytest.raises(ValueError, match=r"3\.png of .* is 96x64 pixels, but .* for 96x65"):
        make(dataset)
