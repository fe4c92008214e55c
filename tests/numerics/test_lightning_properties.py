"""Lightning Attention over random lengths, head counts (also not powers of two), widths and chunk
sizes, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import (
    chunked_lightning_attn,
    naive_lightning_attn,
)

SHAPES = {
    "t": st.integers(1, 90),
    "h": st.integers(1, 12),
    "dk": st.integers(1, 9),
    "dv": st.integers(1, 9),
    "chunk": st.sampled_from([1, 3, 16, 64]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_chunked_equals_naive(t, h, dk, dv, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, t, h, d, generator=generator, dtype=torch.float64) for d in (dk, dk, dv)
    )
    want, want_state = naive_lightning_attn(q, k, v, log_decay(h), scale=dk**-0.5)
    got, got_state = chunked_lightning_attn(q, k, v, log_decay(h), scale=dk**-0.5, chunk_size=chunk)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got_state, want_state, rtol=1e-9, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(**SHAPES, cut=st.integers(0, 90))
def test_prefill_in_chunks_then_decode_equals_the_whole(t, h, dk, dv, chunk, seed, cut):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, t, h, d, generator=generator, dtype=torch.float64) for d in (dk, dk, dv)
    )
    want, _ = naive_lightning_attn(q, k, v, log_decay(h), scale=1.0)
    cut = min(cut, t - 1)
    state = torch.zeros(1, h, dk, dv, dtype=torch.float64)
    if cut:
        _, state = chunked_lightning_attn(
            q[:, :cut], k[:, :cut], v[:, :cut], log_decay(h), scale=1.0, chunk_size=chunk
        )
    for i in range(cut, t):
        one = slice(i, i + 1)
        o, state = chunked_lightning_attn(
            q[:, one], k[:, one], v[:, one], log_decay(h), scale=1.0, initial_state=state
        )
        torch.testing.assert_close(o, want[:, one], rtol=1e-9, atol=1e-11)


def test_a_decay_off_by_a_thousandth_is_caught():
    q, k, v = torch.randn(3, 1, 64, 4, 8, dtype=torch.float64).unbind(0)
    want, _ = naive_lightning_attn(q, k, v, log_decay(4), scale=1.0)
    wrong, _ = chunked_lightning_attn(q, k, v, log_decay(4) * 1.001, scale=1.0)
    assert not torch.allclose(wrong, want, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(**SHAPES, edges=st.sets(st.integers(1, 89), max_size=6), cut=st.integers(1, 89))
def test_packed_documents_equal_the_definition_and_can_be_cut_anywhere(
    t, h, dk, dv, chunk, seed, edges, cut
):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, t, h, d, generator=generator, dtype=torch.float64) for d in (dk, dk, dv)
    )
    ids = torch.tensor([[sum(edge <= i for edge in edges) for i in range(t)]], dtype=torch.int32)
    start = torch.randn(1, h, dk, dv, generator=generator, dtype=torch.float64)
    want, want_state = naive_lightning_attn(
        q, k, v, log_decay(h), scale=1.0, initial_state=start, document_ids=ids
    )
    parts = []
    state = start
    for part in (slice(0, min(cut, t)), slice(min(cut, t), t)):
        if part.start < part.stop:
            # a part that starts a new document gets no state from the one before it
            fresh = part.start > 0 and bool(ids[0, part.start] != ids[0, part.start - 1])
            o, state = chunked_lightning_attn(
                q[:, part],
                k[:, part],
                v[:, part],
                log_decay(h),
                scale=1.0,
                chunk_size=chunk,
                initial_state=torch.zeros_like(state) if fresh else state,
                document_ids=ids[:, part],
            )
            parts.append(o)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, want_state, rtol=1e-9, atol=1e-11)
