import math

import torch
import torch.nn.functional as F

from stageinteractor import IoFBiasedSelfAttention
from stageinteractor.attention import geometry_embedding
from stageinteractor.boxes import box_to_xyzr, intersection_over_foreground, xyzr_to_box

C, HEADS = 16, 4


def make_inputs(num_queries=5):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, num_queries, C, generator=generator, dtype=torch.float64)
    top_left = torch.rand(2, num_queries, 2, generator=generator, dtype=torch.float64) * 60
    size = 8 + torch.rand(2, num_queries, 2, generator=generator, dtype=torch.float64) * 40
    return queries, box_to_xyzr(torch.cat([top_left, top_left + size], -1))


def test_embedding_follows_the_formula():
    xyzr = torch.tensor([[250.0, 640.0, 5.5, -0.25]], dtype=torch.float64)
    embedding = geometry_embedding(xyzr, 32)[0].view(4, 8)
    for i, value in enumerate([0.25, 0.64, 5.5, -0.25]):
        for k in range(8):
            angle = value / 10000 ** (2 * (k // 2) / 8)
            expected = math.sin(angle) if k % 2 == 0 else math.cos(angle)
            assert math.isclose(embedding[i, k].item(), expected, rel_tol=1e-9, abs_tol=1e-12)


def test_attention_is_softmax_of_logits_plus_bias():
    torch.manual_seed(0)
    module = IoFBiasedSelfAttention(C, HEADS).double()
    queries, xyzr = make_inputs()
    u = queries + geometry_embedding(xyzr, C)
    q, k, v = F.linear(u, module.attention.in_proj_weight, module.attention.in_proj_bias).chunk(
        3, -1
    )
    iof = intersection_over_foreground(xyzr_to_box(xyzr))
    heads = []
    for h in range(HEADS):
        part = slice(h * C // HEADS, (h + 1) * C // HEADS)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(C // HEADS)
        logits = logits + module.tau[h] * torch.log(iof + 1e-7)
        heads.append(logits.softmax(-1) @ v[..., part])
    expected = module.norm(u + module.attention.out_proj(torch.cat(heads, -1)))
    torch.testing.assert_close(module(queries, xyzr), expected)


def test_no_gradient_flows_through_the_bias_to_the_boxes_but_tau_learns():
    torch.manual_seed(0)
    module = IoFBiasedSelfAttention(C, HEADS).double()
    queries, xyzr = make_inputs()
    xyzr.requires_grad_()
    assert not module.overlap(xyzr).requires_grad
    module(queries, xyzr).square().sum().backward()
    assert (module.tau.grad.abs() > 0).all()


def test_permuting_the_queries_permutes_the_output():
    torch.manual_seed(0)
    module = IoFBiasedSelfAttention(C, HEADS).double()
    queries, xyzr = make_inputs()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        module(queries[:, order], xyzr[:, order]), module(queries, xyzr)[:, order]
    )
