import pytest
import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.parallel.context.state_algebra import (
    Shift,
    Transition,
    add_incoming,
    carry_weights,
    continuing_chunks,
    final_state_gradient,
    incoming_state,
    read_factor,
)
from tests.dense_attention import dense_lightning, document_ids


def chunk_states(k, v, decay, ids, chunks):
    """Return the final state of every chunk scanned from zero, by the definition: [n, b, h, k,
    v]."""
    c = k.shape[1] // chunks
    to_end = torch.exp(decay * (c - 1 - torch.arange(c))[:, None])[None]
    states = []
    for key, value, own in zip(k.split(c, 1), v.split(c, 1), ids.split(c, 1), strict=True):
        weight = to_end * (own == own[:, -1:])[..., None]
        states.append(torch.einsum("bth,bthk,bthv->bhkv", weight, key, value))
    return torch.stack(states)


@pytest.mark.parametrize("starts", [(), (9,), (4, 8, 12), (1, 6, 7, 15), range(1, 16)])
def test_incoming_states_complete_the_chunks(starts):
    """What chunks lack is read from the incoming states, exactly."""
    q, k, v = (torch.randn(1, 16, 3, d).double() for d in (2, 2, 5))
    ids = document_ids(starts, length=16)
    decay = log_decay(3)
    chunks = 4
    weights = carry_weights(decay, 4, chunks, ids)
    states = chunk_states(k, v, decay, ids, chunks)
    want = dense_lightning(q, k, v, decay, 0.7, ids)
    for chunk in range(chunks):
        tokens = slice(4 * chunk, 4 * chunk + 4)
        own = ids[:, tokens]
        local = dense_lightning(q[:, tokens], k[:, tokens], v[:, tokens], decay, 0.7, own)
        got = add_incoming(
            local,
            q[:, tokens],
            incoming_state(states, weights, chunk),
            read_factor(decay, 0.7, 4, own),
        )
        torch.testing.assert_close(got, want[:, tokens], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ids", [None, document_ids((3, 7), (8,), length=12)])
def test_the_gradient_rule_is_the_transpose_of_the_forward_rule(ids):
    weights = carry_weights(log_decay(3), 2, 6, ids)
    states, upstream = (torch.randn(6, 2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    states.requires_grad_()
    incoming = torch.stack([incoming_state(states, weights, chunk) for chunk in range(6)])
    incoming.backward(upstream)
    got = torch.stack([final_state_gradient(upstream, weights, chunk) for chunk in range(6)])
    torch.testing.assert_close(got, states.grad)


def test_weights_are_powers_of_the_decay_within_a_document():
    decay = torch.tensor([-0.5, -0.01], dtype=torch.float64)
    weights = carry_weights(decay, 3, 4)
    assert weights.shape == (4, 4, 1, 2)
    torch.testing.assert_close(weights[3, 0, 0], torch.exp(decay * 6))
    torch.testing.assert_close(weights[1, 0, 0], torch.ones(2).double())
    assert not weights.triu(0)[:, :, 0, 0].diagonal().any()
    ids = document_ids((4,), (6,), length=12)  # within chunk 1; at the start of chunk 2
    cut = carry_weights(decay, 3, 4, ids)
    assert cut[1, 0].all(dim=-1).tolist() == [True, True] and cut[2, 1].all(dim=-1).tolist() == [
        True,
        False,
    ]
    assert not cut[2:, 0].any() and not cut[3, 1, 1].any()


def test_strong_decay_over_long_chunks_vanishes_without_overflow():
    weights = carry_weights(log_decay(16), 1 << 20, 8)
    assert torch.isfinite(weights).all() and weights[7, 0].max() == 0 and weights[7, 6].min() == 1


def test_add_incoming_differentiates():
    o = torch.randn(3, 4, 2, 5).double()
    q = torch.randn(3, 4, 2, 3).double()
    state = torch.randn(3, 2, 3, 5).double()
    for factor in (torch.rand(1, 4, 2).double(), torch.rand(3, 4, 2).double()):
        inputs = [x.clone().requires_grad_() for x in (o, q, state)]
        assert torch.autograd.gradcheck(lambda *x, factor=factor: add_incoming(*x, factor), inputs)
        want = o + factor[..., None] * torch.einsum("nchk,nhkv->nchv", q, state)
        torch.testing.assert_close(add_incoming(o, q, state, factor), want)


def test_bf16_reads_fp32_states_and_returns_fp32_state_gradients():
    o = torch.randn(2, 4, 2, 8).bfloat16()
    q = torch.randn(2, 4, 2, 8).bfloat16()
    state = torch.randn(2, 2, 8, 8)
    q.requires_grad_()
    state.requires_grad_()
    out = add_incoming(o, q, state, torch.ones(1, 4, 2).double())
    out.float().sum().backward()
    assert out.dtype == q.grad.dtype == torch.bfloat16 and state.grad.dtype == torch.float32


@pytest.mark.parametrize("ids", [None, document_ids((3, 7), (8,), length=12)])
def test_transitions_carry_states_and_their_gradients(ids):
    """The reference is autograd through the recurrence written out."""
    continues = continuing_chunks(ids, 6)
    matrices, finals, upstream = (
        torch.randn(6, 2, 3, 4, d, dtype=torch.float64) for d in (4, 5, 5)
    )
    inputs = [matrices.clone().requires_grad_(), finals.clone().requires_grad_()]
    state = torch.zeros_like(finals[0])
    states = []
    for chunk in range(6):
        states.append(state if continues is None else state * continues[chunk][:, None, None, None])
        state = inputs[0][chunk] @ states[-1] + inputs[1][chunk]
    torch.stack(states).backward(upstream)
    rule = Transition(continues)
    for chunk in (4, 1, 5, 0, 2, 3):  # in any order
        torch.testing.assert_close(rule.incoming((matrices, finals), chunk), states[chunk].detach())
    for chunk in range(6):
        for got, leaf in zip(rule.summary_gradient(upstream, chunk), inputs, strict=True):
            torch.testing.assert_close(got, leaf.grad[chunk])


def test_a_shift_hands_tokens_to_the_next_chunk():
    sent = torch.randn(4, 2, 3)
    assert (
        torch.equal(Shift().incoming((sent,), 2), sent[1])
        and not Shift().incoming((sent,), 0).any()
    )
    (back,), (last,) = Shift().summary_gradient(sent, 1), Shift().summary_gradient(sent, 3)
    assert torch.equal(back, sent[2]) and not last.any()


def test_chunks_continue_where_the_document_goes_on():
    assert continuing_chunks(None, 3) is None
    found = continuing_chunks(document_ids((4,), (5,), length=12), 3)
    assert found.tolist() == [[False, False], [False, True], [True, True]]
