"""Recurrent mixers over a sequence that is split over ranks: one all-gather of chunk summaries
forward and one backward for any length, and the tokens before a chunk that a short convolution
reads.

Each rank holds two chunks (zigzag, see `layout`) and treats them side by side in the batch
dimension. What a chunk does to a state is summarised by tensors whose size does not depend on its
length. They are sent to all ranks first, and the transfer overlaps with the computation that needs
no other chunk. An algebra (`state_algebra`) turns all summaries into the state that enters each
chunk, and in backward the gradients of the incoming states, which are sent the same way, into
gradients of the summaries. The idea is LASP-2's (arXiv 2502.07563); zigzag layout, decays,
transition matrices and documents are ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.parallel.context.layout import (
    check_document_ids,
    chunks_of,
    local_chunk_tokens,
    local_part,
)
from megatron_hypenet.parallel.context.state_algebra import Algebra, Shift


@dataclass(frozen=True)
class Chunks:
    """A rank's tokens as rows: row 2 i + j is local chunk j of sequence i."""

    tokens: int
    """Tokens of a chunk, c."""
    number: int
    """Chunks of a whole sequence, 2 * context ranks."""
    document_ids: Tensor | None
    """Document of every token of the whole sequences [b, number * c], or None."""
    rows: Tensor | None
    """Document of every token of this rank's chunks [2 b, c], or None."""


