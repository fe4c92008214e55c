"""Lightning Attention in chunks, plain torch: matrix products inside a chunk, a decayed state between chunks.

Source: the recurrence of `naive.py`, unrolled over chunks of C tokens (arXiv 2405.17381 derives the same split). With i, j positions
inside a chunk and S the state before it:
    o_i = scale * [ sum_(j <= i) gamma^(i-j) (q_i k_j) v_j  +  gamma^(i+1) q_i S ]      S' = gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T
Only non-positive powers of the decay are exponentiated, so no length or slope overflows. Autograd differentiates it."""

import torch
from torch import Tensor


def chunked_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, initial_state: Tensor | None = None, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] -> o [b, t, h, v] in q's dtype, final state [b, h, k, v].

    Any t >= 1: a tail shorter than a chunk is one more, smaller chunk. Accumulates and returns the state in float32, in float64 for
    float64 inputs. Memory: about t * chunk_size numbers per head besides inputs and outputs."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, t, h, dk = q.shape
    state = q.new_zeros(b, h, dk, v.shape[-1], dtype=wide) if initial_state is None else initial_state.to(wide)
    decay = log_decay.to(q.device, wide)
    heads_first = (q.to(wide).transpose(1, 2) * scale, k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2))
    body = t - t % chunk_size
    outs = []
    for part, size in ((slice(0, body), chunk_size), (slice(body, t), t - body)):
        if part.start < part.stop:
            query, key, value = (x[:, :, part] for x in heads_first)
            o, state = _run_chunks(query, key, value, decay, state, size)
            outs.append(o)
    o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return o.transpose(1, 2).to(q.dtype), state


def _run_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks: q (scaled), k [b, h, n*size, k], v [b, h, n*size, v] -> o [b, h, n*size, v], final state."""
    b, h, t, _ = q.shape
    q, k, v = (x.reshape(b, h, t // size, size, x.shape[-1]) for x in (q, k, v))
    position = torch.arange(size, device=q.device, dtype=log_decay.dtype)
    distance = position[:, None] - position[None, :]
    inside = (log_decay[:, None, None] * distance.clamp(min=0)).exp().tril()[:, None]  # [h, 1, size, size]
    from_start = (log_decay[:, None] * (position + 1)).exp()[:, None, :, None]  # [h, 1, size, 1]
    to_end = (log_decay[:, None] * (size - 1 - position)).exp()[:, None, :, None]
    o = ((q @ k.transpose(-1, -2)) * inside) @ v
    own = (k * to_end).transpose(-1, -2) @ v  # what each chunk adds to the state: [b, h, n, k, v]
    whole = (log_decay * size).exp()[:, None, None]
    before = []
    for n in range(t // size):
        before.append(state)
        state = whole * state + own[:, :, n]
    o = o + (q * from_start) @ torch.stack(before, dim=2)
    return o.reshape(b, h, t, v.shape[-1]), state
