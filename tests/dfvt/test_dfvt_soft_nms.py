"""Soft-NMS against its definition, and as a switch of Detectron2's heads."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from hypothesis import given
from hypothesis import strategies as st
from tolerances import tolerance
from torchvision.ops import box_iou

from dfvt.soft_nms import SoftNMSFastRCNNOutputLayers, SoftNMSRPN, soft_nms


def by_definition(boxes, scores, *, iou_threshold, max_kept, min_score):
    """One group, one box after the other."""
    scores = {i: float(s) for i, s in enumerate(scores)}
    overlap = box_iou(boxes, boxes)
    kept = []
    while scores:
        best = max(scores, key=lambda i: scores[i])
        score = scores.pop(best)
        if score < min_score:
            break
        kept.append((best, score))
        for i in scores:
            if overlap[best, i] >= iou_threshold:
                scores[i] *= 1 - float(overlap[best, i])
    return kept[:max_kept]


def random_boxes(generator, count, size=60.0):
    numbers = dict(generator=generator, dtype=torch.float64)
    top_left = torch.rand(count, 2, **numbers) * size
    return torch.cat([top_left, top_left + 10 + 30 * torch.rand(count, 2, **numbers)], 1)


@given(
    st.integers(0, 2**16),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.3, 0.5, 1.1]),
    st.sampled_from([1, 10, 1000]),
    st.sampled_from([1e-3, 0.3]),
)
def test_one_group_is_the_definition(seed, count, iou_threshold, max_kept, min_score):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, count)
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    limits = dict(iou_threshold=iou_threshold, max_kept=max_kept, min_score=min_score)
    kept, decayed = soft_nms(boxes, scores, torch.zeros(count, dtype=torch.long), **limits)
    expected = by_definition(boxes, scores, **limits)
    assert kept.tolist() == [i for i, _ in expected]
    assert decayed.tolist() == pytest.approx([s for _, s in expected], rel=0, abs=1e-12)


@given(st.integers(0, 2**16))
def test_groups_do_not_interact(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, 30)
    scores = torch.rand(30, generator=generator, dtype=torch.float64)
    groups = torch.randint(3, (30,), generator=generator)
    limits = dict(iou_threshold=0.3, max_kept=100)
    kept, decayed = soft_nms(boxes, scores, groups, **limits)
    assert (decayed.diff() <= 0).all()
    together = dict(zip(kept.tolist(), decayed.tolist()))
    alone = {}
    for group in range(3):
        rows = (groups == group).nonzero()[:, 0]
        inner, inner_scores = soft_nms(boxes[rows], scores[rows], groups[rows], **limits)
        alone.update(zip(rows[inner].tolist(), inner_scores.tolist()))
    assert together == pytest.approx(alone, rel=0, abs=1e-12)


def make_predictor(cls, **kwargs):
    torch.manual_seed(0)
    return cls(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
        num_classes=3,
        test_score_thresh=0.1,
        test_nms_thresh=0.5,
        test_topk_per_image=60,
        **kwargs,
    )


def make_predictions(predictor, counts=(50, 30)):
    generator = torch.Generator().manual_seed(0)
    proposals = []
    for count in counts:
        instances = Instances((80, 100))
        instances.proposal_boxes = Boxes(random_boxes(generator, count))
        proposals.append(instances)
    features = 8 * torch.randn(sum(counts), 8, generator=generator)
    with torch.no_grad():
        scores, deltas = predictor(features)
    return (20 * scores, deltas), proposals


def same(a: Instances, b: Instances) -> bool:
    fields, other = a.get_fields(), b.get_fields()
    return fields.keys() == other.keys() and all(
        torch.equal(getattr(v, "tensor", v), getattr(other[k], "tensor", other[k]))
        for k, v in fields.items()
    )


def test_box_head_without_the_switch_is_detectron2s():
    ours = make_predictor(SoftNMSFastRCNNOutputLayers, soft_nms=False)
    theirs = make_predictor(FastRCNNOutputLayers)
    predictions, proposals = make_predictions(ours)
    for a, b in zip(
        ours.inference(predictions, proposals)[0], theirs.inference(predictions, proposals)[0]
    ):
        assert len(a) > 0 and same(a, b)


def test_box_head_decays_scores_within_a_class():
    soft = make_predictor(SoftNMSFastRCNNOutputLayers, soft_nms=True)
    predictions, proposals = make_predictions(soft)
    everything = make_predictor(FastRCNNOutputLayers)
    everything.test_nms_thresh, everything.test_topk_per_image = 2.0, -1
    candidates, candidate_rows = everything.inference(predictions, proposals)
    results, rows = soft.inference(predictions, proposals)
    assert len(results) == 2
    for found, row, all_of_them, all_rows in zip(results, rows, candidates, candidate_rows):
        kept, scores = soft_nms(
            all_of_them.pred_boxes.tensor,
            all_of_them.scores,
            all_of_them.pred_classes,
            iou_threshold=0.5,
            max_kept=60,
        )
        assert 0 < len(found) == len(kept) <= 60
        assert torch.equal(found.scores, scores)
        assert torch.equal(found.pred_boxes.tensor, all_of_them.pred_boxes.tensor[kept])
        assert torch.equal(row, all_rows[kept])
        assert (found.scores < all_of_them.scores[kept]).any()


def make_rpn(cls, **kwargs):
    torch.manual_seed(0)
    return cls(
        in_features=["p2", "p3"],
        head=StandardRPNHead(in_channels=4, num_anchors=3),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[32], [48]], aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16]
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=8,
        positive_fraction=0.5,
        pre_nms_topk=(40, 30),
        post_nms_topk=(25, 40),
        nms_thresh=0.5,
        **kwargs,
    )


def run_rpn(rpn, *, training=False):
    generator = torch.Generator().manual_seed(0)
    features = {
        name: 20 * torch.randn(2, 4, size, size, generator=generator)
        for name, size in (("p2", 8), ("p3", 4))
    }
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64), (60, 50)])
    rpn.train(training)
    with torch.no_grad():
        anchors = rpn.anchor_generator(list(features.values()))
        logits, deltas = rpn.rpn_head(list(features.values()))
        logits = [30 * x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas]
        return rpn.predict_proposals(anchors, logits, deltas, images.image_sizes)


@pytest.mark.parametrize(("soft", "training"), [(False, False), (True, True)])
def test_rpn_in_training_or_without_the_switch_is_detectron2s(soft, training):
    ours = run_rpn(make_rpn(SoftNMSRPN, soft_nms=soft), training=training)
    theirs = run_rpn(make_rpn(RPN), training=training)
    assert all(len(a) > 0 and same(a, b) for a, b in zip(ours, theirs))


def test_rpn_keeps_what_plain_nms_drops():
    soft = run_rpn(make_rpn(SoftNMSRPN, soft_nms=True))
    plain = run_rpn(make_rpn(RPN))
    for a, b in zip(soft, plain):
        assert 0 < len(a) <= 40
        assert (a.objectness_logits.diff() <= 0).all()
        # The best proposal decays by nobody.
        assert torch.equal(a.proposal_boxes.tensor[0], b.proposal_boxes.tensor[0])
        # Back from a score, where the logit is as steep as this.
        steepness = float(
            1 / (b.objectness_logits[0].sigmoid() * b.objectness_logits[0].neg().sigmoid())
        )
        limits = tolerance(torch.float32, steepness, operations=4)
        torch.testing.assert_close(a.objectness_logits[0], b.objectness_logits[0], **limits)
        of_one_group = torch.zeros(len(a), dtype=torch.long)
        survivors = batched_nms(a.proposal_boxes.tensor, a.objectness_logits, of_one_group, 0.5)
        assert len(survivors) < len(a)
