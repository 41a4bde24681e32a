"""Every image twice: what the two are, and that (seed, position) alone decides them."""

import itertools
import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from coco_files import make_document, write_dataset
from detectron2.config import instantiate
from detectron2.data.samplers import TrainingSampler
from detectron2.data.transforms import (
    AugInput,
    CropTransform,
    FixedSizeCrop,
    RandomApply,
    RandomCrop,
    RandomFlip,
    ResizeTransform,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st

from detection_toolkit.config import get_config
from detection_toolkit.data import (
    CopyPaste,
    DetectionMapper,
    InRandomOrder,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
    UnreadableImageError,
    WeakStrongMapper,
    build_train_loader,
    get_detection_dataset,
)
from detection_toolkit.data.mapper import ImageSizeError
from detection_toolkit.data.stream import collate_views
from detection_toolkit.data.strong import ErasingTransform, GeometricOperation
from detection_toolkit.data.transforms import OpenCVResizeScale, OpenCVResizeShortestEdge
from detection_toolkit.errors import UserError

SIDE = 96
STRONG = (
    InRandomOrder([RandomColorOperation(), RandomGeometricOperation()]),
    RandomErasing(),
)
# Red, green, blue on black: a pixel says which object it is of.
RECTANGLES = [(6, 8, 40, 30), (50, 10, 90, 40), (12, 36, 44, 60)]


def jitter(side=SIDE):
    return [
        OpenCVResizeScale(0.1, 2.0, side, side),
        RandomCrop("absolute", (side, side)),
        RandomFlip(prob=0.5),
        FixedSizeCrop((side, side), pad=True, pad_value=114),
    ]


def crops():
    """As of the COCO configs, for images of 64 x 96."""
    return [
        RandomFlip(prob=0.5),
        RandomApply(RandomCrop("absolute_range", (40, 60)), prob=0.5),
        OpenCVResizeShortestEdge([56, 64, 80], 120, "choice"),
    ]


def make_mapper(weak=(), strong=(), **kwargs):
    return WeakStrongMapper(augmentations=weak, strong_augmentations=strong, **kwargs)


def annotations_of(boxes):
    return [
        {"bbox": list(map(float, box)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": i}
        for i, box in enumerate(boxes)
    ]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A dataset dict of three rectangles of pure colours."""
    image = np.zeros((64, 96, 3), np.uint8)
    for channel, (x0, y0, x1, y1) in enumerate(RECTANGLES):
        image[y0:y1, x0:x1, channel] = 255
    path = tmp_path_factory.mktemp("rectangles") / "rectangles.png"
    cv2.imwrite(str(path), image[..., ::-1])
    return {
        "file_name": str(path),
        "height": 64,
        "width": 96,
        "image_id": 7,
        "annotations": annotations_of(RECTANGLES),
    }


def views_of(mapper, record, seed=0, others=()):
    np.random.seed(seed)
    return mapper(record, others)


def picture(view):
    return view["image"].numpy().transpose(1, 2, 0)


def boxes_of(view):
    return view["instances"].gt_boxes.tensor.numpy()


def pixel_box(values):
    ys, xs = np.nonzero(values)
    if not len(xs):
        return None
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def test_two_inputs_of_an_image(record):
    before = repr(record)
    weak, strong = views_of(make_mapper([RandomFlip(prob=1.0)], STRONG), record)
    for view in (weak, strong):
        assert view["image"].shape == (3, 64, 96) and view["image"].dtype == torch.uint8
        assert (view["height"], view["width"], view["image_id"]) == (64, 96, 7)
        assert view["instances"].image_size == (64, 96)
        assert "annotations" not in view and not view["instances"].has("gt_masks")
    assert boxes_of(weak)[0].tolist() == [96 - 40, 8, 96 - 6, 30]
    assert weak["instances"].gt_classes.tolist() == [0, 1, 2]
    assert not torch.equal(weak["image"], strong["image"])
    assert repr(record) == before


def test_the_strong_one_begins_with_the_finished_weak_one(record):
    for seed in range(5):
        weak, strong = views_of(make_mapper(crops()), record, seed)
        assert torch.equal(weak["image"], strong["image"])
        assert np.array_equal(boxes_of(weak), boxes_of(strong))


def test_what_is_done_to_the_strong_one_leaves_the_weak_one(record):
    plain = views_of(make_mapper(), record)[0]
    weak, strong = views_of(make_mapper((), [ErasingTransform([[0, 0, 60, 40]])]), record)
    assert torch.equal(weak["image"], plain["image"])
    assert (strong["image"][:, :40, :60] == 128).all()
    # 34 x 22 pixels are gone; of the second object a sixth, of the third a sixth.
    assert weak["instances"].gt_classes.tolist() == [0, 1, 2]
    assert strong["instances"].gt_classes.tolist() == [1, 2]


@pytest.mark.parametrize(("rows", "is_kept"), [(89, True), (90, False), (100, False)])
def test_a_box_of_which_nine_tenths_are_erased_is_dropped(tmp_path, rows, is_kept):
    image = np.zeros((120, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "black.png"), image)
    record = {"file_name": str(tmp_path / "black.png"), "height": 120, "width": 120}
    record["annotations"] = annotations_of([(10, 10, 110, 110)])
    mapper = make_mapper((), [ErasingTransform([[0, 10, 120, 10 + rows]])])
    weak, strong = mapper(record)
    assert len(weak["instances"]) == 1 and len(strong["instances"]) == is_kept


def test_boxes_that_a_geometric_operation_empties_are_kept(record):
    move = GeometricOperation("translate_x", -0.5, 64, 96)
    weak, strong = views_of(make_mapper((), [move]), record)
    assert boxes_of(strong).tolist() == [[0, 8, 0, 30], [2, 10, 42, 40], [0, 36, 0, 60]]
    assert strong["instances"].gt_classes.tolist() == [0, 1, 2]


@given(seed=st.integers(0, 10_000))
def test_boxes_stay_with_their_pixels(record, seed):
    """Through flips, crops, resizing and every geometric operation."""
    mapper = make_mapper(crops(), [RandomGeometricOperation(fill=0)])
    for view in views_of(mapper, record, seed):
        image = picture(view)
        height, width = image.shape[:2]
        for label, box in zip(view["instances"].gt_classes.tolist(), boxes_of(view)):
            found = pixel_box(image[..., label] > 127)
            if found is None:
                assert (box[2:] - box[:2]).min() < 4
                continue
            # Never beyond its box; and up to it, where the border does not cut off a corner.
            assert (found[:2] >= box[:2] - 1).all() and (found[2:] <= box[2:] + 1).all()
            if ((box > 0.5) & (box < np.array([width, height] * 2) - 0.5)).all():
                # A sharp corner has no whole pixel.
                corners = pixel_box(image[..., label] > 40)
                assert np.abs(corners - box).max() <= 1.5


@given(seed=st.integers(0, 10_000))
def test_masks_and_boxes_stay_with_their_pixels_with_jitter_and_copy_paste(record, seed):
    mapper = make_mapper(
        jitter(),
        [RandomGeometricOperation(fill=0)],
        copy_paste=CopyPaste(),
        recompute_boxes=True,
        use_instance_mask=True,
    )
    views = views_of(mapper, record, seed, [record])
    for view in views or ():
        image, instances = picture(view), view["instances"]
        assert image.shape == (SIDE, SIDE, 3)
        masks = instances.gt_masks.tensor.numpy()
        for label, mask, box in zip(instances.gt_classes.tolist(), masks, boxes_of(view)):
            inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0) > 0
            others = [c for c in range(3) if c != label]
            if inner.any():
                assert (image[inner][:, label] > 200).mean() > 0.99
                assert (image[inner][:, others] < 50).mean() > 0.99
            found = pixel_box(mask)
            if found is not None:
                assert (found[:2] >= box[:2] - 1.5).all() and (found[2:] <= box[2:] + 1.5).all()
    if views:
        weak = views[0]["instances"]
        assert len(weak) == 0 or np.array_equal(
            boxes_of(views[0]), weak.gt_masks.get_bounding_boxes().tensor.numpy()
        )


def test_jitter_pads_with_114_as_if_it_were_image(record):
    weak, strong = views_of(
        make_mapper([OpenCVResizeScale(0.5, 0.5, SIDE, SIDE), *jitter()[1:]], recompute_boxes=True),
        record,
    )
    assert weak["image"].shape == (3, SIDE, SIDE)
    assert weak["instances"].image_size == (SIDE, SIDE)
    assert (weak["image"][:, 32:] == 114).all() and (weak["image"][:, :, 48:] == 114).all()
    assert not (weak["image"][:, :32, :48] == 114).all()


def test_boxes_of_masks_take_the_place_of_boxes(record):
    record = {**record, "annotations": annotations_of(RECTANGLES)}
    record["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 30, 20, 10, 20]]
    assert boxes_of(make_mapper()(record)[0])[0].tolist() == [6, 8, 40, 30]
    recomputed = make_mapper(recompute_boxes=True)(record)[0]
    assert boxes_of(recomputed).tolist() == [[10, 10, 30, 20], *map(list, RECTANGLES[1:])]


def test_copy_paste_draws_for_each_input_by_itself(record):
    mapper = make_mapper(copy_paste=CopyPaste())
    counts = []
    for seed in range(200):
        weak, strong = views_of(mapper, {**record, "annotations": []}, seed, [record])
        counts.append((len(weak["instances"]), len(strong["instances"])))
    pairs = np.zeros((4, 4))
    for pair in counts:
        pairs[pair] += 1
    assert pairs.min() > 0  # all of 0..3 beside all of 0..3


def test_crowds_and_images_without_objects(record):
    crowd = {**record, "annotations": annotations_of(RECTANGLES)}
    crowd["annotations"][1]["iscrowd"] = 1
    for options in ({}, {"recompute_boxes": True, "use_instance_mask": True}):
        mapper = make_mapper(crops(), STRONG, **options)
        for seed in range(20):
            for view in views_of(mapper, crowd, seed) or ():
                assert 1 not in view["instances"].gt_classes.tolist()
            for view in views_of(mapper, {**record, "annotations": []}, seed):
                assert view["instances"].gt_boxes.tensor.shape == (0, 4)
    paste = make_mapper(jitter(), STRONG, copy_paste=CopyPaste(), recompute_boxes=True)
    empty = {**record, "annotations": []}
    for seed in range(20):
        for view in views_of(paste, empty, seed, [empty]):
            assert len(view["instances"]) == 0


def test_thin_boxes_are_dropped_and_an_image_of_nothing_else_is_left_out(record):
    thin = annotations_of([(5, 5, 30, 5.009), (5, 5, 30, 5.011)])
    weak, strong = make_mapper()({**record, "annotations": thin})
    assert weak["instances"].gt_classes.tolist() == [1] == strong["instances"].gt_classes.tolist()
    assert make_mapper()({**record, "annotations": thin[:1]}) is None
    # A crop without any object is kept.
    views = make_mapper([CropTransform(0, 0, 5, 5)])({**record, "annotations": thin[:1]})
    assert [len(view["instances"]) for view in views] == [0, 0]
    # So small that no pixel of its mask is left.
    small = {**record, "annotations": annotations_of([(5, 5, 7, 7)])}
    shrink = [ResizeTransform(64, 96, 8, 12)]
    assert make_mapper(shrink, recompute_boxes=True)(small) is None
    assert len(make_mapper(shrink)(small)[0]["instances"]) == 1


def test_what_cannot_be_augmented_is_named(record, tmp_path):
    missing = {**record, "file_name": str(tmp_path / "gone.png")}
    with pytest.raises(UnreadableImageError, match=r"gone\.png cannot be read.*skip_unreadable"):
        make_mapper()(missing)
    with pytest.raises(ImageSizeError, match="rectangles"):
        make_mapper()({**record, "height": 60})
    with pytest.raises(UserError, match='rectangles.png has no ground truth: it lacks "annot'):
        make_mapper()({k: v for k, v in record.items() if k != "annotations"})
    with pytest.raises(UserError, match="strong_augmentations must keep the size"):
        make_mapper((), [CropTransform(0, 0, 5, 5)])(record)
    with pytest.raises(UserError, match="copy_paste needs the data set"):
        make_mapper(copy_paste=CopyPaste())(record)
    with pytest.raises(UserError, match="image_format must be RGB or BGR"):
        make_mapper(image_format="L")
    sizes = make_mapper([OpenCVResizeScale(0.5, 2.0, 64, 64)], copy_paste=CopyPaste())
    with pytest.raises(UserError, match="copy-paste needs images of one size.*FixedSizeCrop"):
        sizes(record, [record])


def test_an_unreadable_image_to_paste_from_is_the_one_that_is_named(record, tmp_path):
    missing = {**record, "file_name": str(tmp_path / "gone.png")}
    mapper = make_mapper(copy_paste=CopyPaste())
    with pytest.raises(UnreadableImageError, match=r"gone\.png") as caught:
        mapper(record, [missing])
    assert caught.value.file_name == missing["file_name"]


def test_a_batch_has_the_weak_ones_first():
    assert collate_views([["w1", "s1"], ["w2", "s2"]]) == ["w1", "w2", "s1", "s2"]
    assert collate_views(["a", "b"]) == ["a", "b"]


@pytest.fixture
def dataset(tmp_path):
    document = make_document(num_images=9)
    for image in document["images"][::2]:
        image["height"], image["width"] = 96, 64
    document["annotations"][4]["iscrowd"] = 1
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 5]
    json_file, root = write_dataset(tmp_path, document)
    return get_detection_dataset(json_file=json_file, image_root=root, filter_empty=False)


def make_loader(dataset, num_workers=0, seed=3, batch=2, **kwargs):
    mapper = make_mapper(jitter(48), STRONG, copy_paste=CopyPaste(), recompute_boxes=True)
    return build_train_loader(
        dataset=dataset,
        mapper=mapper,
        total_batch_size=batch,
        num_workers=num_workers,
        aspect_ratio_grouping=False,
        sampler=TrainingSampler(len(dataset), seed=seed),
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


def test_accumulated_batches_have_the_pairs_of_a_larger_one(dataset):
    halves = content(itertools.islice(make_loader(dataset, batch=2), 6))
    wholes = content(itertools.islice(make_loader(dataset, batch=4), 3))
    for first, second, whole in zip(halves[::2], halves[1::2], wholes):
        assert [*first[:2], *second[:2], *first[2:], *second[2:]] == whole


def test_a_batch_of_b_images_has_2b_inputs(dataset, caplog):
    caplog.set_level("INFO")
    for batch in itertools.islice(make_loader(dataset), 4):
        ids = [x["image_id"] for x in batch]
        assert len(ids) == 4 and ids[:2] == ids[2:]
    assert "2 images a step are 4 inputs of the model: every image enters 2 times" in caplog.text


def test_loader_processes_and_interruptions_change_nothing(dataset):
    expected = content(itertools.islice(make_loader(dataset), 14))
    assert content(itertools.islice(make_loader(dataset, 2), 14)) == expected
    first = make_loader(dataset, 2)
    assert content(itertools.islice(first, 5)) == expected[:5]
    state = json.loads(json.dumps(first.state_dict()))
    second = make_loader(dataset, seed=8)
    assert second.load_state_dict(state) is None
    assert content(itertools.islice(second, 9)) == expected[5:]


def test_the_data_set_is_sent_to_a_process_once(dataset):
    """A process that is not forked is sent the mapper apart from the data set."""
    loader = make_loader(dataset * 200)
    size = len(pickle.dumps(loader.dataset))
    assert size < 1.5 * len(pickle.dumps(loader.dataset._dataset))


def test_two_processes_share_the_pairs_of_one(dataset, monkeypatch):
    expected = content(itertools.islice(make_loader(dataset, batch=2), 6))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        shares.append(content(itertools.islice(make_loader(dataset, batch=4), 3)))
    assert [batch for step in zip(*shares) for batch in step] == expected


def test_skipped_images_are_counted_by_the_file_that_cannot_be_read(dataset, tmp_path, caplog):
    (tmp_path / "images" / "3.png").write_bytes(b"damaged")
    loader = make_loader(dataset, skip_unreadable=True)
    for batch in itertools.islice(loader, 40):
        assert len(batch) == 4 and 3 not in [x["image_id"] for x in batch]
    skipped = [r.getMessage() for r in caplog.records if "skipped unreadable" in r.getMessage()]
    assert len(skipped) == 1 and "3.png" in skipped[0]


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 50)])
def test_detections_of_a_padded_image_are_scaled_to_the_image(tmp_path, size):
    height, width = size
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((*size, 3), np.uint8))
    record = {"file_name": str(tmp_path / "image.png"), "height": height, "width": width}
    augmentations = [OpenCVResizeShortestEdge(48, 48), FixedSizeCrop((48, 48), pad_value=114)]
    sample = DetectionMapper(False, augmentations=augmentations)(record)
    assert sample["image"].shape == (3, 48, 48)
    longest = max(size)
    assert (sample["height"], sample["width"]) == pytest.approx((longest, longest))
    plain = DetectionMapper(False, augmentations=augmentations[:1])(record)
    assert (plain["height"], plain["width"]) == size


@pytest.fixture(params=["coco_weak_strong", "coco_lsj"])
def coco(request):
    """Name and loader of a config, in Detectron2's channel order."""
    train = get_config(f"common/data/{request.param}.py").dataloader.train
    train.mapper.image_format = "BGR"
    return request.param, train


def test_the_coco_configs_are_as_released(coco):
    name, train = coco
    mapper = instantiate(train.mapper)
    color, geometric = mapper.strong_augmentations.augs[0].augs
    assert color.image_format == "BGR"
    assert (len(color.operations), len(geometric.operations)) == (9, 5)
    is_jittered = name == "coco_lsj"
    assert (mapper.copy_paste is not None) == is_jittered == mapper.recompute_boxes
    assert train.aspect_ratio_grouping == train.dataset.filter_empty == (not is_jittered)
    assert train.total_batch_size == 16


def applied(mapper, count, height=427, width=640):
    """What the weak augmentations did to images, and the images' sizes."""
    image = np.zeros((height, width, 3), np.uint8)
    np.random.seed(0)
    for _ in range(count):
        augmented = AugInput(image)
        yield mapper.augmentations(augmented).transforms, augmented.image.shape[:2]


def test_sizes_of_the_weak_augmentation():
    mapper = instantiate(get_config("common/data/coco_weak_strong.py").dataloader.train.mapper)
    crops, sizes = [], []
    for transforms, size in applied(mapper, 400):
        sizes.append(size)
        crops += [(t.h, t.w) for t in transforms if isinstance(t, CropTransform)]
    sizes, crops = np.array(sizes), np.array(crops)
    assert (sizes.max(1) <= 1333).all()
    short = sizes.min(1)[sizes.max(1) < 1333]
    assert set(short.tolist()) == set(range(480, 801, 32))
    assert abs(len(crops) / 400 - 0.5) < 5 * 0.5 / 20
    assert crops.min() >= 384 and crops.max() <= 600
    assert crops[:, 1].max() > 590 and abs(np.corrcoef(crops.T)[0, 1]) < 0.5


def test_sizes_and_places_of_the_jitter():
    mapper = instantiate(get_config("common/data/coco_lsj.py").dataloader.train.mapper)
    ratios, places = [], []
    for transforms, size in applied(mapper, 300):
        assert size == (1024, 1024)
        resize, crop = transforms[:2]
        ratios.append(resize.new_w / 1024)
        free = np.array([resize.new_h - crop.h, resize.new_w - crop.w])
        if (free > 50).all():
            places.append([crop.y0, crop.x0] / free)
    ratios, places = np.array(ratios), np.array(places)
    assert ratios.min() >= 0.099 and ratios.max() <= 2.0
    assert abs(ratios.mean() - 1.05) < 5 * 1.9 / np.sqrt(12 * 300)
    # Height and width by themselves.
    assert len(places) > 30 and abs(np.corrcoef(places.T)[0, 1]) < 5 / np.sqrt(len(places))


@pytest.mark.parametrize("name", ["shapes_weak_strong", "shapes_lsj"])
def test_the_shapes_configs_are_of_the_shapes(name):
    dataloader = get_config(f"common/data/{name}.py").dataloader
    assert dataloader.train.dataset.names == "shapes_train"
    assert dataloader.test.dataset.names == "shapes_val"
    assert dataloader.train.dataset.filter_empty is False
    assert isinstance(instantiate(dataloader.train.mapper), WeakStrongMapper)
