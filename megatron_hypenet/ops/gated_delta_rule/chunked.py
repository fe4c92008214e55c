"""The gated delta rule in chunks, plain torch: triangular solves inside a chunk, one matrix per
chunk between chunks.

Source: the recurrence of `naive.py`, unrolled over a chunk of C tokens as in arXiv 2406.06484 (the
UT transform) with decays as in arXiv 2412.06464. With G_i the sum of log decays of the chunk's
tokens up to i, S the state before the chunk, and u_i the value that token i writes:
    A_ij = sum_c k_ic exp(G_ic - G_jc) k_jc  (j < i)
    P_ij = sum_c q_ic exp(G_ic - G_jc) k_jc  (j <= i)
    (I + diag(beta) A) [W, Y] = diag(beta) [V, K exp(G)]     u = W - Y S
    o = scale * ( (Q exp(G)) S + P u )     S_out = M S + B
    M = diag(exp(G_C)) - (K exp(G_C - G))^T Y     B = (K exp(G_C - G))^T W
Only sums of log decays over stretches of tokens are exponentiated, which are <= 0: nothing
overflows, however strong the decay. Packed documents mask the same sums by equal id. Autograd
differentiates it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.ops.gated_delta_rule.naive import per_channel

CHUNK_TOKENS = 64
CHUNK_TOKENS_PER_CHANNEL = 16
"""With a decay per channel all pairs of a chunk's tokens are kept for every channel, so chunks are
short: C elements per element of q."""


def chunked_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs [b, t, h, v] in q's dtype and the final state [b, h, k, v]; arguments as in
    `naive_gated_delta_rule`.

    Any t >= 1: the last chunk is filled up with tokens that change nothing. Accumulates and returns
    the state in float32, in float64 for float64 inputs. `chunk_size`: tokens of a chunk."""
    chunks = _Chunks.of(q, k, v, log_decay, beta, document_ids, chunk_size)
    state = chunks.zeros if initial_state is None else initial_state.to(chunks.zeros.dtype)
    before = []
    for transition, written in zip(chunks.transition, chunks.written, strict=True):
        before.append(state)
        state = transition @ state + written
    entering = torch.stack(before)  # [n, b, h, k, v]
    values = chunks.values - chunks.reads @ entering
    o = scale * (chunks.queries @ entering + chunks.pairs @ values)  # [n, b, h, C, v]
    o = o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : q.shape[1]]
    return o.to(q.dtype), state


