"""Lightning Attention in chunks, plain torch: matrix products inside a chunk, a decayed state
between chunks.

Source: the recurrence of `naive.py`, unrolled over chunks of C tokens (arXiv 2405.17381 derives the
same split). With i, j positions inside a chunk and S the state before it:
    o_i = scale * [ sum_(j <= i) gamma^(i-j) (q_i k_j) v_j  +  gamma^(i+1) q_i S ]
    S'  = gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T
Packed documents mask the same sums by equal id: S belongs to the document of the token just before
the chunk. Only non-positive powers of the decay are exponentiated, so no length or slope overflows.
Autograd differentiates it."""

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype


def chunked_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] -> o [b, t, h, v] in q's dtype, final state
    [b, h, k, v].

    `document_ids` [b, t] as in `naive.py`. Any t >= 1: a tail shorter than a chunk is one more,
    smaller chunk. Accumulates and returns the state in float32, in float64 for float64 inputs.
    Memory: about t * chunk_size elements per head besides inputs and outputs."""
    accumulation = accumulation_dtype(q.dtype)
    b, t, h, dk = q.shape
    state = (
        q.new_zeros(b, h, dk, v.shape[-1], dtype=accumulation)
        if initial_state is None
        else initial_state.to(accumulation)
    )
    decay = log_decay.to(q.device, accumulation)
    heads_first = (
        q.to(accumulation).transpose(1, 2) * scale,
        k.to(accumulation).transpose(1, 2),
        v.to(accumulation).transpose(1, 2),
    )
    before = None if document_ids is None else document_ids[:, 0]
    outs = []
    for part, size in _parts(t, chunk_size):
        query, key, value = (x[:, :, part] for x in heads_first)
        masks = (
            None
            if document_ids is None or before is None
            else _DocumentMasks(document_ids[:, part], before, size)
        )
        o, state = _run_chunks(query, key, value, decay, state, size, masks)
        outs.append(o)
        before = None if document_ids is None else document_ids[:, part.stop - 1]
    o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return o.transpose(1, 2).to(q.dtype), state


def chunked_lightning_state(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    document_ids: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Return the final state alone, from a zero state: k [b, t, h, k], v [b, t, h, v] -> [b, h, k,
    v], dtypes as above."""
    accumulation = accumulation_dtype(k.dtype)
    b, t, h, dk = k.shape
    state = k.new_zeros(b, h, dk, v.shape[-1], dtype=accumulation)
    decay = log_decay.to(k.device, accumulation)
    key, value = k.to(accumulation).transpose(1, 2), v.to(accumulation).transpose(1, 2)
    before = None if document_ids is None else document_ids[:, 0]
    for part, size in _parts(t, chunk_size):
        masks = (
            None
            if document_ids is None or before is None
            else _DocumentMasks(document_ids[:, part], before, size)
        )
        _, state = _chunk_states(
            _split(key[:, :, part], size), _split(value[:, :, part], size), decay, state, masks
        )
        before = None if document_ids is None else document_ids[:, part.stop - 1]
    return state


class _DocumentMasks:
    """Masks of the terms of the chunk sums that stay inside one document, for `n` chunks: ids [b,
    n*size], `before` [b] the id the state belongs to."""

    def __init__(self, ids: Tensor, before: Tensor, size: int) -> None:
        chunks = ids.unflatten(1, (-1, size))
        last = chunks[:, :, -1]
        # document of the state that enters each chunk
        owner = torch.cat((before[:, None], last[:, :-1]), dim=1)
        # [b, 1, n, size, size]
        self.pairs = (chunks[..., :, None] == chunks[..., None, :])[:, None]
        self.sees_state = (chunks == owner[..., None])[:, None, :, :, None]  # [b, 1, n, size, 1]
        self.in_last = (chunks == last[..., None])[:, None, :, :, None]
        self.keeps_state = (owner == last)[:, None, :, None, None]  # [b, 1, n, 1, 1]


def _parts(t: int, chunk_size: int) -> list[tuple[slice, int]]:
    """Return the whole chunks of a sequence and then its shorter tail, each as (tokens, chunk
    size)."""
    body = t - t % chunk_size
    return [
        (part, size)
        for part, size in ((slice(0, body), chunk_size), (slice(body, t), t - body))
        if part.start < part.stop
    ]


def _split(x: Tensor, size: int) -> Tensor:
    return x.unflatten(2, (-1, size))


def _chunk_states(
    k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, masks: _DocumentMasks | None
) -> tuple[Tensor, Tensor]:
    """k [b, h, n, size, k], v [b, h, n, size, v] -> states before each chunk [b, h, n, k, v], final
    state."""
    size = k.shape[3]
    position = torch.arange(size, device=k.device, dtype=log_decay.dtype)
    to_end = (log_decay[:, None] * (size - 1 - position)).exp()[:, None, :, None]
    keep = (log_decay * size).exp()[:, None, None, None]
    if masks is not None:
        to_end, keep = to_end * masks.in_last, keep * masks.keeps_state
    own = (k * to_end).transpose(-1, -2) @ v  # what each chunk adds to the state: [b, h, n, k, v]
    before = []
    for n in range(k.shape[2]):
        before.append(state)
        state = (keep if masks is None else keep[:, :, n : n + 1])[..., 0, :, :] * state + own[
            :, :, n
        ]
    return torch.stack(before, dim=2), state


def _run_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    size: int,
    masks: _DocumentMasks | None,
) -> tuple[Tensor, Tensor]:
    """Compute whole chunks: q (scaled), k [b, h, n*size, k], v [b, h, n*size, v] -> o [b, h,
    n*size, v], final state."""
    q, k, v = (_split(x, size) for x in (q, k, v))
    position = torch.arange(size, device=q.device, dtype=log_decay.dtype)
    distance = position[:, None] - position[None, :]
    # [h, 1, size, size]
    inside = (log_decay[:, None, None] * distance.clamp(min=0)).exp().tril()[:, None]
    from_start = (log_decay[:, None] * (position + 1)).exp()[:, None, :, None]  # [h, 1, size, 1]
    if masks is not None:
        inside, from_start = inside * masks.pairs, from_start * masks.sees_state
    before, state = _chunk_states(k, v, log_decay, state, masks)
    o = ((q @ k.transpose(-1, -2)) * inside) @ v + (q * from_start) @ before
    return o.flatten(2, 3), state
