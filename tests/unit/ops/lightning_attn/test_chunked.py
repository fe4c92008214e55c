import pytest
import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import (
    chunked_lightning_attn,
    chunked_lightning_state,
    naive_lightning_attn,
)


def run(op, t, h=3, **kwargs):
    """Return outputs and gradients by name, from the same random numbers for every op."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q = draw(2, t, h, 4)
    k = draw(2, t, h, 4)
    v = draw(2, t, h, 6)
    state = draw(2, h, 4, 6)
    o, final = op(q, k, v, log_decay(h), scale=0.5, initial_state=state, **kwargs)
    weights = torch.linspace(0.1, 1.0, o.numel(), dtype=torch.float64).view_as(o)
    ((o * weights).sum() + final.square().sum()).backward()
    return {"o": o, "state": final, "dq": q.grad, "dk": k.grad, "dv": v.grad, "dstate": state.grad}


# odd lengths catch chunk-edge faults
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 63, 64, 65, 100])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_matches_the_definition_in_float64_with_all_gradients(t, chunk_size):
    want = run(naive_lightning_attn, t)
    got = run(chunked_lightning_attn, t, chunk_size=chunk_size)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def ids_of(*rows):
    """Make document_ids from the lengths of the documents of each row."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    ).int()


PACKED = {
    "inside a chunk": ids_of([5, 3, 12, 30], [20, 1, 1, 28]),
    "on chunk edges": ids_of([16, 16, 18], [32, 16, 2]),
    "one row whole": ids_of([50], [1, 49]),
    "every token its own": ids_of([1] * 50, [25, 25]),
}


@pytest.mark.parametrize("ids", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_packed_documents_match_the_definition_with_all_gradients(ids, chunk_size):
    want = run(naive_lightning_attn, 50, document_ids=ids)
    got = run(chunked_lightning_attn, 50, document_ids=ids, chunk_size=chunk_size)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("ids", [None, *PACKED.values()])
def test_the_state_alone_is_the_final_state(ids):
    k, v = torch.randn(2, 50, 3, 4).double(), torch.randn(2, 50, 3, 6).double()
    _, want = naive_lightning_attn(k, k, v, log_decay(3), scale=1.0, document_ids=ids)
    got = chunked_lightning_state(k, v, log_decay(3), document_ids=ids, chunk_size=16)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_strong_decay_over_a_long_sequence_stays_finite():
    q = torch.randn(1, 1500, 16, 4)
    o, state = chunked_lightning_attn(q, q, q, log_decay(16), scale=1.0)
    assert torch.isfinite(o).all() and torch.isfinite(state).all()


def test_bf16_in_bf16_out_with_an_fp32_state():
    q = torch.randn(1, 70, 2, 8).bfloat16()
    o, state = chunked_lightning_attn(q, q, q, log_decay(2), scale=1.0)
    want, _ = naive_lightning_attn(q.double(), q.double(), q.double(), log_decay(2), scale=1.0)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    # one bf16 rounding of q * scale and of the output, relative to the largest value
    assert (o.double() - want).abs().max() / want.abs().max() < 2**-7
