"""Causal softmax attention over a sequence that is split over ranks, by gathering keys and values
or by passing them round a ring.

Both compute the same blocks: own keys first, then those of other ranks, joined by log-sum-exps.
`all_gather` needs one collective each way, which arrives behind the own block, and memory for the
keys and values of the whole sequence (with grouped heads a small part of the activations); `ring`
keeps two ranks' worth."""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel.context.blocks import Block, attend, attend_backward, merge
from megatron_hypenet.parallel.context.documents import Documents
from megatron_hypenet.parallel.context.layout import (
    check_document_ids,
    chunks_of,
    local_chunk_tokens,
)
from megatron_hypenet.parallel.context.ring import ring_attention

Method = Literal["all_gather", "ring"]


def context_softmax_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup,
    document_ids: Tensor | None = None,
    method: Method = "all_gather",
) -> Tensor:
    """Return this rank's outputs of causal attention over the whole sequence: o [b, t_local, h, d]
    in q's dtype.

    q [b, t_local, h, d] and k, v [b, t_local, g, d] hold this rank's tokens as `split_sequence`
    gives them, already rotated by their global positions if at all; head i attends to group i // (h
    / g). document_ids [b, t_local * cp_size] covers the whole sequence in natural order, does not
    decrease along a row, and is the same on all ranks of `group`; tokens see their own document
    only. Sums run in fp32 (float64 for float64 inputs); flash attention's blocks leave it in q's
    dtype. Raises ValueError for an unknown method, an odd t_local over several ranks, groups that
    do not divide the heads, or document_ids of another shape."""
    size = group.size()
    _check(q, k, v, document_ids, method, size)
    if size == 1 and document_ids is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
    documents = None if document_ids is None else Documents(document_ids)
    if method == "ring" and size > 1:
        return ring_attention(q, k, v, scale=scale, group=group, documents=documents)
    return _GatheredAttention.apply(q, k, v, scale, group, documents)


