"""Ring attention in zigzag layout: keys and values are passed from rank to rank while each of them
computes (arXiv 2310.01889).

At step s rank r holds the keys and values of rank r - s. In the order of the text its own two
chunks are r and 2 * cp_size - 1 - r, so
    own keys:               all local queries, causal in local order
    keys of a lower rank:   all local queries see that rank's early chunk, none sees its late one
    keys of a higher rank:  the queries of the late chunk see both chunks, those of the early one
                            see none
so every step after the first costs half a block on every rank. Blocks are joined by their
log-sum-exps in fp32 or wider. In backward keys and values go round again, followed one step behind
by their gradients, which end on the rank that owns them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.parallel.context.blocks import Block, attend, attend_backward, merge
from megatron_hypenet.parallel.context.documents import Documents
from megatron_hypenet.parallel.context.layout import chunks_of


class Step(NamedTuple):
    """One block of the ring: local queries, and the received keys that they attend to."""

    queries: slice
    keys: slice
    block: Block


def ring_step(rank: int, source: int, size: int, chunk_tokens: int) -> Step:
    """Return the block that `rank` computes with the keys and values of `source`."""

    def spans(owner: int) -> list[tuple[int, int]]:
        return [
            (chunk * chunk_tokens, (chunk + 1) * chunk_tokens) for chunk in chunks_of(owner, size)
        ]

    mine, theirs = spans(rank), spans(source)
    early = slice(0, chunk_tokens)
    late = slice(chunk_tokens, None)
    both = slice(None)
    if source == rank:
        return Step(both, both, Block(tuple(mine), tuple(mine), causal=True))
    if source < rank:
        return Step(both, early, Block(tuple(mine), (theirs[0],), causal=False))
    return Step(late, both, Block((mine[1],), tuple(theirs), causal=False))


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup,
    documents: Documents | None,
) -> Tensor:
    """q [b, t_local, h, d], k, v [b, t_local, g, d] of this rank -> o like q; keeps only local
    tensors for backward."""
    return _RingAttention.apply(q, k, v, scale, group, documents)


class _RingAttention(torch.autograd.Function):
    """Per hop: pass on, compute, join."""

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
        size, rank = group.size(), group.rank()
        visiting = torch.stack((k, v))
        for hop in range(size):
            arriving = _Hop(visiting, group) if hop + 1 < size else None
            queries, keys, block = ring_step(rank, (rank - hop) % size, size, q.shape[1] // 2)
            part, sums = attend(
                q[:, queries],
                visiting[0][:, keys],
                visiting[1][:, keys],
                block,
                scale=scale,
                documents=documents,
            )
            if hop == 0:
                o = part.to(sums.dtype)
                log_sum = sums.contiguous()
            else:
                merge(o[:, queries], log_sum[:, :, queries], part, sums)
            if arriving is not None:
                visiting = arriving.wait()
        out = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        ctx.group = group
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, log_sum = ctx.saved_tensors
        grad = grad.contiguous()
        size, rank = ctx.group.size(), ctx.group.rank()
        visiting = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=log_sum.dtype)
        following: _Hop | None = None
        for hop in range(size):
            arriving = _Hop(visiting, ctx.group) if hop + 1 < size else None
            queries, keys, block = ring_step(rank, (rank - hop) % size, size, q.shape[1] // 2)
            dq_part, *dkv_part = attend_backward(
                grad[:, queries],
                q[:, queries],
                visiting[0][:, keys],
                visiting[1][:, keys],
                o[:, queries],
                log_sum[:, :, queries],
                block,
                scale=ctx.scale,
                documents=ctx.documents,
            )
            dq[:, queries] += dq_part
            d_visiting = (
                torch.zeros_like(visiting, dtype=log_sum.dtype)
                if following is None
                else following.wait()
            )
            for total, part in zip(d_visiting, dkv_part, strict=True):
                total[:, keys] += part
            following = _Hop(d_visiting, ctx.group)
            if arriving is not None:
                visiting = arriving.wait()
        assert following is not None, "a ring has at least one rank"
        dk, dv = following.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Hop:
    """Send a tensor to the next rank while the one of the previous rank arrives; both buffers are
    held until `wait`."""

    def __init__(self, leaving: Tensor, group: dist.ProcessGroup) -> None:
        size, rank = group.size(), group.rank()
        self.leaving = leaving
        self.arriving = torch.empty_like(leaving)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        sends = [
            dist.P2POp(dist.isend, self.leaving, after, group),
            dist.P2POp(dist.irecv, self.arriving, before, group),
        ]
        self.works = dist.batch_isend_irecv(sends)

    def wait(self) -> Tensor:
        """Return the tensor of the previous rank."""
        for work in self.works:
            work.wait()
        return self.arriving
