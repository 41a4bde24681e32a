"""A plain transcription of the method, for reading and as the opponent in benchmarks.

Every class does what the text of the paper and the released code do, step by step: levels are
sampled one after another and summed, adapted filters are written out, one image and one stage is
matched at a time with a copy to the host for each, labels are gathered pair by pair. Nothing is
fused, shared or reordered. :func:`to_plain` turns a detector of this project into its plain twin,
which has the same parameters under the same names.

Letters: B images, N queries, C channels, G groups, e = C / G, P base points, Q sub-points, O output
points, L levels, S stages, K classes, M objects.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detection_toolkit.errors import UserError
from detection_toolkit.structures import Assignment, ClassTargets, GroundTruth
from detection_toolkit.training import Criterion, HungarianMatcher
from detection_toolkit.training.criterion import CriterionResult
from stageinteractor import CrossStageMatcher
from stageinteractor.attention import IoFBiasedSelfAttention
from stageinteractor.factored_mixing import FactoredDynamicMixing, NormReLU
from stageinteractor.filter_bank import DynamicFilters, FilterBank
from stageinteractor.mixing import CascadeDynamicMixing
from stageinteractor.sampling import SubBoxSampling

__all__ = ["to_plain"]


def decode(xyzr: Tensor) -> Tensor:
    """(..., 4) xyzr -> (..., 4) corners in pixels."""
    x, y, z, r = xyzr.unbind(-1)
    width = 2.0 ** (z - 0.5 * r)
    height = 2.0 ** (z + 0.5 * r)
    return torch.stack(
        [x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height], dim=-1
    )


def overlap(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 4), (m, 4) -> intersection (n, m), areas (n,), (m,)."""
    top_left = torch.max(boxes1[:, None, :2], boxes2[None, :, :2])
    bottom_right = torch.min(boxes1[:, None, 2:], boxes2[None, :, 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes1, boxes2)]
    return width * height, areas[0], areas[1]


def pairwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """(n, 4), (m, 4) -> (n, m)."""
    intersection, area1, area2 = overlap(boxes1, boxes2)
    union = (area1[:, None] + area2[None] - intersection).clamp(min=1e-6)
    top_left = torch.min(boxes1[:, None, :2], boxes2[None, :, :2])
    bottom_right = torch.max(boxes1[:, None, 2:], boxes2[None, :, 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    enclosing = (width * height).clamp(min=1e-6)
    return intersection / union - (enclosing - union) / enclosing


class PlainAttention(IoFBiasedSelfAttention):
    """Self-attention with its softmax written out."""

    def forward(self, queries: Tensor, xyzr: Tensor) -> Tensor:
        batch, num_queries, channels = queries.shape
        # Position: x and y in thousands of pixels, z and r as they are.
        per_value = channels // 4
        k = torch.arange(per_value, device=xyzr.device)
        frequency = 10000 ** (2 * torch.div(k, 2, rounding_mode="floor") / per_value)
        embeddings = []
        for value in (xyzr[..., 0] / 1000, xyzr[..., 1] / 1000, xyzr[..., 2], xyzr[..., 3]):
            angle = value[..., None] / frequency.to(xyzr.dtype)
            embeddings.append(torch.where(k % 2 == 0, angle.sin(), angle.cos()))
        u = queries + torch.cat(embeddings, dim=-1)

        # Bias: how much of its own box a query finds covered by another box.
        with torch.no_grad():
            covered = []
            for boxes in decode(xyzr):
                intersection, area, _ = overlap(boxes, boxes)
                covered.append(intersection / area.clamp(min=1e-6)[:, None])
            logarithm = torch.log(torch.stack(covered) + 1e-7)
        bias = self.tau.view(1, -1, 1, 1) * logarithm[:, None]

        weight, offset = self.attention.in_proj_weight, self.attention.in_proj_bias
        q, k, v = F.linear(u, weight, offset).chunk(3, dim=-1)
        per_head = channels // self.num_heads
        shape = (batch, num_queries, self.num_heads, per_head)
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(per_head) + bias
        attended = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(u.shape)
        return self.norm(u + self.attention.out_proj(attended))


class PlainSampling(SubBoxSampling):
    """One level after another: sample, weight, add."""

    def forward(self, queries, xyzr, maps) -> Tensor:
        points = self.points(queries, xyzr)
        batch, num_queries, groups, num_points, _ = points.xy.shape
        level = torch.arange(len(maps.levels), device=queries.device)
        distance = points.z[..., None] - self.SCALE_OF_FIRST_LEVEL - level
        weights = torch.softmax(-(distance**2) / 2, dim=-1)

        total = queries.new_zeros(
            batch, num_queries, groups, num_points, queries.shape[-1] // groups
        )
        for i, (feature, stride) in enumerate(zip(maps.levels, maps.strides)):
            height, width = feature.shape[-2:]
            fraction = points.xy / points.xy.new_tensor([width * stride, height * stride])
            grid = fraction.permute(0, 2, 1, 3, 4).flatten(0, 1) * 2 - 1
            # Queries that recollect are several for each image, one after the other.
            feature = feature.repeat_interleave(batch // len(feature), dim=0)
            by_group = feature.reshape(batch * groups, -1, height, width)
            values = F.grid_sample(by_group, grid, align_corners=False)  # (B G, e, N, PQ)
            weight = weights[..., i].permute(0, 2, 1, 3).flatten(0, 1)
            values = values * weight[:, None]
            values = values.view(batch, groups, -1, num_queries, num_points)
            total = total + values.permute(0, 3, 1, 4, 2)
        return total


class PlainMixing(CascadeDynamicMixing):
    """Every adapted filter is written out."""

    def forward(self, queries, x, bank: FilterBank):
        batch, num_queries, channels = queries.shape
        groups, base, sub = self.groups, self.base_points, self.sub_points
        per_group = channels // groups
        num_points = base * sub
        lead = (batch, num_queries, groups)

        filters = self.filter_generator(queries).view(*lead, -1)
        own = filters[..., : per_group**2].reshape(*lead, per_group, per_group)
        own_spatial = filters[..., per_group**2 :].reshape(*lead, self.rows, num_points)
        channel_bias = spatial_bias = 0.0
        if self.bias_generator is not None:
            biases = self.bias_generator(queries).view(*lead, -1)
            channel_bias = biases[..., None, :per_group]
            spatial_bias = biases[..., per_group:, None]

        # The stage's own channel filter, then the banked ones from the oldest to the newest.
        residual = x
        x = F.relu(self.channel_norm(torch.matmul(x, own) + channel_bias))
        if self.num_reused:
            entries = bank.newest(self.num_reused)
            if self.channel_adapter is not None:
                gates = torch.sigmoid(self.channel_adapter.gates(queries))
                gates = gates.view(*lead, per_group, 2, self.num_reused)
                bias = self.channel_adapter.bias(queries)
                bias = bias.view(*lead, self.num_reused, per_group)
            for j, entry in enumerate(entries):
                x = x.reshape(*lead, base, sub, per_group)
                across_base = x.transpose(-3, -2).reshape(*lead, sub, base * per_group)
                across_base = self.static_mixing[j].across_base_points(across_base)
                across_base = across_base.reshape(*lead, sub, base, per_group).transpose(-3, -2)
                across_sub = x.reshape(*lead, base, sub * per_group)
                across_sub = self.static_mixing[j].across_sub_points(across_sub)
                across_sub = across_sub.reshape(*lead, base, sub, per_group)
                x = (across_base + across_sub).reshape(*lead, num_points, per_group) + residual
                residual = x
                if self.channel_adapter is not None:
                    row = gates[..., :, 1, j].unsqueeze(-1)
                    column = gates[..., :, 0, j].unsqueeze(-2)
                    adapted = row * entry.channel + (1 - row) * own
                    adapted = column * adapted + (1 - column) * own
                    x = torch.matmul(x, adapted) + bias[..., j, :].unsqueeze(-2)
                x = F.relu(self.channel_norm(x))

        # The stage's own spatial filters, and as many adapted from the stage before.
        spatial = own_spatial
        if self.spatial_adapter is not None:
            previous = bank.newest(1)[0].spatial[..., : self.rows, :, :]
            previous = previous.reshape(*lead, self.rows, num_points)
            a = torch.sigmoid(self.spatial_adapter.filter_gates(queries)).view(*lead, -1, 1)
            b = torch.sigmoid(self.spatial_adapter.point_gates(queries)).view(*lead, 1, -1)
            adapted = a * previous + (1 - a) * own_spatial
            adapted = b * adapted + (1 - b) * own_spatial
            spatial = torch.cat([own_spatial, adapted], dim=-2)
        y = F.relu(self.spatial_norm(torch.matmul(spatial, x) + spatial_bias))

        queries = self.norm(queries + self.out_proj(y.reshape(batch, num_queries, -1)))
        deposit = DynamicFilters(own, spatial.reshape(*lead, self.out_points, base, sub))
        return queries, bank.deposit(deposit)


class PlainMatcher(HungarianMatcher):
    """One image and one stage at a time, each with its own copy to the host."""

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, truth: GroundTruth) -> Assignment:
        matches = torch.full(logits.shape[:3], -1, dtype=torch.long, device=logits.device)
        for s in range(logits.shape[0]):
            for b, count in enumerate(truth.num_objects):
                if count == 0:
                    continue
                objects, labels = truth.boxes[b, :count], truth.labels[b, :count]
                p = logits[s, b].sigmoid()
                positive = -0.25 * (1 - p) ** 2 * (p + 1e-12).log()
                negative = -0.75 * p**2 * (1 - p + 1e-12).log()
                classification = positive[:, labels] - negative[:, labels]
                size = truth.image_sizes[b].repeat(2)
                l1 = torch.cdist(boxes[s, b] / size, objects / size, p=1)
                giou = pairwise_giou(boxes[s, b], objects)
                cost = (
                    self.class_weight * classification
                    + self.l1_weight * l1
                    - self.giou_weight * giou
                )
                rows, columns = linear_sum_assignment(cost.cpu().numpy())
                rows = torch.from_numpy(rows).to(logits.device)
                matches[s, b, rows] = torch.from_numpy(columns).to(logits.device)
        return Assignment(matches)


class PlainCrossStageMatcher(CrossStageMatcher):
    """Stage by stage, image by image, source by source."""

    @torch.no_grad()
    def forward(self, assignment, boxes, truth, *, num_classes: int) -> ClassTargets:
        num_stages, num_images, num_queries, _ = boxes.shape
        targets = boxes.new_zeros(num_stages, num_images, num_queries, num_classes)
        scope = self.listens_to(num_stages)
        for t in range(num_stages):
            for b in range(num_images):
                for k in range(num_stages):
                    if not scope[t, k]:
                        continue
                    index = assignment.object_index[k, b]
                    query = torch.nonzero(index >= 0).flatten()
                    if len(query) == 0:
                        continue
                    objects = truth.boxes[b, index[query]]
                    intersection, area1, area2 = overlap(boxes[t, b, query], objects)
                    union = area1[:, None] + area2[None] - intersection
                    iou = (intersection / union.clamp(min=1e-6)).diagonal()
                    taken = query[iou >= self.iou_threshold]
                    targets[t, b, taken, truth.labels[b, index[taken]]] = 1
        return ClassTargets(targets)


class PlainCriterion(Criterion):
    """The losses of one stage after another, of the matched queries only."""

    def forward(self, predictions, truth, *, target_counts=None) -> CriterionResult:
        outputs = predictions.stages
        _, _, truth, assignment, targets, *_ = self.supervise(outputs, truth)
        rows = []
        for t, output in enumerate(outputs):
            matched = assignment.object_index[t] >= 0
            count = matched.sum().clamp(min=1)
            ones = targets.multi_hot[t].sum()
            cls_normalizer = torch.maximum(count, ones)
            focal = sigmoid_focal_loss(output.logits, targets.multi_hot[t], reduction="sum")

            image, query = matched.nonzero(as_tuple=True)
            index = assignment.object_index[t, image, query]
            predicted, objects = output.boxes[image, query], truth.boxes[image, index]
            size = truth.image_sizes[image].repeat(1, 2)
            l1 = ((predicted - objects) / size).abs().sum()
            giou = (1 - pairwise_giou(predicted, objects).diagonal()).sum()
            correct = output.logits[image, query].argmax(-1) == truth.labels[image, index]
            rows.append(
                (
                    self.class_weight * focal / cls_normalizer,
                    self.l1_weight * l1 / count,
                    self.giou_weight * giou / count,
                    cls_normalizer,
                    count,
                    100.0 * correct.sum() / count,
                )
            )
        stacked = [torch.stack(column) for column in zip(*rows)]
        return CriterionResult(
            *stacked[:3],
            assignment=assignment,
            class_targets=targets,
            cls_normalizer=stacked[3],
            box_normalizer=stacked[4],
            matched_accuracy=stacked[5],
        )


PLAIN_FORMS = {
    IoFBiasedSelfAttention: PlainAttention,
    SubBoxSampling: PlainSampling,
    CascadeDynamicMixing: PlainMixing,
    FactoredDynamicMixing: PlainMixing,
    HungarianMatcher: PlainMatcher,
    CrossStageMatcher: PlainCrossStageMatcher,
    Criterion: PlainCriterion,
}


def to_plain(detector: nn.Module) -> nn.Module:
    """A copy of a detector, or of any part of it, that computes the same in the plain way.

    Raises:
        ValueError: nothing in it has a plain form.
    """
    plain = copy.deepcopy(detector)
    found = False
    for module in list(plain.modules()):
        form = PLAIN_FORMS.get(type(module))
        if form is not None:
            module.__class__ = form
            found = True
        elif isinstance(module, NormReLU):
            module.__class__ = nn.LayerNorm
    if not found:
        raise UserError(f"{type(detector).__name__} has no part with a plain form")
    return plain
