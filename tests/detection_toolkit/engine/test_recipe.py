"""Image size, queries and length that follow the training set, unless they are set."""

import logging
from pathlib import Path

import pytest
from coco_files import make_document, write_dataset
from omegaconf import OmegaConf
from small_runs import data_overrides

from detection_toolkit.config import apply_overrides, config_names, config_text, get_config
from detection_toolkit.engine import prepare_config
from detection_toolkit.engine.recipe import DataSummary, SizeRecipe, summarize_data

CUSTOM = [name for name in config_names() if name.endswith("_tiny_custom.py")]
RECIPE = SizeRecipe(image_size=240, num_queries=60, max_iter=2500)
TRAIN = "dataloader.train.mapper.augmentations.0"
TEST = "dataloader.test.mapper.augmentations.0"


def data(num_images=300, most_objects=10, short_side=480.0, small_object=0.2):
    return DataSummary(num_images, most_objects, short_side, small_object)


@pytest.mark.parametrize(
    "short_side, small_object, size",
    [
        (480, 0.2, 240),  # objects of 48 pixels
        (480, 0.04, 304),  # 12 pixels of 304
        (480, 0.01, 480),  # and no more than the images have
        (2000, 0.001, 480),  # or the limit
        (160, 0.2, 160),  # small images stay as they are
        (20, 0.2, 128),
        (0, 1.0, 240),  # nothing is known
    ],
)
def test_images_are_as_large_as_small_objects_need(short_side, small_object, size):
    assert RECIPE.choose_image_size(data(short_side=short_side, small_object=small_object)) == size


@pytest.mark.parametrize("objects, queries", [(0, 60), (40, 60), (41, 70), (100, 150), (999, 300)])
def test_there_are_more_queries_than_objects(objects, queries):
    assert RECIPE.choose_queries(data(most_objects=objects)) == queries


@pytest.mark.parametrize("images, steps", [(1, 1000), (312, 2500), (500, 4000), (10**6, 10000)])
def test_steps_follow_the_number_of_images(images, steps):
    assert RECIPE.choose_steps(data(num_images=images), batch=8) == steps


def test_the_settings_of_the_configs_are_those_of_their_recipe():
    for name in CUSTOM:
        cfg = get_config(name)
        for key, value in RECIPE.image_settings(cfg.recipe.image_size).items():
            assert OmegaConf.select(cfg, key) == value
        assert cfg.model.initial_queries.num_queries == cfg.recipe.num_queries
        assert cfg.train.max_iter == cfg.recipe.max_iter
        assert cfg.train.eval_period == RECIPE.period(cfg.recipe.max_iter)
    assert len(CUSTOM) >= 5


def test_crowds_and_unknown_sizes_are_left_out_of_a_summary():
    mode = {"bbox_mode": 1}  # x, y, width, height
    objects = [{**mode, "bbox": [0, 0, 10, 10]}, {**mode, "bbox": [0, 0, 40, 40], "iscrowd": 1}]
    sized = {"width": 100, "height": 50, "annotations": objects}
    unknown = {"annotations": [{**mode, "bbox": [0, 0, 1, 1]}] * 3}
    assert summarize_data([sized, unknown]) == DataSummary(2, 3, 50.0, pytest.approx(0.2))


@pytest.fixture
def files(tmp_path):
    """Overrides for a data set of 3 images of 640 x 400 with 50 objects of 30 x 25 pixels each."""
    document = make_document(3, 50, height=400, width=640)
    for k, annotation in enumerate(document["annotations"]):
        annotation["bbox"][:2] = [float(k % 20) * 10, float(k % 15) * 8]
    return data_overrides(*write_dataset(tmp_path / "data", document))


@pytest.mark.parametrize("name", CUSTOM)
def test_a_run_follows_its_training_set_and_says_so(name, files, caplog):
    with caplog.at_level(logging.INFO):
        cfg = prepare_config(apply_overrides(get_config(name), files), files)
    # The side of an object is 27.4 of 400 pixels.
    assert OmegaConf.select(cfg, f"{TEST}.short_edge_length") == 240
    assert cfg.model.initial_queries.num_queries == 80
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (
        1000,
        200,
        200,
    )
    (line,) = [r.getMessage() for r in caplog.records if "recipe for" in r.getMessage()]
    assert "recipe for 3 images with up to 50 objects: images at 240 pixels, 80 queries" in line
    assert "1000 iterations, evaluation every 200, checkpoint every 200" in line
    assert "recipe: null" in config_text(cfg)  # that of the run says what was chosen