class ChunkExchange(ABC):
    """How a recurrent mixer crosses chunk borders; one object per call, which may hold settings.

    `inputs` are the mixer's tensors per token, cut to chunks [2 b, c, ...]."""

    halo_tokens: ClassVar[int] = 0
    """Tokens before a chunk that are needed beside the state; see `preceding_tokens`."""

    @abstractmethod
    def combine(self, chunks: Chunks) -> Algebra:
        """Return the rule that turns the summaries of all chunks into the state that enters one."""

    @abstractmethod
    def local_summary(self, chunks: Chunks, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what each chunk does to a state, as the algebra takes it: [2 b, ...] each, with
        the state that the chunk leaves from a zero state last. Computed first and by itself,
        because it is sent while `local` computes."""

    def local(self, chunks: Chunks, *inputs: Tensor) -> Tensor | None:
        """Return what can be computed without the incoming state; None for nothing."""
        return None

    @abstractmethod
    def apply(
        self, chunks: Chunks, local: Tensor | None, incoming: Tensor, *inputs: Tensor
    ) -> Tensor:
        """Compute outputs [2 b, c, ...] from the result of `local` and the states that enter the
        chunks, [2 b, ...]. A state belongs to the document of a chunk's first token."""


def exchange_states(
    exchange: ChunkExchange,
    *inputs: Tensor,
    group: dist.ProcessGroup,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return this rank's outputs [b, t_local, ...] of a recurrence over whole sequences split over
    `group`.

    Args:
        exchange: the mixer's part.
        inputs: [b, t_local, ...] each, as `split_sequence` gives them.
        group: context-parallel ranks; more than one.
        document_ids: [b, t_local * ranks], the same on all ranks and not decreasing along a row;
            the state restarts where they change.

    Raises ValueError when t_local is odd or document_ids has another shape. One all-gather forward,
    and one backward where the summaries need a gradient."""
    b, local_tokens = inputs[0].shape[:2]
    check_document_ids(document_ids, b, local_tokens * group.size())
    chunks = split_chunks(local_tokens, group, document_ids)
    inputs = tuple(x.unflatten(1, (2, chunks.tokens)).flatten(0, 1) for x in inputs)
    transfer = StateTransfer(group, exchange.combine(chunks))
    summary = exchange.local_summary(chunks, *inputs)
    started = _Start.apply(transfer, *summary)
    local = exchange.local(chunks, *inputs)
    incoming = _Finish.apply(started, transfer)
    output = exchange.apply(chunks, local, incoming, *inputs)
    return output.unflatten(0, (b, 2)).flatten(1, 2)


def preceding_tokens(x: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """x [b, t_local, ...] -> rows of chunks with the `count` tokens before each, zeros before the
    sequence: [2 b, count + c, ...]; on one rank the whole sequence as one chunk, [b, count + t,
    ...].

    `preceding_ids` tells which of them belong to another document; `join_chunks` follows the
    convolution. Costs one all-gather of the last `count` tokens of every chunk each way. Raises
    ValueError when chunks are shorter than `count`."""
    if group.size() == 1:
        halo = x.new_zeros(x.shape[0], count, *x.shape[2:])
        return torch.cat([halo, x], dim=1)
    chunks = split_chunks(x.shape[1], group, None)
    if chunks.tokens < count:
        raise ValueError(
            f"chunks of {chunks.tokens} tokens are shorter than the {count} tokens that are read "
            "before each; use longer sequences or fewer context-parallel ranks"
        )
    rows = x.unflatten(1, (2, chunks.tokens)).flatten(0, 1)
    transfer = StateTransfer(group, Shift())
    halo = _Finish.apply(_Start.apply(transfer, rows[:, chunks.tokens - count :]), transfer)
    return torch.cat([halo, rows], dim=1)


def preceding_ids(
    document_ids: Tensor | None, count: int, group: dist.ProcessGroup
) -> Tensor | None:
    """Return the ids of what `preceding_tokens` gives, [rows, count + c]; -1 before the
    sequence."""
    if document_ids is None:
        return None
    padded = torch.nn.functional.pad(document_ids, (count, 0), value=-1)
    if group.size() == 1:
        return padded
    c = document_ids.shape[1] // (2 * group.size())
    own = chunks_of(group.rank(), group.size())
    parts = [padded[:, chunk * c : (chunk + 1) * c + count] for chunk in own]
    return torch.stack(parts, dim=1).flatten(0, 1)


def join_chunks(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Join rows of chunks [2 b, c, ...] -> this rank's tokens [b, t_local, ...]; unchanged on one
    rank."""
    return rows if group.size() == 1 else rows.unflatten(0, (-1, 2)).flatten(1, 2)


def split_chunks(
    local_tokens: int, group: dist.ProcessGroup, document_ids: Tensor | None
) -> Chunks:
    """Split this rank's sequences, of which it holds `local_tokens`, into its two chunks;
    document_ids covers whole sequences. Raises ValueError when local_tokens is odd."""
    size = group.size()
    c = local_chunk_tokens(local_tokens, size)
    rows = None
    if document_ids is not None:
        rows = local_part(document_ids, group.rank(), size, 1).unflatten(1, (2, c)).flatten(0, 1)
    return Chunks(c, 2 * size, document_ids, rows)


class StateTransfer:
    """One exchange of summaries, forward, and of the gradients of incoming states, backward: send,
    compute something else, receive. It holds its buffers meanwhile."""

    def __init__(self, group: dist.ProcessGroup, algebra: Algebra) -> None:
        self.group = group
        self.algebra = algebra
        self.work: Any = None
        self.buffers: tuple[Tensor, ...] = ()
        self.shapes: tuple[torch.Size, ...] = ()

    def send(self, *summary: Tensor) -> None:
        """Start to send summaries [2 b, ...] of this rank's chunks, of one dtype, to all ranks in
        one collective."""
        self.shapes = tuple(x.shape[1:] for x in summary)
        packed = (
            summary[0] if len(summary) == 1 else torch.cat([x.flatten(1) for x in summary], dim=1)
        )
        packed = packed.contiguous()
        everyone = packed.new_empty(self.group.size(), *packed.shape)
        self.buffers = (packed, everyone)
        self.work = dist.all_gather_into_tensor(
            everyone.view(-1), packed.view(-1), group=self.group, async_op=True
        )

    def incoming(self) -> Tensor:
        """Return the states that enter this rank's chunks, [2 b, ...]."""
        summaries = self._receive()
        states = [self.algebra.incoming(summaries, chunk) for chunk in self._own()]
        return torch.stack(states, dim=1).flatten(0, 1)

    def send_gradient(self, gradient: Tensor) -> None:
        """Start to send the gradient of the incoming states, [2 b, ...]."""
        self.send(gradient)

    def summary_gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of what `send` was given."""
        (gradients,) = self._receive()
        own = [self.algebra.summary_gradient(gradients, chunk) for chunk in self._own()]
        return tuple(torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(*own, strict=True))

    def _own(self) -> tuple[int, int]:
        return chunks_of(self.group.rank(), self.group.size())

    def _receive(self) -> tuple[Tensor, ...]:
        """Wait for the collective and return all chunks' tensors in natural order, [chunks, b, ...]
        each."""
        self.work.wait()
        everyone = self.buffers[1]
        self.work = None
        self.buffers = ()
        early, late = everyone.unflatten(1, (-1, 2)).unbind(2)
        gathered = torch.cat([early, late.flip(0)])
        if len(self.shapes) == 1:
            return (gathered,)
        parts = gathered.split([shape.numel() for shape in self.shapes], dim=2)
        return tuple(x.unflatten(2, shape) for x, shape in zip(parts, self.shapes, strict=True))


class _Start(torch.autograd.Function):
    """Start to send the summaries; returns an empty tensor that orders the autograd graph. Backward
    waits for the gradients of the incoming states.

    Autograd runs first what was recorded last, so backward goes `_Finish` (send), local part,
    `_Start` (receive)."""

    @staticmethod
    def forward(ctx: Any, transfer: StateTransfer, *summary: Tensor) -> Tensor:
        ctx.transfer = transfer
        transfer.send(*summary)
        return summary[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.transfer.summary_gradients()


class _Finish(torch.autograd.Function):
    """The states that enter this rank's chunks, [2 b, ...]; backward starts to send their
    gradients."""

    @staticmethod
    def forward(ctx: Any, started: Tensor, transfer: StateTransfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.incoming()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.transfer.send_gradient(grad)
        return grad.new_empty(0), None