class _GatheredAttention(torch.autograd.Function):
    """Own keys first, while those of the other ranks arrive; then the foreign keys that this rank's
    queries see. Only local tensors are kept: backward gathers again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        group: dist.ProcessGroup,
        documents: Documents | None,
    ) -> Tensor:
        gathering = _Gathering(k, v, group)
        how: Any = {"scale": scale, "documents": documents}
        out, log_sum = attend(q, k, v, _own_block(q.shape[1], group), **how)
        if gathering.parts:
            out = out.to(log_sum.dtype)
            log_sum = log_sum.contiguous()
            for part in gathering.parts:
                key, value = gathering.keys(part)
                found = attend(q[:, part.rows], key, value, part.block, **how)
                merge(out[:, part.rows], log_sum[:, :, part.rows], *found)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.how = how
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum = ctx.saved_tensors
        grad = grad.contiguous()
        gathering = _Gathering(k, v, ctx.group)
        dq, dk, dv = attend_backward(
            grad, q, k, v, out, log_sum, _own_block(q.shape[1], ctx.group), **ctx.how
        )
        if gathering.parts:
            if len(gathering.parts) > 1:  # one sum alone is rounded once in any dtype
                dq = dq.to(log_sum.dtype)
            foreign = []
            for part in gathering.parts:
                key, value = gathering.keys(part)
                rows = part.rows
                dq_part, *d_keys = attend_backward(
                    grad[:, rows],
                    q[:, rows],
                    key,
                    value,
                    out[:, rows],
                    log_sum[:, :, rows],
                    part.block,
                    **ctx.how,
                )
                dq[:, rows] += dq_part
                foreign.append(torch.stack(d_keys).chunk(len(part.chunks), dim=2))
            dk, dv = gathering.sum_gradients(torch.stack((dk, dv)), foreign)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Part(NamedTuple):
    """Foreign keys that some of this rank's queries see: local rows of the queries, the chunks that
    hold the keys, in natural order, and the block of the two."""

    rows: slice
    chunks: tuple[int, ...]
    block: Block


def _own_block(local_length: int, group: dist.ProcessGroup) -> Block:
    """Return a rank's own two chunks against each other: causal in local order. One rank has one
    chunk."""
    if group.size() == 1:
        whole = ((0, local_length),)
        return Block(whole, whole, causal=True)
    spans = tuple(
        _span(chunk, local_length // 2) for chunk in chunks_of(group.rank(), group.size())
    )
    return Block(spans, spans, causal=True)


def _span(chunk: int, tokens: int) -> tuple[int, int]:
    return (chunk * tokens, (chunk + 1) * tokens)


def _parts(local_length: int, rank: int, size: int) -> list[_Part]:
    """Return what each half of a rank's queries sees, in zigzag order: all queries of rank r see
    the chunks before r, and those of its late chunk, 2 * size - 1 - r, also the chunks between its
    two."""
    if size == 1:
        return []
    c = local_length // 2
    mine = tuple(_span(chunk, c) for chunk in chunks_of(rank, size))
    found = []
    for rows, queries, chunks in (
        (slice(None), mine, range(rank)),
        (slice(c, None), mine[1:], range(rank + 1, 2 * size - 1 - rank)),
    ):
        if chunks:
            keys = tuple(_span(chunk, c) for chunk in chunks)
            found.append(_Part(rows, tuple(chunks), Block(queries, keys, causal=False)))
    return found


class _Gathering:
    """Keys and values of all ranks on their way here, and the gradients on their way back."""

    def __init__(self, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.tokens = k.shape[1] // 2
        self.parts = _parts(k.shape[1], self.rank, self.size)
        self.work: Any = None
        if self.parts:
            # held until the collective is over
            self.mine = torch.stack((k, v))
            self.all = self.mine.new_empty(self.size, *self.mine.shape)
            self.work = dist.all_gather_into_tensor(
                self.all.view(-1), self.mine.view(-1), group=group, async_op=True
            )

    def keys(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Return the keys and values [b, n, g, d] of a part's chunks."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        chunks = []
        for chunk in part.chunks:
            late = chunk >= self.size
            owner = 2 * self.size - 1 - chunk if late else chunk
            chunks.append(self.all[owner].narrow(2, self.tokens if late else 0, self.tokens))
        found = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
        key, value = found.unbind(0)
        return key, value

    def sum_gradients(self, own: Tensor, foreign: list[tuple[Tensor, ...]]) -> Tensor:
        """Send the gradients of foreign keys and values to their owners and add what arrives to
        `own` [2, b, t_local, g, d].

        `foreign`: for each part, [2, b, c, g, d] of each of its chunks. They travel in the dtype in
        which the kernels gave them and are summed in fp32 or wider."""
        computed = {
            chunk: gradient
            for part, gradients in zip(self.parts, foreign, strict=True)
            for chunk, gradient in zip(part.chunks, gradients, strict=True)
        }
        sent, to, expected = [], [], []
        for peer in range(self.size):
            chunks = [chunk for chunk in chunks_of(peer, self.size) if chunk in computed]
            sent += [computed[chunk] for chunk in chunks]
            to.append(len(chunks))
            # a lower rank computes with both chunks of this one, a higher one with the early chunk
            expected.append(0 if peer == self.rank else 2 if peer < self.rank else 1)
        leaving = torch.stack(sent)
        arriving = leaving.new_empty(sum(expected), *leaving.shape[1:])
        dist.all_to_all_single(arriving, leaving, expected, to, group=self.group)
        total = own.to(accumulation_dtype(own.dtype))
        early, late = total.chunk(2, dim=2)
        units = iter(arriving.unbind(0))
        for count in expected:
            for half in (early, late)[:count]:
                half += next(units)
        return total


def _check(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, method: str, size: int
) -> None:
    if method not in get_args(Method):
        raise ValueError(
            f"context-parallel method {method!r}: known are {', '.join(get_args(Method))}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value groups evenly"
        )
    assert k.shape == v.shape and q.shape[:2] == k.shape[:2], (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    )
    if size > 1:
        local_chunk_tokens(q.shape[1], size)
    check_document_ids(document_ids, q.shape[0], q.shape[1] * size)