def chunked_gated_delta_summary(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    document_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the effect of all tokens on a state, S_out = M S + B: the transition M [b, h, k, k]
    and the state from zero B [b, h, k, v], in the accumulation dtype.

    Arguments as in `chunked_gated_delta_rule`. With documents S is that of the first token's
    document: M is zero where another document follows in the row."""
    chunks = _Chunks.of(k, k, v, log_decay, beta, document_ids, chunk_size)
    dk = k.shape[-1]
    total = torch.eye(dk, dtype=chunks.zeros.dtype, device=k.device).expand(
        *chunks.zeros.shape[:2], dk, dk
    )
    state = chunks.zeros
    for transition, written in zip(chunks.transition, chunks.written, strict=True):
        total = transition @ total
        state = transition @ state + written
    return total, state


class _Chunks(NamedTuple):
    """The matrices of every chunk that do not depend on its state; n chunks first: [n, b, h,
    ...]."""

    queries: Tensor
    """Q exp(G), zero where the entering state is another document's: [.., C, k]."""
    pairs: Tensor
    """P: [.., C, C]."""
    reads: Tensor
    """Y: [.., C, k]."""
    values: Tensor
    """W: [.., C, v]."""
    transition: Tensor
    """M: [.., k, k]."""
    written: Tensor
    """B: [.., k, v]."""
    zeros: Tensor
    """A state of zeros [b, h, k, v]."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        document_ids: Tensor | None,
        chunk_size: int | None,
    ) -> _Chunks:
        """Cut tokens into chunks, the last one filled up, and solve inside of each."""
        dtype = accumulation_dtype(q.dtype)
        per_head = log_decay.dim() == 3
        size = chunk_size or (CHUNK_TOKENS if per_head else CHUNK_TOKENS_PER_CHANNEL)
        size = min(size, q.shape[1])
        q, k, v, log_decay = (_split(x.to(dtype), size) for x in (q, k, v, per_channel(log_decay)))
        beta = _split(beta.to(dtype)[..., None], size)  # [n, b, h, C, 1]
        sums = log_decay.cumsum(3)  # G: [n, b, h, C, k or 1]
        pair_decay = _pair_decays(log_decay)
        masks = None if document_ids is None else _Masks.of(document_ids, size)
        from_start = sums.exp()
        after = torch.nn.functional.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
        to_end = after.flip(3).cumsum(3).flip(3).exp()
        keep = sums[..., -1, :].exp().expand(*k.shape[:3], k.shape[-1])
        if masks is not None:
            from_start = from_start * masks.sees_state
            to_end = to_end * masks.in_last
            keep = keep * masks.keeps_state
        inner = _pair_products(k, k, pair_decay, masks).tril(-1)
        pairs = _pair_products(q, k, pair_decay, masks)
        system = beta * inner + torch.eye(size, dtype=dtype, device=k.device)
        wanted = beta * torch.cat([v, k * from_start], dim=-1)
        solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        leaving = (k * to_end).transpose(-1, -2)  # [n, b, h, k, C]
        return cls(
            queries=q * from_start,
            pairs=pairs,
            reads=reads,
            values=values,
            transition=torch.diag_embed(keep) - leaving @ reads,
            written=leaving @ values,
            zeros=k.new_zeros(*k.shape[1:3], k.shape[-1], v.shape[-1]),
        )


class _Masks(NamedTuple):
    """Masks of the terms of a chunk's sums that stay inside one document, [n, b, 1, ...]. A state
    belongs to the document of the token just before the chunk; the first one to that of the row's
    first token."""

    pairs: Tensor
    sees_state: Tensor
    in_last: Tensor
    keeps_state: Tensor

    @classmethod
    def of(cls, document_ids: Tensor, size: int) -> _Masks:
        """document_ids [b, t] -> the masks of chunks of `size` tokens."""
        fill = -document_ids.shape[1] % size
        filled = torch.cat([document_ids, document_ids[:, -1:].expand(-1, fill)], dim=1)
        ids = filled.unflatten(1, (-1, size)).transpose(0, 1)  # [n, b, C]
        last = ids[:, :, -1]
        owner = torch.cat([document_ids[None, :, 0], last[:-1]])  # [n, b]
        return cls(
            pairs=(ids[..., :, None] == ids[..., None, :])[:, :, None],
            sees_state=(ids == owner[..., None])[:, :, None, :, None],
            in_last=(ids == last[..., None])[:, :, None, :, None],
            keeps_state=(owner == last)[:, :, None, None],
        )


def _split(x: Tensor, size: int) -> Tensor:
    """[b, t, h, c] -> [n, b, h, size, c], filled up with zeros: tokens without key, value, write
    and decay."""
    fill = -x.shape[1] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, fill))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def _pair_decays(log_decay: Tensor) -> Tensor:
    """Compute exp(sum of log decays of the tokens after j up to i) for j <= i, else 0: [.., C, k or
    1] -> [.., C, C, k or 1].

    Every pair has a sum of its own: a difference of two running sums would lose the digits of weak
    decays that follow a strong one."""
    size = log_decay.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    later = log_decay[..., :, None, :].masked_fill(~ones.tril(-1)[..., None], 0.0)
    return later.cumsum(-3).masked_fill(ones.triu(1)[..., None], -torch.inf).exp()


def _pair_products(left: Tensor, right: Tensor, decay: Tensor, masks: _Masks | None) -> Tensor:
    """Compute sum_c left_ic exp(G_ic - G_jc) right_jc for j <= i, else 0: [.., C, k] each -> [..,
    C, C]."""
    if decay.shape[-1] == 1:
        found = (left @ right.transpose(-1, -2)) * decay[..., 0]
    else:
        found = torch.einsum("...ic,...ijc,...jc->...ij", left, decay, right)
    return found if masks is None else found * masks.pairs