@pytest.mark.parametrize("accumulated, steps", [(1, 800), (4, 200)])
def test_steps_follow_the_images_of_all_batches_of_a_step(files, accumulated, steps):
    own = ["recipe.epochs=2000", "recipe.steps=[100,10000]", *files]
    own.append(f"train.accumulation_steps={accumulated}")
    cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), own), own)
    assert cfg.dataloader.train.total_batch_size == 8
    assert cfg.train.max_iter == steps  # 6000 images


def test_what_the_command_line_sets_stays(files):
    own = [
        "train.max_iter=2500",  # as the config has it
        "train.checkpointer.period=7",
        "model.initial_queries.num_queries=61",
        f"{TEST}.short_edge_length=200",
    ]
    own += files
    cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), own), own)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (
        2500,
        500,
        7,
    )
    assert cfg.model.initial_queries.num_queries == 61
    assert OmegaConf.select(cfg, f"{TEST}.short_edge_length") == 200
    assert OmegaConf.select(cfg, f"{TRAIN}.short_edge_length") == [200, 224, 240, 256, 280]


def test_periods_follow_the_length_that_is_given(files):
    own = ["train.max_iter=700", *files]
    cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), own), own)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (
        700,
        140,
        140,
    )


def test_epochs_that_are_given_are_the_length(files, caplog):
    own = ["train.max_epochs=400", *files]
    with caplog.at_level(logging.INFO):
        cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), own), own)
    assert (cfg.train.max_iter, cfg.train.eval_period) == (150, 30)
    assert "recipe for 3 images" in caplog.text
    assert "every 500" not in caplog.text  # the period of another length


def test_a_whole_augmentation_of_ones_own_stays(files):
    own = [f"{TEST.removesuffix('.0')}=[]", *files]
    cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), own), own)
    assert len(cfg.dataloader.test.mapper.augmentations) == 0
    assert OmegaConf.select(cfg, f"{TRAIN}.max_size") == 480


def test_what_a_config_file_sets_stays_and_one_without_recipe_is_as_it_was(tmp_path, files):
    text = (
        "from detection_toolkit.config import get_config\n"
        "base = get_config('stageinteractor/stageinteractor_tiny_custom.py')\n"
        "dataloader, model, train = base.dataloader, base.model, base.train\n"
        "optimizer, lr_multiplier = base.optimizer, base.lr_multiplier\n"
    )
    path = tmp_path / "mine.py"
    path.write_text(text)
    cfg = prepare_config(apply_overrides(get_config(str(path)), files), files)
    assert (cfg.train.max_iter, cfg.model.initial_queries.num_queries) == (2500, 60)
    path.write_text(text + "recipe = base.recipe\ntrain.max_iter = 40\n")
    cfg = prepare_config(apply_overrides(get_config(str(path)), files), files)
    assert (cfg.train.max_iter, cfg.model.initial_queries.num_queries) == (40, 80)


def test_a_model_is_evaluated_as_it_was_trained(tmp_path, files, caplog):
    cfg = apply_overrides(get_config(CUSTOM[0]), files)
    assert prepare_config(cfg, files, training=False).model.initial_queries.num_queries == 80
    only_test = [x for x in files if "test" in x.split("=")[0]]
    cfg = prepare_config(apply_overrides(get_config(CUSTOM[0]), only_test), training=False)
    assert cfg.model.initial_queries.num_queries == 60
    cfg = apply_overrides(get_config(CUSTOM[0]), files)
    cfg.dataloader.train.dataset.json_file = str(tmp_path / "gone.json")
    prepare_config(cfg, training=False)
    assert "the recipe is not followed, as the training set cannot be used" in caplog.text
    assert not Path(cfg.dataloader.train.dataset.json_file).exists()
