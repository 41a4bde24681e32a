"""What does not fit is told in one line, when the config is built or the file is read."""

from __future__ import annotations

import pytest
import torch
from deformable_detr_models import VARIANTS, make_model, small_config
from detectron2.config import instantiate
from small_runs import make_batch

from deformable_detr import DeformableAttention, ExtraLevelMapper, LearnedQueries, ProposedQueries
from detection_toolkit.checkpoint.checkpointer import Checkpointer
from detection_toolkit.checkpoint.official import CheckpointMismatchError
from detection_toolkit.errors import UserError
from detection_toolkit.modeling import PlainConvNet
from maps import make_maps

# Changes of a small config of a variant, and what is said of it.
CONFIGS = {
    "levels of the encoder": (
        "plain",
        ["model.encoder.num_levels=3"],
        r"model\.encoder is built for 3 levels, but the backbone yields 4: set .*num_levels=4",
    ),
    "levels of the decoder": (
        "refine",
        ["model.decoder.num_levels=5"],
        r"model\.decoder is built for 5 levels, but the backbone yields 4",
    ),
    "levels of the backbone": (
        "two_stage",
        ["model.backbone.in_features=[res4,res5]"],
        r"built for 4 levels, but the backbone yields 3: .* or change model\.backbone\.in_feat",
    ),
    "a map that the backbone lacks": (
        "plain",
        ["model.backbone.in_features=[res3,res9]"],
        r"the neck wants the maps \['res9'\]",
    ),
    "norm groups": ("plain", ["model.backbone.norm_groups=5"], "16 channels .* 5 norm groups"),
    "heads": ("plain", ["model.decoder.num_heads=3"], "16 channels cannot be split into 3 heads"),
    "channels": (
        "plain",
        ["model.backbone.out_channels=18", "model.backbone.norm_groups=2"],
        "channels must be a multiple of 4, got 18",
    ),
    "no query": ("plain", ["model.initial_queries.num_queries=0"], "at least 1, got 0"),
    "no stage": ("refine", ["model.decoder.num_stages=0"], "num_stages must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused_when_it_is_built(case):
    variant, overrides, said = CONFIGS[case]
    with pytest.raises(UserError, match=said) as error:
        instantiate(small_config(variant, *overrides))
    assert "\n" not in str(error.value)


def test_a_two_stage_model_without_refinement_is_refused_when_it_is_built():
    config = small_config("two_stage")
    del config.decoder.first_size_logit
    config.decoder._target_ = "deformable_detr.DeformableDETRDecoder"
    said = "a two-stage model refines boxes, and DeformableDETRDecoder keeps them: set model"
    with pytest.raises(UserError, match=said):
        instantiate(config)


def test_a_schedule_for_another_number_of_stages_is_refused_when_it_is_built():
    config = small_config("plain")
    config.decoder.route = {
        "_target_": "sqr.QueryRecollection",
        "schedule": {"_target_": "sqr.selective_schedule", "num_stages": 5},
    }
    with pytest.raises(UserError, match="5.*2|2.*5") as error:
        instantiate(config)
    assert "\n" not in str(error.value)


def test_more_queries_than_cells_are_refused():
    queries = ProposedQueries(7, 8, 3)
    maps = make_maps([torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 1, 1)], (8, 16))
    with pytest.raises(UserError, match="7 queries cannot be chosen from 5 cells") as error:
        queries(maps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (20, 50), (63, 3)])
def test_an_image_smaller_than_the_largest_stride_is_detected_in_or_refused(variant, size):
    """Its coarsest map is one cell; a two-stage model may lack cells for its queries."""
    # Norms of one number, which the backbone of other tests has, do not work.
    detector = make_model(variant, "model.backbone.bottom_up.widths=[16,16,16,16]").eval()
    (image,) = make_batch([0])
    image["image"] = image["image"][:, : size[0], : size[1]]
    image["height"], image["width"] = size
    large = make_batch([0])
    with torch.no_grad():
        if variant == "two_stage" and size == (1, 1):
            with pytest.raises(UserError, match="6 queries cannot be chosen from 4 cells: lower"):
                detector([image])
        else:
            (alone,) = detector([image])
            assert alone["instances"].pred_boxes.tensor.isfinite().all()
        padded = detector([image, *large])[0]["instances"]
    assert padded.pred_boxes.tensor.isfinite().all() and padded.scores.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_smaller_than_the_largest_stride_is_trained_on(variant):
    detector = make_model(variant).train()
    small, large = make_batch([1, 1])
    small["image"] = small["image"][:, :20, :50]
    boxes = small["instances"].gt_boxes
    small["instances"]._image_size = (20, 50)
    boxes.clip((20, 50))
    losses = detector([small, large])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("saved", "loaded", "overrides", "said"),
    [
        ("plain", "refine", [], r"it is plain \(the model is refined\): take"),
        ("refine", "plain", [], r"it is refined \(the model is plain\): take"),
        ("plain", "plain", ["model.backbone.bias=true"], "set model.backbone.bias=true"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_checkpoint_of_another_variant_whose_names_are_the_same_is_refused(
    saved, loaded, overrides, said, strict, tmp_path
):
    torch.save({"model": make_model(saved, *overrides).state_dict()}, tmp_path / "a.pth")
    other = make_model(loaded)
    with pytest.raises(CheckpointMismatchError, match=said) as error:
        Checkpointer(other, strict=strict).load(str(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)
    # The backbone's part is the same all the same.
    Checkpointer(other, init_prefix="backbone.bottom_up.").load(str(tmp_path / "a.pth"))


def test_a_checkpoint_of_the_other_number_of_stages_is_refused_where_it_is_read(tmp_path):
    torch.save({"model": make_model("two_stage").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointMismatchError, match="initial_queries") as error:
        Checkpointer(make_model("refine"), strict=True).load(str(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)


def test_parts_by_themselves_check_their_arguments():
    with pytest.raises(UserError, match="cannot be split into 3 heads"):
        DeformableAttention(16, num_heads=3, num_levels=1, num_points=1)
    with pytest.raises(UserError, match="at least 1, got -1"):
        LearnedQueries(-1, 8)
    with pytest.raises(UserError, match="res9"):
        ExtraLevelMapper(PlainConvNet(widths=[8, 8, 8, 8]), ["res9"], 32)
