import pytest
import torch
import torch.nn.functional as F

from stageinteractor import CascadeDynamicMixing, DynamicFilters, FilterBank

B, N, G, E, P, Q, OUT = 1, 2, 2, 3, 2, 4, 6
C = G * E


def make_mixing(**kwargs):
    torch.manual_seed(0)
    mixing = CascadeDynamicMixing(
        C, groups=G, base_points=P, sub_points=Q, out_points=OUT, **kwargs
    ).double()
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixing


def make_bank(entries, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bank = FilterBank()
    for _ in range(entries):
        bank = bank.deposit(DynamicFilters(rand(B, N, G, E, E), rand(B, N, G, OUT, P, Q)))
    return bank


def make_inputs(seed=2):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    x = torch.randn(B, N, G, P * Q, E, generator=generator, dtype=torch.float64)
    return queries, x


def ln2(x):
    return F.relu(F.layer_norm(x, x.shape[-2:]))


def literal_mixing(mixing, q, x0, bank):
    """The mixing of one query, written out group by group as in the paper."""
    rows = OUT // 2 if mixing.spatial_adapter is not None else OUT
    filters = mixing.filter_generator(q).view(G, -1)
    biases = mixing.bias_generator(q).view(G, -1)
    n = mixing.num_reused
    outputs, deposits = [], []
    for g in range(G):
        own = filters[g, : E * E].view(E, E)
        own_spatial = filters[g, E * E :].view(rows, P * Q)
        x = ln2(x0[g] @ own + biases[g, :E])
        residual = x0[g]
        entries = bank.entries[len(bank.entries) - n :] if n else ()
        for j, entry in enumerate(entries):
            static = mixing.static_mixing[j]
            points = x.view(P, Q, E)
            a = torch.stack(
                [static.across_base_points(points[:, s].reshape(-1)).view(P, E) for s in range(Q)],
                dim=1,
            )
            d = torch.stack(
                [static.across_sub_points(points[p].reshape(-1)).view(Q, E) for p in range(P)]
            )
            x = (a + d).view(P * Q, E) + residual
            residual = x
            if mixing.channel_adapter is not None:
                gates = mixing.channel_adapter.gates(q).sigmoid().view(G, E, 2, n)
                c, r = gates[g, :, 0, j][None, :], gates[g, :, 1, j][:, None]
                banked = entry.channel[0, 0, g]
                mixed = r * banked + (1 - r) * own
                mixed = c * mixed + (1 - c) * own
                x = x @ mixed + mixing.channel_adapter.bias(q).view(G, n, E)[g, j]
            x = ln2(x)
        spatial = own_spatial
        if mixing.spatial_adapter is not None:
            a = mixing.spatial_adapter.filter_gates(q).sigmoid().view(G, rows)[g][:, None]
            b = mixing.spatial_adapter.point_gates(q).sigmoid().view(G, P * Q)[g][None, :]
            banked = bank.entries[-1].spatial[0, 0, g, :rows].reshape(rows, P * Q)
            mixed = a * banked + (1 - a) * own_spatial
            spatial = torch.cat([own_spatial, b * mixed + (1 - b) * own_spatial])
        outputs.append(ln2(spatial @ x + biases[g, E:][:, None]))
        deposits.append(spatial)
    y = torch.stack(outputs).flatten()
    return mixing.norm(q + mixing.out_proj(y)), torch.stack(deposits)


@pytest.mark.parametrize(
    "kwargs, entries",
    [
        ({}, 0),
        ({}, 2),
        ({"reused_channel_filters": 1, "reuse_spatial_filters": True}, 1),
        ({"reused_channel_filters": 3, "reuse_spatial_filters": True}, 3),
        ({"reused_channel_filters": 1, "reuse_spatial_filters": True}, 3),
        ({"reused_channel_filters": 2}, 2),
        ({"reused_channel_filters": 2, "apply_reused_channel_filters": False}, 2),
    ],
)
def test_mixing_agrees_with_the_equations_written_out(kwargs, entries):
    mixing = make_mixing(**kwargs)
    bank = make_bank(entries)
    queries, x = make_inputs()
    mixed, next_bank = mixing(queries, x, bank)
    # make_bank is random per query; the literal form reads query 0.
    expected, deposited = literal_mixing(mixing, queries[0, 0], x[0, 0], bank)
    torch.testing.assert_close(mixed[0, 0], expected)
    assert len(next_bank) == entries + 1
    assert next_bank.entries[:entries] == bank.entries
    torch.testing.assert_close(next_bank.entries[-1].spatial[0, 0].flatten(2), deposited)
    own = mixing.filter_generator(queries[0, 0]).view(G, -1)[:, : E * E].view(G, E, E)
    torch.testing.assert_close(next_bank.entries[-1].channel[0, 0], own)


def test_gradient_flows_into_the_bank():
    mixing = make_mixing(reused_channel_filters=2, reuse_spatial_filters=True)
    bank = FilterBank(
        tuple(DynamicFilters(*(x.requires_grad_() for x in e)) for e in make_bank(2).entries)
    )
    mixing(*make_inputs(), bank)[0].sum().backward()
    assert all(e.channel.grad.abs().sum() > 0 for e in bank.entries)
    assert bank.entries[0].spatial.grad is None  # only the newest spatial filters are reused
    used = bank.entries[1].spatial.grad.abs().sum((0, 1, 2, 4, 5))
    assert (used[: OUT // 2] > 0).all() and (used[OUT // 2 :] == 0).all()


def test_gradients_agree_with_finite_differences():
    mixing = make_mixing(reused_channel_filters=1, reuse_spatial_filters=True)
    entry = make_bank(1).entries[0]
    inputs = [x.requires_grad_() for x in (*make_inputs(), *entry)]

    def run(queries, x, channel, spatial):
        bank = FilterBank((DynamicFilters(channel, spatial),))
        return mixing(queries, x, bank)[0]

    assert torch.autograd.gradcheck(run, inputs, atol=1e-4)


def test_closed_gates_leave_the_own_filters():
    mixing = make_mixing(reused_channel_filters=1, reuse_spatial_filters=True)
    for linear in (
        mixing.channel_adapter.gates,
        mixing.spatial_adapter.filter_gates,
        mixing.spatial_adapter.point_gates,
    ):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(linear.bias, -1e4)
    inputs = make_inputs()
    one, _ = mixing(*inputs, make_bank(1, seed=3))
    other, _ = mixing(*inputs, make_bank(1, seed=4))
    assert torch.equal(one, other)


def test_a_bank_is_never_changed_in_place():
    bank = make_bank(1)
    longer = bank.deposit(bank.entries[0])
    assert (len(bank), len(longer)) == (1, 2)


def test_asking_for_more_filters_than_banked_is_an_error():
    mixing = make_mixing(reused_channel_filters=2)
    with pytest.raises(ValueError, match="asks for 2 earlier filters, but the bank holds 1"):
        mixing(*make_inputs(), make_bank(1))


def test_an_odd_number_of_out_points_cannot_be_halved():
    with pytest.raises(ValueError, match="odd: 7"):
        CascadeDynamicMixing(
            C, groups=G, base_points=P, sub_points=Q, out_points=7, reuse_spatial_filters=True
        )
