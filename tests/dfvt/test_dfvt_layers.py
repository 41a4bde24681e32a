"""The parts of a stage against their definitions, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dfvt.layers import (
    DualAttentionEnhancement,
    FusedBlock,
    SpaceToDepthModule,
    WindowAttention,
    relative_position_index,
    shift_mask,
)


def attention_by_loops(module: WindowAttention, tokens: torch.Tensor, *, shifted: bool):
    """One output token at a time, for a (1, h, w, C) map."""
    _, h, w, channels = tokens.shape
    n = module.window_size
    shift = n // 2 if shifted else 0
    rows, columns = math.ceil(h / n) * n, math.ceil(w / n) * n
    padded = torch.zeros(rows, columns, channels, dtype=tokens.dtype)
    padded[:h, :w] = tokens[0]
    heads, size = module.num_heads, channels // module.num_heads
    qkv = module.qkv(padded).view(rows, columns, 3, heads, size)
    table = module.bias_table.view(2 * n - 1, 2 * n - 1, heads)

    def place(y, x):
        # Where a token is in the shifted map, its window there, and its region.
        y, x = (y - shift) % rows, (x - shift) % columns
        region = tuple(
            (p >= length - n) + (p >= length - shift) for p, length in ((y, rows), (x, columns))
        )
        return (y, x), (y // n, x // n), region

    out = torch.zeros(h, w, channels, dtype=tokens.dtype)
    for y in range(h):
        for x in range(w):
            (ty, tx), window, region = place(y, x)
            scores, values = [], []
            for ky in range(rows):
                for kx in range(columns):
                    (sy, sx), other_window, other_region = place(ky, kx)
                    if other_window != window:
                        continue
                    score = (qkv[y, x, 0] * qkv[ky, kx, 1]).sum(-1) / size**0.5
                    score = score + table[ty - sy + n - 1, tx - sx + n - 1]
                    if shifted and other_region != region:
                        score = score - 100
                    scores.append(score)
                    values.append(qkv[ky, kx, 2])
            weight = torch.stack(scores).softmax(0)
            mixed = (weight[..., None] * torch.stack(values)).sum(0)
            out[y, x] = module.proj(mixed.flatten())
    return out[None]


@pytest.mark.parametrize(("height", "width"), [(6, 6), (3, 5), (2, 7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_is_the_sum_over_its_window(height, width, shifted):
    torch.manual_seed(0)
    module = WindowAttention(8, 2, window_size=3).double()
    nn.init.normal_(module.bias_table)
    tokens = torch.randn(1, height, width, 8, dtype=torch.float64)
    mask = None
    if shifted:
        mask = shift_mask(height + -height % 3, width + -width % 3, window_size=3).double()
    with torch.no_grad():
        expected = attention_by_loops(module, tokens, shifted=shifted)
        torch.testing.assert_close(module(tokens, mask), expected)


def test_images_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    module = WindowAttention(8, 2, window_size=3).double()
    tokens = torch.randn(3, 4, 5, 8, dtype=torch.float64)
    mask = shift_mask(6, 6, window_size=3)
    together = module(tokens, mask)
    for i in range(3):
        torch.testing.assert_close(module(tokens[i : i + 1], mask), together[i : i + 1])


def test_heads_must_share_the_channels():
    with pytest.raises(ValueError, match="3 attention heads cannot share 32 channels"):
        WindowAttention(32, 3)


@given(st.integers(1, 8))
def test_relative_position_index_depends_on_the_offset_alone(size):
    index = relative_position_index(size)
    rows = index.view(size, size, size, size)
    of_offset = {}
    for y in range(size):
        for x in range(size):
            for ky in range(size):
                for kx in range(size):
                    row = int(rows[y, x, ky, kx])
                    assert of_offset.setdefault((y - ky, x - kx), row) == row
    assert sorted(of_offset.values()) == list(range((2 * size - 1) ** 2))
    assert sorted(of_offset, key=of_offset.get) == sorted(of_offset)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 7]))
def test_shift_mask_parts_what_the_roll_brought_together(rows, columns, size):
    height, width = rows * size, columns * size
    mask = shift_mask(height, width, window_size=size)
    assert mask.shape == (rows * columns, size**2, size**2)
    assert set(mask.unique().tolist()) <= {0.0, -100.0}
    assert torch.equal(mask, mask.transpose(1, 2))
    assert (mask.diagonal(dim1=1, dim2=2) == 0).all()
    # Windows that no border runs through are whole; in the corner four regions meet.
    inner = mask.view(rows, columns, size**2, size**2)[:-1, :-1]
    assert (inner == 0).all()
    assert len(mask[-1].unique(dim=0)) == 4


def test_space_to_depth_takes_the_row_offset_first():
    torch.manual_seed(0)
    module = SpaceToDepthModule(2).eval()
    seen = []
    module.depthwise.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    local = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    assert module(local).shape == (1, 2, 2, 3)
    for part, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        found = seen[0][0, 2 * part : 2 * part + 2]
        assert torch.equal(found, local[0, :, row::2, column::2])


def test_space_to_depth_has_no_activation():
    torch.manual_seed(0)
    module = SpaceToDepthModule(4).eval().double()
    a, b = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    zero = module(torch.zeros_like(a))
    torch.testing.assert_close(module(a + b) - zero, module(a) + module(b) - 2 * zero)


def test_gate_is_a_mean_of_context_and_spatial():
    torch.manual_seed(0)
    module = DualAttentionEnhancement(32).double()
    context, spatial = torch.randn(2, 2, 3, 4, 32, dtype=torch.float64)
    fused = module(context, spatial)
    low, high = torch.minimum(context, spatial), torch.maximum(context, spatial)
    assert ((fused >= low) & (fused <= high)).all()
    gate = (fused - context) / (spatial - context)
    logit = gate.logit()
    # A number a token plus a number a channel.
    token, channel = logit[..., :1], (logit - logit[..., :1])[:, :1, :1]
    torch.testing.assert_close(token + channel, logit, atol=1e-6, rtol=1e-6)


def test_gate_per_token_is_of_the_spatial_tokens_and_per_channel_of_the_context():
    torch.manual_seed(0)
    module = DualAttentionEnhancement(32).double()
    context, spatial = torch.randn(2, 1, 3, 4, 32, dtype=torch.float64)
    seen = {}
    module.token_gate.register_forward_pre_hook(lambda _, a: seen.setdefault("token", a[0]))
    module.channel_gate.register_forward_pre_hook(lambda _, a: seen.setdefault("channel", a[0]))
    module(context, spatial)
    assert torch.equal(seen["token"], spatial)
    torch.testing.assert_close(seen["channel"], context.mean((1, 2), keepdim=True))


def test_drop_path_drops_branches_of_whole_images():
    torch.manual_seed(0)
    block = FusedBlock(32, 2, drop_path_rate=0.5).double().train()
    tokens, spatial = torch.randn(2, 64, 2, 2, 32, dtype=torch.float64)
    kept = FusedBlock(32, 2).double()
    kept.load_state_dict(block.state_dict())

    dropped_attention = kept.dane(tokens, spatial)
    neither = dropped_attention
    only_mlp = neither + 2 * kept.mlp(kept.norm2(neither))
    with_attention = kept.dane(tokens + 2 * kept.attention(kept.norm1(tokens)), spatial)
    both = with_attention + 2 * kept.mlp(kept.norm2(with_attention))

    out = block(tokens, spatial)
    counts = [0] * 4
    for i in range(64):
        matches = [
            torch.allclose(out[i], expected[i])
            for expected in (neither, only_mlp, with_attention, both)
        ]
        assert sum(matches) == 1
        counts[matches.index(True)] += 1
    assert min(counts) > 4
    assert torch.equal(block.eval()(tokens, spatial), kept.eval()(tokens, spatial))
