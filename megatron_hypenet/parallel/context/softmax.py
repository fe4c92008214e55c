"""Causal softmax attention over a sequence that is split over ranks, by gathering keys and values
or by passing them round a ring.

`all_gather` needs one collective each way and memory for the keys and values of the whole sequence
(with grouped heads a small part of the activations); `ring` keeps two ranks' worth and hides the
transfers behind the blocks."""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.parallel.context.blocks import Block, attend, attend_backward
from megatron_hypenet.parallel.context.documents import Documents
from megatron_hypenet.parallel.context.layout import (
    all_gather_sequence,
    check_document_ids,
    chunks_of,
    local_chunk_tokens,
    reduce_scatter_sequence,
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
    """This rank's outputs of causal attention over the whole sequence: o [b, t_local, h, d] in q's
    dtype.

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
    """Every chunk of queries against all keys up to its own end. Only local tensors are kept:
    backward gathers again."""

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
        key, value = _gather(k, v, group)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = []
        for rows, block in _local_blocks(q.shape[1], group):
            end = block.keys[0][1]
            out[:, rows], log_sum = attend(
                q[:, rows], key[:, :end], value[:, :end], block, scale=scale, documents=documents
            )
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, torch.cat(sums, dim=2))
        ctx.scale = scale
        ctx.group = group
        ctx.documents = documents
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, log_sum = ctx.saved_tensors
        grad = grad.contiguous()
        key, value = _gather(k, v, ctx.group)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        d_key_value = key.new_zeros(2, *key.shape, dtype=log_sum.dtype)
        for rows, block in _local_blocks(q.shape[1], ctx.group):
            end = block.keys[0][1]
            dq[:, rows], dk, dv = attend_backward(
                grad[:, rows],
                q[:, rows],
                key[:, :end],
                value[:, :end],
                out[:, rows],
                log_sum[:, :, rows],
                block,
                scale=ctx.scale,
                documents=ctx.documents,
            )
            d_key_value[0, :, :end] += dk
            d_key_value[1, :, :end] += dv
        if ctx.group.size() > 1:
            d_key_value = reduce_scatter_sequence(d_key_value, ctx.group, 2)
        dk, dv = d_key_value.unbind(0)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence in natural order, [b, T, g, d] each, by one
    collective."""
    if group.size() == 1:
        return k, v
    key, value = all_gather_sequence(torch.stack((k, v)), group, 2).unbind(0)
    return key, value


def _local_blocks(local_length: int, group: dist.ProcessGroup) -> list[tuple[slice, Block]]:
    """Local rows of each chunk of queries, and its block: the keys of positions [0, end of the
    chunk)."""
    if group.size() == 1:
        whole = ((0, local_length),)
        return [(slice(None), Block(whole, whole, causal=True))]
    c = local_length // 2
    blocks = []
    for index, chunk in enumerate(chunks_of(group.rank(), group.size())):
        end = (chunk + 1) * c
        blocks.append(
            (slice(index * c, (index + 1) * c), Block(((end - c, end),), ((0, end),), causal=True))
        )
    return blocks


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
