import pytest
import torch

from megatron_hypenet.export.hf_remote import delta_hypenet as remote

from .conftest import close, random


def recurrence(q, k, v, log_decay, beta, state):
    """Compute the definition, one token at a time: q, k, v [b, h, t, d] -> o, state."""
    outputs = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t].exp()[..., None] * state
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        update = torch.einsum("bhk,bhv->bhkv", k[:, :, t], beta[:, :, t, None] * error)
        state = state + update
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outputs, 2), state


def draw(t, channels, *, b=2, h=3, d=8):
    """Draw inputs of the rule with memories from one token to a few hundred; beta up to 2."""
    q, k, v = (random(b, h, t, d, seed=i) for i in range(3))
    k = remote.unit_length(k)
    log_decay = -(3 * random(b, h, t, channels, seed=3) - 3).exp()
    beta = 2 * random(b, h, t, seed=4).sigmoid()
    return q, k, v, log_decay, beta, random(b, h, d, d, seed=5)


def test_vectors_get_length_one():
    x = random(2, 3, 8)
    close(remote.unit_length(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(remote.unit_length(torch.zeros(4)), torch.zeros(4))


@pytest.mark.parametrize("t", [1, 2, 7, 8, 9, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("group", [64, 128, 4096])
def test_chunks_are_the_recurrence(monkeypatch, t, channels, group):
    monkeypatch.setattr(remote, "_group_tokens", lambda log_decay: group)
    inputs = draw(t, channels)
    for got, want in zip(remote.delta_chunks(*inputs), recurrence(*inputs), strict=True):
        close(got, want)
    if t == 1:
        for got, want in zip(remote.delta_step(*inputs), recurrence(*inputs), strict=True):
            close(got, want)


@pytest.mark.parametrize("t", [1, 70])
@pytest.mark.parametrize("channels", [1, 8])
def test_autocast_changes_nothing(t, channels):
    rule = remote.delta_step if t == 1 else remote.delta_chunks
    inputs = [x.float() for x in draw(t, channels)]
    want = rule(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, rule(*inputs), want))


@pytest.mark.parametrize("channels", [1, 8])
def test_gradients_are_those_of_the_recurrence(channels):
    found = []
    for rule in (remote.delta_chunks, recurrence):
        inputs = [x.requires_grad_() for x in draw(70, channels)]
        o, state = rule(*inputs)
        (o.sin().sum() + state.cos().sum()).backward()
        found.append([x.grad for x in inputs])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 8])
def test_tokens_without_decay_and_strength_are_as_if_they_were_not_there(channels):
    q, k, v, log_decay, beta, start = draw(150, channels)
    real = torch.rand(2, 150, generator=torch.Generator().manual_seed(3)) > 0.4
    padded = ~real[:, None]
    o, state = remote.delta_chunks(
        q, k, v, log_decay.masked_fill(padded[..., None], 0.0), beta.masked_fill(padded, 0.0), start
    )
    for row in range(2):
        part = [x[row : row + 1, :, real[row]] for x in (q, k, v, log_decay, beta)]
        want_o, want_state = recurrence(*part, start[row : row + 1])
        close(o[row : row + 1, :, real[row]], want_o)
        close(state[row : row + 1], want_state)
    nothing = torch.zeros_like(log_decay[:, :, :1]), torch.zeros_like(beta[:, :, :1])
    _, kept = remote.delta_step(q[:, :, :1], k[:, :, :1], v[:, :, :1], *nothing, start)
    assert torch.equal(kept, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 8])
def test_decays_that_forget_everything_have_finite_gradients(channels, dtype):
    inputs = [x.to(dtype) for x in draw(100, channels)]
    inputs[3] = inputs[3] * torch.tensor([1.0, 1e4, 1e-9], dtype=dtype)[:, None, None]
    want, want_state = recurrence(*(x.double() for x in inputs))
    for x in inputs:
        x.requires_grad_()
    o, state = remote.delta_chunks(*inputs)
    assert o.dtype == state.dtype == dtype
    limit = 1e-4 if dtype == torch.float32 else 1e-10
    assert (o - want).norm() / want.norm() < limit
    assert (state - want_state).norm() / want_state.norm() < limit
    (o.sum() + state.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


@pytest.mark.parametrize(("device", "rows", "channels", "want"), [
    ("cpu", 1, 1, 64), ("cpu", 64, 128, 64), ("meta", 1, 1, 4096), ("meta", 1, 128, 1024),
    ("meta", 3, 1, 1344), ("meta", 500, 128, 64),
])  # fmt: skip
def test_groups_are_whole_chunks(device, rows, channels, want):
    decay = torch.empty(rows, 2, 9, channels, device=device)
    assert remote._group_tokens(decay) == want
