"""Lightning Attention over a sequence that is split over ranks: one all-gather of states each way, whatever the length.

Each rank scans its two chunks from zero states, side by side in the batch dimension of one call, and sends their final states to
everybody; `state_algebra` turns those into the states that enter its chunks and adds what they contribute. The final states come first
and alone (they read k and v only), so the all-gather runs while the local scan works. In backward the gradients of the incoming states
travel while the local scan differentiates, then become gradients of the final states (the idea of LASP-2, arXiv 2502.07563; zigzag
layout, decays and documents are ours)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.ops.lightning_attn import lightning_attn, lightning_state
from megatron_hypenet.parallel.context.layout import check_document_ids, chunks_of, local_chunk_tokens, local_part
from megatron_hypenet.parallel.context.state_algebra import (
    add_incoming,
    carry_weights,
    final_state_gradient,
    incoming_state,
    read_factor,
)


def context_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup,
    document_ids: Tensor | None = None,
) -> Tensor:
    """This rank's outputs of causal Lightning Attention over the whole sequence: o [b, t_local, h, v] in q's dtype.

    q, k [b, t_local, h, k] and v [b, t_local, h, v] hold this rank's tokens as `split_sequence` gives them, already rotated by their
    global positions; log_decay [h] belongs to the heads at hand. document_ids [b, t_local * cp_size] covers the whole sequence in natural
    order, does not decrease along a row, and is the same on all ranks of `group`; the state restarts where it changes.
    States are exchanged in fp32 (float64 for float64 inputs). Raises ValueError when t_local is odd or document_ids has another shape."""
    check_document_ids(document_ids, q.shape[0], q.shape[1] * group.size())
    if group.size() == 1:
        return lightning_attn(q, k, v, log_decay, scale=scale, document_ids=document_ids)[0]
    c = local_chunk_tokens(q.shape[1], group.size())
    b, decay = q.shape[0], log_decay.to(q.device)
    q, k, v = (x.unflatten(1, (2, c)).flatten(0, 1) for x in (q, k, v))  # [2b, c, h, .]: row 2i + j is chunk j of sequence i
    ids = None
    if document_ids is not None:
        ids = local_part(document_ids, group.rank(), group.size(), 1).unflatten(1, (2, c)).flatten(0, 1)
    exchange = _StateExchange(group, carry_weights(decay, c, 2 * group.size(), document_ids))
    states = lightning_state(k, v, decay, document_ids=ids)
    started = _StartExchange.apply(states, exchange)
    o, _ = lightning_attn(q, k, v, decay, scale=scale, document_ids=ids)
    incoming = _FinishExchange.apply(started, exchange)
    o = add_incoming(o, q, incoming, read_factor(decay, scale, c, ids))
    return o.unflatten(0, (b, 2)).flatten(1, 2)


def exchanged_bytes(batch: int, heads: int, key_dim: int, value_dim: int, cp_size: int, itemsize: int = 4) -> int:
    """Bytes a rank receives from the others in one exchange, forward or backward: two states per rank, no matter how long they are."""
    return (cp_size - 1) * 2 * batch * heads * key_dim * value_dim * itemsize


@dataclass
class _StateExchange:
    """One all-gather in flight, forward or backward; holds its buffers until it is waited for."""

    group: dist.ProcessGroup
    weights: Tensor
    work: Any = None
    buffers: tuple[Tensor, ...] = field(default=())

    def start(self, mine: Tensor) -> None:
        """Send the states [2b, h, k, v] of this rank's chunks to all."""
        mine = mine.contiguous()
        everyone = mine.new_empty(self.group.size(), *mine.shape)
        self.buffers = (mine, everyone)
        self.work = dist.all_gather_into_tensor(everyone.view(-1), mine.view(-1), group=self.group, async_op=True)

    def finish(self) -> Tensor:
        """All chunks' states in natural order, [2 * cp_size, b, h, k, v]."""
        self.work.wait()
        _, everyone = self.buffers
        self.work, self.buffers = None, ()
        early, late = everyone.unflatten(1, (-1, 2)).unbind(2)
        return torch.cat([early, late.flip(0)])

    def combine(self, rule: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """Wait, then apply `rule` (states, weights, chunk) to this rank's chunks: [2b, h, k, v]."""
        states = self.finish()
        return torch.stack([rule(states, self.weights, chunk) for chunk in self.own], dim=1).flatten(0, 1)

    @property
    def own(self) -> tuple[int, int]:
        """This rank's chunks."""
        return chunks_of(self.group.rank(), self.group.size())


class _StartExchange(torch.autograd.Function):
    """States -> an empty tensor that orders the graph; the states travel meanwhile. In backward: the gradients have arrived.

    Autograd runs what was recorded later first, so backward goes `_FinishExchange` (send), local scan, `_StartExchange` (receive)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, exchange: _StateExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(states)
        return states.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.combine(final_state_gradient), None


class _FinishExchange(torch.autograd.Function):
    """The states that enter this rank's chunks, [2b, h, k, v]. In backward: their gradients set out."""

    @staticmethod
    def forward(ctx: Any, started: Tensor, exchange: _StateExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.combine(incoming_state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.start(grad)
        return grad.new_empty(0), None
