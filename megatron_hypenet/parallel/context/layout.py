"""The tokens that a context-parallel rank holds: zigzag, two chunks of 2 * cp_size.

Causal attention costs a late token more than an early one. Rank r therefore holds chunk r and chunk
2 * cp_size - 1 - r, whose costs have the same sum on every rank; Megatron-core slices its RoPE
angles the same way. The local sequence is the early chunk followed by the late one. Natural order
means the order of the text."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks, of 2 * size, that `rank` holds, in local order."""
    return rank, 2 * size - 1 - rank


def chunk_tokens(length: int, size: int) -> int:
    """Return the tokens per chunk of a whole sequence of `length` tokens over `size` ranks;
    ValueError when it does not divide."""
    if length % (2 * size) or length < 2 * size:
        lower = length - length % (2 * size)
        fits = f"{lower} or {lower + 2 * size}" if lower else f"{2 * size}"
        raise ValueError(
            f"a sequence of {length} tokens does not split over {size} context-parallel ranks: "
            f"its length must be a multiple of 2 * {size}, for example {fits}"
        )
    return length // (2 * size)


def local_chunk_tokens(local_length: int, size: int) -> int:
    """Return the tokens per chunk of a rank's `local_length` tokens; ValueError when they are not
    two chunks."""
    if local_length % 2 or local_length < 2:
        raise ValueError(
            f"{local_length} local tokens on one of {size} context-parallel ranks: "
            "a rank holds two chunks of one length, "
            "so the number must be even; split the sequence with split_sequence"
        )
    return local_length // 2


def check_document_ids(document_ids: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless the ids, if any, cover whole sequences [batch, length]."""
    if document_ids is not None and tuple(document_ids.shape) != (batch, length):
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)}, expected {(batch, length)}: "
            "ids of the whole sequence, the same on every context-parallel rank"
        )


def local_part(x: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """Return the part of x (natural order along `dim`) that `rank` of `size` holds; x itself for
    one rank."""
    if size == 1:
        return x
    length = chunk_tokens(x.shape[dim], size)
    return torch.cat(
        [x.narrow(dim, chunk * length, length) for chunk in chunks_of(rank, size)], dim=dim
    )


def natural_order(parts: list[Tensor], dim: int) -> Tensor:
    """Join the local parts of all ranks, in order of rank, to the whole sequence in natural
    order."""
    halves = [part.chunk(2, dim=dim) for part in parts]
    return torch.cat(
        [early for early, _ in halves] + [late for _, late in reversed(halves)], dim=dim
    )


def split_sequence(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this rank's tokens of x, which every rank of the group holds whole: [..., T, ...] ->
    [..., T / cp_size, ...].

    A new tensor, except over one rank. Raises ValueError when T is no multiple of 2 * cp_size. Its
    gradient on a rank is that of the rank's own tokens; sum it over the group where the whole x is
    a common variable."""
    return local_part(x, group.rank(), group.size(), dim)


def gather_sequence(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the inverse of `split_sequence`, on every rank: [..., t_local, ...] -> [..., t_local *
    cp_size, ...] in natural order, any dtype.

    Differentiable: the gradient of the local tokens is summed over the losses of all ranks. A loss
    that every rank computes alike on the gathered tensor therefore counts cp_size times."""
    if group.size() == 1:
        return x
    local_chunk_tokens(x.shape[dim], group.size())
    return _GatherSequence.apply(x, group, dim)


def local_positions(
    local_length: int, group: dist.ProcessGroup, device: torch.device | str | None = None
) -> Tensor:
    """Return the positions in the whole sequence of this rank's tokens, int64 [local_length]."""
    return local_part(
        torch.arange(local_length * group.size(), device=device), group.rank(), group.size(), 0
    )


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Gather like `gather_sequence`, without a gradient: one all-gather."""
    mine = x.contiguous()
    gathered = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather_into_tensor(gathered.view(-1), mine.view(-1), group=group)
    return natural_order(list(gathered.unbind(0)), dim % mine.dim())


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Sum over the group of x (natural order along `dim`), of which each rank keeps its own tokens:
    one reduce-scatter."""
    size, rank = group.size(), group.rank()
    if dist.get_backend(group) == "gloo":  # before torch 2.8 gloo had no reduce-scatter
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return local_part(total, rank, size, dim)
    parts = torch.stack([local_part(x, peer, size, dim) for peer in range(size)])
    mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1), group=group)
    return mine


class _GatherSequence(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group = group
        ctx.dim = dim
        return all_gather_sequence(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return reduce_scatter_sequence(grad, ctx.group, ctx.dim), None, None
