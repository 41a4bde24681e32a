"""Mosaic and mixup: boxes and masks stay with their pixels, and (seed, position) decides all."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.data.samplers import TrainingSampler
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.structures import BitMasks, BoxMode
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from detection_toolkit.config import get_config
from detection_toolkit.data import (
    DetectionMapper,
    MixUp,
    Mosaic,
    MultiImageMapper,
    UnreadableImageError,
    WeakStrongMapper,
    build_train_loader,
    get_detection_dataset,
)
from detection_toolkit.data.copy_paste import AnnotatedImage
from detection_toolkit.errors import UserError

# A pixel says which image's object it is of: every second one of 255 and 0, or their mean.
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def make_image(nth, *boxes, size=(100, 120), with_masks=True):
    """Black, with rectangles of the nth colour and class."""
    image = np.zeros((*size, 3), np.uint8)
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        image[y0:y1, x0:x1] = COLORS[nth]
        mask[y0:y1, x0:x1] = True
    return AnnotatedImage(
        image,
        np.array(boxes, float).reshape(-1, 4),
        np.full(len(boxes), nth),
        masks if with_masks else None,
    )


def pixels_of(image, nth, threshold=90):
    """(H, W) bool."""
    return (np.abs(image.astype(int) - COLORS[nth]) < threshold).all(-1)


def pixel_box(values):
    ys, xs = np.nonzero(values)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@st.composite
def four_images(draw, with_masks=True):
    images = []
    for nth in range(4):
        height, width = draw(st.integers(40, 140)), draw(st.integers(40, 140))
        x0, y0 = draw(st.integers(0, width - 9)), draw(st.integers(0, height - 9))
        x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
        images.append(
            make_image(nth, (x0, y0, x1, y1), size=(height, width), with_masks=with_masks)
        )
    return images


@given(images=four_images(), seed=st.integers(0, 10_000))
def test_boxes_and_masks_of_a_mosaic_stay_with_their_pixels(images, seed):
    np.random.seed(seed)
    result = Mosaic(scale=(0.4, 1.6))(images[0], images[1:])
    assert result.size == images[0].size and result.masks.shape[1:] == result.size
    assert len(set(result.classes.tolist())) == len(result.classes)
    for nth in range(4):
        pixels = pixels_of(result.image, nth)
        if nth not in result.classes:
            # Fewer than 16, or than a tenth of 0.4² of them all; and the border is not sharp.
            assert pixels.sum() <= max(16, 0.1 * 1.6**2 * images[nth].masks.sum()) + 60
            continue
        (place,) = np.flatnonzero(result.classes == nth)
        box, mask = result.boxes[place], result.masks[place]
        assert np.abs(pixel_box(pixels) - box).max() <= 1.5
        assert np.abs(pixel_box(mask) - box).max() <= 1
        edge = 2 * (box[2] - box[0] + box[3] - box[1])
        assert (mask ^ pixels).sum() <= edge
        assert mask.sum() >= 16 and (box[2:] <= (result.size[1], result.size[0])).all()


@given(images=four_images(with_masks=False), seed=st.integers(0, 10_000))
def test_boxes_without_masks_are_those_with_them(images, seed):
    np.random.seed(seed)
    plain = Mosaic()(images[0], images[1:])
    assert plain.masks is None
    for nth, box in zip(plain.classes, plain.boxes):
        assert np.abs(pixel_box(pixels_of(plain.image, nth)) - box).max() <= 1.5


@given(
    images=four_images(),
    other=four_images(),
    alpha=st.sampled_from([0.5, 32.0]),
    seed=st.integers(0, 10_000),
)
def test_mixup_is_the_weighted_mean_and_has_the_objects_of_both(images, other, alpha, seed):
    first, second = images[0], other[1]
    np.random.seed(seed)
    result = MixUp(alpha=alpha)(first, [second])
    np.random.seed(seed)
    share = np.random.beta(alpha, alpha)
    assert result.size == first.size
    assert (result.boxes[0] == first.boxes[0]).all() and (result.masks[0] == first.masks[0]).all()
    red, green = result.image[..., 0].astype(float), result.image[..., 1].astype(float)
    # Green is the second one's alone.
    assert green.max() <= 255 * (1 - share) + 1
    if len(result.boxes) == 2 and share < 0.9:
        box, mask = result.boxes[1], result.masks[1]
        found = green > 0.6 * 255 * (1 - share)
        assert np.abs(pixel_box(found) - box).max() <= 1.5
        assert np.abs(pixel_box(mask) - box).max() <= 1
    # Red is the first one's, of which the second one may take a share.
    inside = red[first.masks[0]]
    near = np.minimum(np.abs(inside - 255 * share), np.abs(inside - 255))
    assert near.max() <= 1 and (red[~first.masks[0]] == 0).all()


def test_an_image_that_is_mixed_in_is_made_smaller_to_fit_and_never_larger():
    np.random.seed(0)
    large = make_image(1, (0, 0, 400, 200), size=(200, 400))
    result = MixUp()(make_image(0, (0, 0, 9, 9)), [large])
    assert (result.boxes[1][2:] - result.boxes[1][:2]).tolist() == [120, 60]
    small = make_image(1, (0, 0, 40, 20), size=(20, 40))
    places = np.array([MixUp()(make_image(0), [small]).boxes[0] for _ in range(400)])
    assert (places[:, 2:] - places[:, :2] == (40, 20)).all()
    for side, room in ((0, 80), (1, 80)):
        assert set(places[:, side].astype(int)) <= set(range(room + 1))
        assert abs(places[:, side].mean() - room / 2) < 5 * room / np.sqrt(12 * 400)


def test_what_is_too_small_or_hardly_seen_is_dropped():
    """At a scale of one half and with the point in the middle, nothing is cut off at equal size."""
    middle = {"center": (0.5, 0.5), "scale": (0.5, 0.5)}
    others = [make_image(nth) for nth in (1, 2, 3)]
    # 8 x 8 pixels become 16, 6 x 10 become 15.
    image = make_image(0, (10, 10, 18, 18), (50, 50, 56, 60))
    result = Mosaic(**middle)(image, others)
    assert result.boxes.tolist() == [[5, 5, 9, 9]]
    assert len(Mosaic(**middle, min_pixels=15)(image, others).boxes) == 2
    # In full size the upper left one is cut off at the left: of 40 columns 4 are seen.
    full = {"center": (0.5, 0.5), "scale": (1.0, 1.0)}
    for first, kept in ((24, True), (23, False)):
        image = make_image(0, (first, 60, first + 40, 90))
        result = Mosaic(**full)(image, others)
        assert [box.tolist() for box in result.boxes] == [[0, 10, first - 20, 40]] * kept


def test_masks_decide_where_the_box_says_more():
    """A ring's corner: its box is seen, and few of its pixels."""
    image = make_image(0, (20, 20, 100, 80))
    masks = image.masks.copy()
    masks[0, 22:, 22:] = False  # along the upper and left edge
    image = AnnotatedImage(image.image, image.boxes, image.classes, masks)
    full = {"center": (0.5, 0.5), "scale": (1.0, 1.0)}
    others = [make_image(nth) for nth in (1, 2, 3)]
    result = Mosaic(**full)(image, others)  # what is right of 60 and below 50 is seen
    assert len(result.boxes) == 0
    result = Mosaic(**full)(AnnotatedImage(image.image, image.boxes, image.classes), others)
    assert result.boxes.tolist() == [[0, 0, 40, 30]]


