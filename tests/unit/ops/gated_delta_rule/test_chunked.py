"""Chunks give what single tokens give, in float64: outputs, states, summaries, gradients."""

import pytest
import torch

from megatron_hypenet.ops.gated_delta_rule import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
    naive_gated_delta_rule,
)
from tests.unit.ops.gated_delta_rule.inputs import drawn

NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")


def documents(t, b=2):
    """Return several short documents in one row, one boundary in the other."""
    rows = [[i // 7 for i in range(t)], [int(i >= t // 3) for i in range(t)]]
    return torch.tensor(rows[:b])


def everything(op, t, *, per_channel, ids, **options):
    """Return outputs, final state and gradients by name."""
    inputs = drawn(t, per_channel=per_channel)
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    o, final = op(*inputs, scale=0.7, initial_state=state, document_ids=ids, **options)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (o, final)]
    loss = sum((x * w).sum() for x, w in zip((o, final), weights, strict=True))
    gradients = torch.autograd.grad(loss, (*inputs, state))
    found = {"o": o, "state": final}
    return found | {f"d {name}": x for name, x in zip(NAMES, gradients, strict=True)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 50])
def test_equals_the_definition(t, per_channel, packed):
    ids = documents(t) if packed else None
    want = everything(naive_gated_delta_rule, t, per_channel=per_channel, ids=ids)
    for size in (4, 16, None):
        got = everything(
            chunked_gated_delta_rule, t, per_channel=per_channel, ids=ids, chunk_size=size
        )
        for name in want:
            torch.testing.assert_close(
                got[name],
                want[name],
                rtol=1e-9,
                atol=1e-11,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_summary_maps_any_state(per_channel, packed):
    t = 37
    ids = documents(t) if packed else None
    inputs = drawn(t, per_channel=per_channel)
    state = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    _, want = naive_gated_delta_rule(*inputs, scale=1.0, initial_state=state, document_ids=ids)
    transition, written = chunked_gated_delta_summary(*inputs[1:], document_ids=ids, chunk_size=8)
    torch.testing.assert_close(transition @ state + written, want, rtol=1e-9, atol=1e-11)
    if packed:
        assert not transition.any()


def test_bfloat16_accumulates_in_float32():
    q, k, v, g, beta = (x.detach() for x in drawn(40))
    exact, _ = naive_gated_delta_rule(q, k, v, g, beta, scale=1.0)
    low = [x.bfloat16() for x in (q, k, v)]
    o, state = chunked_gated_delta_rule(*low, g.float(), beta.float(), scale=1.0)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert ((o - exact).norm() / exact.norm()) < 1e-2


def test_strong_decays_stay_finite_in_float32():
    """A factor exp(-G_j) alone would be e^600 here."""
    inputs = [x.detach().float() for x in drawn(64, per_channel=True, strongest=40.0)]
    o, state = chunked_gated_delta_rule(*inputs, scale=1.0)
    assert torch.isfinite(o).all() and torch.isfinite(state).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_weak_decays_after_a_strong_one_keep_their_digits(per_channel):
    q, k, v, g, beta = (x.detach() for x in drawn(48, per_channel=per_channel, strongest=0.01))
    g[:, 1] = -5000.0
    exact, _ = naive_gated_delta_rule(q, k, v, g, beta, scale=1.0)
    got, _ = chunked_gated_delta_rule(*(x.float() for x in (q, k, v, g, beta)), scale=1.0)
    assert ((got - exact).norm() / exact.norm()) < 2e-6
