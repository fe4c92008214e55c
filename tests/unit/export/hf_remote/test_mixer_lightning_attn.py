import pytest
import torch

from megatron_hypenet.export.hf_remote import mixer_lightning_attn as remote
from megatron_hypenet.ops import decay
from megatron_hypenet.ops.lightning_attn.naive import naive_lightning_attn

from .conftest import close, random


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 20, 40])
def test_slopes_are_the_training_code_s(heads):
    close(remote.alibi_slopes(heads, torch.device("cpu"), torch.float64), decay.alibi_slopes(heads))


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


@pytest.mark.parametrize("t", [1, 40])
def test_autocast_changes_nothing(t):
    rule = remote.lightning_step if t == 1 else remote.lightning_chunks
    q, k, v = (random(2, 3, t, 4, seed=i).float() for i in range(3))
    state = random(2, 3, 4, 4, seed=3).float()
    slopes = remote.alibi_slopes(3, q.device, q.dtype)
    want = rule(q, k, v, state, slopes, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, rule(q, k, v, state, slopes, None), want))


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