def test_point_and_scales_are_uniform_in_their_ranges():
    images = [make_image(nth, (0, 0, 100, 100), size=(100, 100)) for nth in range(4)]
    np.random.seed(1)
    points, sides = [], []
    for _ in range(400):
        result = Mosaic(center=(0.3, 0.7))(images[0], images[1:])
        # The lower right one begins at the point.
        points.append(result.boxes[result.classes == 3][0, :2])
        # Without room for others.
        (box,) = Mosaic(center=(0, 0), scale=(0.5, 0.9))(images[0], images[1:]).boxes
        sides.append(box[2])
    points = np.array(points)
    assert points.min() >= 30 and points.max() <= 70
    assert np.abs(points.mean(0) - 50).max() < 5 * 40 / np.sqrt(12 * 400)
    assert abs(np.corrcoef(points.T)[0, 1]) < 5 / np.sqrt(400)
    assert min(sides) >= 50 and max(sides) <= 90
    assert abs(np.mean(sides) - 70) < 5 * 40 / np.sqrt(12 * 400)


def test_lambda_is_of_beta():
    first, second = make_image(0, (0, 0, 120, 100)), make_image(1)
    np.random.seed(2)
    shares = np.array([MixUp(alpha=2)(first, [second]).image[0, 0, 0] / 255 for _ in range(1000)])
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(0.05 / 1000)
    assert abs(shares.var() - 0.05) < 0.01


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mosaic(1.5), "prob must be from 0 to 1, got 1.5"),
        (lambda: Mosaic(center=(0.8, 0.2)), r"center must be two shares in order, got \[0.8, 0.2"),
        (lambda: Mosaic(scale=(0, 1)), "scale must be two positive factors"),
        (lambda: Mosaic(min_visible=2), "min_visible be a share, got 16 and 2"),
        (lambda: MixUp(-1), "prob must be from 0 to 1, got -1"),
        (lambda: MixUp(alpha=0), "alpha must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


# -- the mapper -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Dataset dicts of six images of one colour each, with one or two rectangles."""
    folder = tmp_path_factory.mktemp("colours")
    made = []
    for nth in range(6):
        boxes = [(6, 8, 40, 30), (50, 10, 90, 40)][: 1 + nth % 2]
        image = make_image(nth, *boxes, size=(64, 96))
        path = folder / f"{nth}.png"
        cv2.imwrite(str(path), image.image[..., ::-1])
        annotations = [
            {"bbox": list(map(float, b)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": nth}
            for b in boxes
        ]
        made.append(
            {
                "file_name": str(path),
                "height": 64,
                "width": 96,
                "image_id": nth,
                "annotations": annotations,
            }
        )
    return made


def augmentations():
    return [ResizeShortestEdge([48, 64, 72], 120, "choice"), RandomFlip(prob=0.5)]


def make_mapper(**parts):
    return MultiImageMapper(augmentations=augmentations(), **parts)


def mapped(mapper, record, others, seed):
    np.random.seed(seed)
    return mapper(record, others)


def test_without_parts_the_inputs_are_those_of_a_detection_mapper(records):
    plain = DetectionMapper(True, augmentations=augmentations())
    for seed, record in enumerate(records * 3):
        one = mapped(make_mapper(), record, records, seed)
        np.random.seed(seed)
        other = plain(record)
        assert one.keys() == other.keys()
        assert torch.equal(one["image"], other["image"])
        boxes = [x["instances"].gt_boxes.tensor for x in (one, other)]
        assert torch.allclose(*boxes, atol=1e-4)
        assert torch.equal(one["instances"].gt_classes, other["instances"].gt_classes)


@given(seed=st.integers(0, 10_000))
def test_objects_of_all_images_stay_with_their_pixels(records, seed):
    mapper = make_mapper(mosaic=Mosaic(scale=(0.7, 1.0)), use_instance_mask=True)
    view = mapped(mapper, records[seed % 6], records, seed)
    image, instances = view["image"].numpy().transpose(1, 2, 0), view["instances"]
    assert instances.image_size == image.shape[:2] and view["image_id"] == seed % 6
    assert isinstance(instances.gt_masks, BitMasks)
    for label in set(instances.gt_classes.tolist()):
        mine = instances.gt_classes == label
        pixels = pixels_of(image, label)
        masks = instances.gt_masks.tensor[mine].numpy().any(0)
        edges = (instances.gt_boxes.tensor[mine] @ torch.tensor([-1.0, -1, 1, 1])).sum()
        # An image may be among the four twice, with a part that is dropped.
        assert (masks & ~pixels).sum() <= 2 * edges
        for box in instances.gt_boxes.tensor[mine].numpy():
            x0, y0, x1, y1 = box.round().astype(int)
            inner = pixels[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
            assert inner.all()


def test_other_images_are_drawn_evenly_and_parts_by_their_share(records):
    mapper = make_mapper(mosaic=Mosaic(0.6, scale=(0.9, 1.0), min_visible=0, min_pixels=0))
    drawn, mosaics = Counter(), 0
    for seed in range(600):
        view = mapped(mapper, records[0], records[1:], seed)
        labels = view["instances"].gt_classes.tolist()
        mosaics += set(labels) != {0}
        drawn.update(set(labels) - {0})
    assert abs(mosaics / 600 - 0.6) < 5 * np.sqrt(0.24 / 600)
    assert set(drawn) == {1, 2, 3, 4, 5}
    mapper = make_mapper(mixup=MixUp(0.25))
    counts = [
        len(set(mapped(mapper, records[0], records[1:], seed)["instances"].gt_classes.tolist()))
        for seed in range(400)
    ]
    assert abs(counts.count(2) / 400 - 0.25) < 5 * np.sqrt(0.1875 / 400)


def test_a_strong_copy_is_one_of_the_mosaic(records):
    mapper = WeakStrongMapper(
        augmentations=augmentations(), strong_augmentations=[], mosaic=Mosaic(), mixup=MixUp()
    )
    weak, strong = mapped(mapper, records[0], records, 3)
    assert len(set(weak["instances"].gt_classes.tolist())) > 1
    assert torch.equal(weak["image"], strong["image"])
    assert torch.equal(weak["instances"].gt_classes, strong["instances"].gt_classes)


def test_what_is_missing_is_named(records, tmp_path):
    for part in ({"mosaic": Mosaic()}, {"mixup": MixUp()}):
        with pytest.raises(UserError, match=f"{next(iter(part))} needs the data set"):
            make_mapper(**part)(records[0])
    gone = {**records[0], "file_name": str(tmp_path / "gone.png")}
    with pytest.raises(UnreadableImageError, match="gone.png") as caught:
        make_mapper(mosaic=Mosaic())(records[0], [gone])
    assert caught.value.file_name == gone["file_name"]
    with pytest.raises(UserError, match='lacks "annot'):
        make_mapper()({k: v for k, v in records[0].items() if k != "annotations"})


# -- the stream -----------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    document = make_document(num_images=9)
    for image in document["images"][::2]:
        image["height"], image["width"] = 96, 64
    json_file, root = write_dataset(tmp_path, document)
    return get_detection_dataset(json_file=json_file, image_root=root, filter_empty=False)


def make_loader(dataset, num_workers=0, seed=3, batch=2, mix_until=None, **kwargs):
    return build_train_loader(
        dataset=dataset,
        mapper=make_mapper(mosaic=Mosaic(0.8), mixup=MixUp(0.5)),
        total_batch_size=batch,
        num_workers=num_workers,
        sampler=TrainingSampler(len(dataset), seed=seed),
        mix_until=mix_until,
        **kwargs,
    )


def content(batches):
    return [
        [
            (x["image_id"], x["image"].numpy().tobytes(), x["instances"].gt_boxes.tensor.tolist())
            for x in batch
        ]
        for batch in batches
    ]


@pytest.mark.parametrize("mix_until", [None, 15])
def test_loader_processes_and_interruptions_change_nothing(dataset, mix_until):
    expected = content(itertools.islice(make_loader(dataset, mix_until=mix_until), 14))
    loader = make_loader(dataset, 2, mix_until=mix_until)
    assert content(itertools.islice(loader, 14)) == expected
    first = make_loader(dataset, 2, mix_until=mix_until)
    assert content(itertools.islice(first, 5)) == expected[:5]
    state = json.loads(json.dumps(first.state_dict()))
    second = make_loader(dataset, seed=8, mix_until=mix_until)
    assert second.load_state_dict(state) is None
    assert content(itertools.islice(second, 9)) == expected[5:]


def test_two_processes_share_the_images_of_one(dataset, monkeypatch):
    expected = content(itertools.islice(make_loader(dataset, batch=2, mix_until=7), 6))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        loader = make_loader(dataset, batch=4, mix_until=7)
        shares.append(content(itertools.islice(loader, 3)))
    assert [batch for step in zip(*shares) for batch in step] == expected


def test_from_its_position_on_every_image_comes_by_itself(dataset):
    draws = [d for batch in itertools.islice(make_loader(dataset).stream, 12) for d in batch]
    mixed = make_loader(dataset).dataset
    alone = build_train_loader(
        dataset=dataset,
        mapper=make_mapper(),
        total_batch_size=2,
        sampler=TrainingSampler(len(dataset), seed=3),
    ).dataset
    closing = make_loader(dataset, mix_until=10).dataset
    for draw in draws:
        expected = (mixed if draw.position < 10 else alone)[draw]
        assert content([[closing[draw]]]) == content([[expected]])
    assert any(content([[mixed[d]]]) != content([[alone[d]]]) for d in draws if d.position >= 10)


def test_skipped_images_are_counted_once_before_and_after(dataset, tmp_path, caplog):
    (tmp_path / "images" / "3.png").write_bytes(b"damaged")
    loader = make_loader(dataset, mix_until=20, skip_unreadable=True)
    for batch in itertools.islice(loader, 30):
        assert 3 not in [x["image_id"] for x in batch]
    skipped = [r.getMessage() for r in caplog.records if "skipped unreadable" in r.getMessage()]
    assert len(skipped) == 1 and "3.png" in skipped[0]


def test_a_mapper_of_single_images_cannot_be_closed(dataset):
    with pytest.raises(UserError, match="train.mix_until is for a mapper.*is DetectionMapper"):
        build_train_loader(
            dataset=dataset,
            mapper=DetectionMapper(True, augmentations=[]),
            total_batch_size=2,
            mix_until=4,
        )


def test_the_config_differs_by_its_parts_alone():
    base = get_config("stageinteractor/stageinteractor_tiny_custom.py")
    cfg = get_config("stageinteractor/stageinteractor_tiny_mosaic.py")
    mapper = instantiate(cfg.dataloader.train.mapper)
    assert (mapper.mosaic.prob, mapper.mixup.prob, mapper.copy_paste) == (1.0, 0.1, None)
    assert cfg.train.mix_until == 0.9 and base.train.mix_until == 1.0
    augmentations = [c.dataloader.train.mapper.augmentations for c in (base, cfg)]
    assert augmentations[0] == augmentations[1]
    for part in ("dataloader.test", "model", "optimizer", "recipe"):
        assert OmegaConf.select(base, part) == OmegaConf.select(cfg, part)


def test_the_example_of_the_page_is_a_config(tmp_path):
    page = Path(__file__).resolve().parents[3] / "docs" / "training.md"
    (code,) = re.findall(r"^```python\n(# mosaic\.py\n.*?)^```", page.read_text(), re.S | re.M)
    (tmp_path / "mosaic.py").write_text(code)
    cfg = get_config(str(tmp_path / "mosaic.py"))
    packaged = get_config("stageinteractor/stageinteractor_tiny_mosaic.py")
    assert set(cfg) == set(packaged) and cfg.train.mix_until == packaged.train.mix_until
    mappers = [instantiate(c.dataloader.train.mapper) for c in (cfg, packaged)]
    assert vars(mappers[0].mosaic) == vars(mappers[1].mosaic)
    assert vars(mappers[0].mixup) == vars(mappers[1].mixup)
