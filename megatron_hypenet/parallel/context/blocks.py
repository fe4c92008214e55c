"""Softmax attention of some queries to some keys, with the log-sum-exp that joins blocks: pure
tensor functions.

A block says which positions of the whole sequence its queries and keys hold. `attend` picks cuDNN's
kernel where it can run (CUDA, bf16 or fp16, no packed documents), then torch's flash kernel, and
elsewhere plain torch, in fp32 or wider, a tile of queries at a time, so that memory grows linearly
with the keys. Shapes: b batch, m queries, n keys, h heads, g key/value groups, d head_dim; no
kernel repeats k or v for the heads of a group."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel.context import cudnn, flash
from megatron_hypenet.parallel.context.documents import Documents, Span

TILE_QUERIES = 256


@dataclass(frozen=True)
class Block:
    """Positions [start, stop) of queries and keys, in the order in which the tensors hold them.

    `causal`: the last query is the last key, and earlier ones count back from there (bottom-right
    alignment; the is_causal switch of torch's scaled_dot_product_attention is aligned top-left).
    Otherwise all keys lie before all queries."""

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    causal: bool


def attend(
    q: Tensor, k: Tensor, v: Tensor, block: Block, *, scale: float, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """q [b, m, h, d], k, v [b, n, g, d] -> o [b, m, h, d] (q's dtype or wider), log-sum-exp of the
    scaled scores [b, h, m] (fp32 or wider).

    A query sees the keys of its own document. One that sees none has o = 0 and log-sum-exp -inf."""
    if documents is None and cudnn.supports(q, k, causal=block.causal):
        return cudnn.forward(q, k, v, causal=block.causal, scale=scale)
    if flash.supports(q, documents):
        return flash.forward(
            q,
            k,
            v,
            block.queries,
            block.keys,
            causal=block.causal,
            scale=scale,
            documents=documents,
        )
    accumulation = accumulation_dtype(q.dtype)
    heads = _Heads(q, k)
    key, value = (x.to(accumulation).transpose(1, 2) for x in (k, v))  # [b, g, n, d]
    outs, sums = [], []
    for rows, seen in _tiles(q.shape[1], k.shape[1], block.causal):
        scores = heads.fold(q[:, rows].to(accumulation) * scale) @ key[:, :, :seen].transpose(
            -1, -2
        )
        scores = _hide(scores, heads, rows, k.shape[1] - q.shape[1], block, documents)
        # finite for a query that sees no key
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(accumulation).min)
        p = (scores - top).exp_()
        total = p.sum(-1, keepdim=True)
        outs.append(
            heads.unfold((p @ value[:, :, :seen]) / total.clamp(min=torch.finfo(accumulation).tiny))
        )
        sums.append(
            (top + total.log()).squeeze(-1).unflatten(2, (heads.per_group, -1)).flatten(1, 2)
        )
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log_sum: Tensor,
    block: Block,
    *,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients dq [b, m, h, d], dk, dv [b, n, g, d] of one block, in q's dtype or wider.

    o [b, m, h, d] and log_sum [b, h, m] are those of all blocks of these queries together: with
    them each block's part is exact."""
    if documents is None and cudnn.supports(q, k, causal=block.causal):
        return cudnn.backward(grad, q, k, v, o, log_sum, causal=block.causal, scale=scale)
    if flash.supports(q, documents):
        return flash.backward(
            grad,
            q,
            k,
            v,
            o,
            log_sum,
            block.queries,
            block.keys,
            causal=block.causal,
            scale=scale,
            documents=documents,
        )
    accumulation = accumulation_dtype(q.dtype)
    heads = _Heads(q, k)
    key, value = (x.to(accumulation).transpose(1, 2) for x in (k, v))
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    dq = []
    for rows, seen in _tiles(q.shape[1], k.shape[1], block.causal):
        query = heads.fold(q[:, rows].to(accumulation) * scale)
        d_out = heads.fold(grad[:, rows].to(accumulation))
        scores = _hide(
            query @ key[:, :, :seen].transpose(-1, -2),
            heads,
            rows,
            k.shape[1] - q.shape[1],
            block,
            documents,
        )
        p = (
            scores
            - log_sum[:, :, rows]
            .to(accumulation)
            .unflatten(1, (-1, heads.per_group))
            .flatten(2, 3)[..., None]
        ).exp_()
        dv[:, :, :seen] += p.transpose(-1, -2) @ d_out
        delta = (d_out * heads.fold(o[:, rows].to(accumulation))).sum(-1, keepdim=True)
        d_scores = p * (d_out @ value[:, :, :seen].transpose(-1, -2) - delta)
        dq.append(heads.unfold(d_scores @ key[:, :, :seen]) * scale)
        dk[:, :, :seen] += d_scores.transpose(-1, -2) @ query  # query carries the scale
    return torch.cat(dq, dim=1), dk.transpose(1, 2), dv.transpose(1, 2)


def merge(o: Tensor, log_sum: Tensor, o_block: Tensor, log_sum_block: Tensor) -> None:
    """Join another block of keys into o [b, m, h, d] and log_sum [b, h, m], in place; log_sum is
    finite, that of the block may be -inf."""
    total = torch.logaddexp(log_sum, log_sum_block)
    weight = (log_sum_block - total).exp().transpose(1, 2)[..., None]
    o.lerp_(o_block.to(o.dtype), weight.to(o.dtype))
    log_sum.copy_(total)


class _Heads:
    """Query heads of a group as more rows of one product: [b, rows, h, d] <-> [b, g, (h / g) *
    rows, d]."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.groups = k.shape[2]
        self.per_group = q.shape[2] // self.groups

    def fold(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.groups, self.per_group)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unfold(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.per_group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _tiles(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Yield the rows of each tile of queries, and how many keys the tile's last query can see."""
    for start in range(0, queries, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, queries)
        yield slice(start, stop), stop + keys - queries if causal else keys


def _hide(
    scores: Tensor,
    heads: _Heads,
    rows: slice,
    shift: int,
    block: Block,
    documents: Documents | None,
) -> Tensor:
    """Mask scores [b, g, r * rows, seen] with -inf where a query may not attend; `shift` keys come
    before the first query."""
    seen = scores.shape[-1]
    hidden = None
    if block.causal:
        position = torch.arange(rows.start, rows.stop, device=scores.device) + shift
        # [1, rows, seen]
        hidden = (torch.arange(seen, device=scores.device) > position[:, None])[None]
    if documents is not None:
        own = documents.ids_at(block.queries)[:, rows]
        other = documents.ids_at(block.keys)[:, :seen]
        elsewhere = own[:, :, None] != other[:, None, :]
        hidden = elsewhere if hidden is None else hidden | elsewhere
    if hidden is None:
        return scores
    split = scores.unflatten(2, (heads.per_group, -1))
    return split.masked_fill_(hidden[:, None, None], -torch.inf).flatten(2, 3)
