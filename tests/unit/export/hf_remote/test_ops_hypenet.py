import math

import pytest
import torch

from megatron_hypenet.export.hf_remote import ops_hypenet as remote
from megatron_hypenet.ops import decay, logits_scale
from megatron_hypenet.ops.lightning_attn.naive import naive_lightning_attn


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 20, 40])
def test_slopes_are_the_training_code_s(heads):
    close(remote.alibi_slopes(heads, torch.device("cpu"), torch.float64), decay.alibi_slopes(heads))


@pytest.mark.parametrize("setting", [None, "hype", "hype 500", 1.5])
def test_query_scale_is_the_training_code_s(setting):
    positions = torch.arange(0, 100_000, 7919)
    got = remote.query_scale(setting, positions[None], torch.float64)
    want = logits_scale.logits_scale(setting, positions, torch.float64)
    if want is None:
        assert got is None
    else:
        close(got.expand(1, 1, len(positions), 1)[0, 0, :, 0], want)


@pytest.mark.parametrize("setting", ["hype 1", "log"])
def test_query_scale_refuses(setting):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        remote.query_scale(setting, torch.arange(3)[None], torch.float64)


def test_rope_rotates_halves_by_relative_position():
    cos, sin = remote.rope_tables(8, 100.0, torch.tensor([[5, 9]]), torch.float64)
    q = random(1, 1, 1, 8)
    k = random(1, 1, 1, 8, seed=1)
    turned_q = remote.rotate(q, cos[:, :, :1], sin[:, :, :1])
    turned_k = remote.rotate(k, cos[:, :, 1:], sin[:, :, 1:])
    angles = [4 * 100.0 ** (-2 * i / 8) for i in range(4)]
    pairs = [
        (q[..., i] + 1j * q[..., i + 4]).conj()
        * (k[..., i] + 1j * k[..., i + 4])
        * complex(math.cos(a), math.sin(a))
        for i, a in enumerate(angles)
    ]
    close((turned_q * turned_k).sum(), sum(pair.real for pair in pairs).sum())


@pytest.mark.parametrize("t", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("group", [128, 256, 4096])
def test_chunks_are_the_recurrence(monkeypatch, t, with_state, group):
    monkeypatch.setattr(remote, "_group_tokens", lambda q: group)
    b = 2
    h = 3
    d = 4
    q, k, v = (random(b, h, t, d, seed=i) for i in range(3))
    slopes = decay.alibi_slopes(h)
    state = (
        random(b, h, d, d, seed=9) if with_state else torch.zeros(b, h, d, d, dtype=torch.float64)
    )
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    want_o, want_state = naive_lightning_attn(
        *swapped, -slopes, scale=1.0, initial_state=state.clone()
    )
    got_o, got_state = remote.lightning_chunks(q, k, v, state, slopes, None)
    close(got_o, want_o.transpose(1, 2))
    close(got_state, want_state)
    if t == 1:
        step_o, step_state = remote.lightning_step(q, k, v, state, slopes, None)
        close(step_o, got_o)
        close(step_state, got_state)


@pytest.mark.parametrize("group", [128, 256, 4096])
def test_padding_anywhere_leaves_the_other_tokens_alone(monkeypatch, group):
    monkeypatch.setattr(remote, "_group_tokens", lambda q: group)
    b = 2
    h = 3
    t = 200
    d = 4
    q, k, v = (random(b, h, t, d, seed=i) for i in range(3))
    slopes = decay.alibi_slopes(h)
    start = random(b, h, d, d, seed=9)
    real = torch.rand(b, t, generator=torch.Generator().manual_seed(3)) > 0.4
    o, state = remote.lightning_chunks(q, k, v, start, slopes, real)
    for row in range(b):
        part = [x[row : row + 1, :, real[row]] for x in (q, k, v)]
        want_o, want_state = remote.lightning_chunks(*part, start[row : row + 1], slopes, None)
        close(o[row : row + 1, :, real[row]], want_o)
        close(state[row : row + 1], want_state)


def test_a_padded_step_keeps_the_state():
    q, k, v = (random(2, 3, 1, 4, seed=i) for i in range(3))
    start = random(2, 3, 4, 4, seed=9)
    _, state = remote.lightning_step(
        q, k, v, start, decay.alibi_slopes(3), torch.tensor([[True], [False]])
    )
    assert torch.equal(state[1], start[1]) and not torch.equal(state[0], start[0])


def test_strong_decay_over_long_chunks_has_finite_gradients():
    q, k, v = (random(1, 2, 256, 4, seed=i).requires_grad_() for i in range(3))
    slopes = torch.tensor([20.0, 1e-3], dtype=torch.float64)
    remote.lightning_chunks(q, k, v, torch.zeros(1, 2, 4, 4, dtype=torch.float64), slopes, None)[
        0
    ].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def step(*, past=0, real=None):
    empty = torch.zeros(1)
    return remote.Step(
        empty, empty, None, empty, None if real is None else real[:, past:], real, past
    )


def dense(q, k, v, past, real=None):
    """Attention by its definition."""
    b, h, t, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    allowed = torch.ones(t, past + t, dtype=torch.bool).tril(past).expand(b, 1, t, past + t)
    if real is not None:
        allowed = allowed & real[:, None, None, :]
    return ((q @ k.transpose(-1, -2)) / math.sqrt(d)).masked_fill(~allowed, -torch.inf).softmax(
        -1
    ).nan_to_num() @ v


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("t", [1, 7, 33])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attention(monkeypatch, past, t, padded):
    monkeypatch.setattr(remote, "_QUERY_BLOCK_TOKENS", 8)
    q = random(2, 6, t, 4)
    k = random(2, 2, past + t, 4, seed=1)
    v = random(2, 2, past + t, 4, seed=2)
    real = None
    if padded:
        real = torch.rand(2, past + t, generator=torch.Generator().manual_seed(4)) > 0.3
    got = remote.softmax_attention(q, k, v, step(past=past, real=real))
    want = dense(q, k, v, past, real)
    assert torch.isfinite(got).all()
    keep = torch.ones(2, t, dtype=torch.bool) if real is None else real[:, past:]
    close(got.transpose(1, 2)[keep], want.transpose(1, 2)[keep])
