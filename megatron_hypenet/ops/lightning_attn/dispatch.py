"""One function for Lightning Attention: it runs the fastest form that supports the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family
from megatron_hypenet.ops.lightning_attn.chunked import (
    chunked_lightning_attn,
    chunked_lightning_state,
)

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_MAX_DIM = 256
KERNEL_MAX_SEQUENCES = 65535
"""Batch times heads: CUDA's bound on the second dimension of a grid."""


@kernel_family(
    "lightning_attn",
    fits=lambda use: kernel_fits(use.dtype, use.head_dim),
    check="megatron_hypenet.ops.lightning_attn.selftest:check_lightning_attn_use",
    checked_uses=({"head_dim": 64, "thorough": False}, {"documents": True}),
)
def lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (fp32 or wider, <= 0) -> o [b, t, h, v] in
    q's dtype, final state [b, h, k, v].

    `document_ids` [b, t] (integer, non-decreasing along t) separates packed documents.
    `initial_state` belongs to the document of the row's first token, the final state to that of its
    last token. Accumulates and returns the state in fp32, in fp64 for fp64 inputs. Gradients reach
    q, k, v and initial_state, from o and from the final state; log_decay is a constant."""
    if runs_kernels(q, v) and scale != 0:
        from megatron_hypenet.ops.lightning_attn.triton import triton_lightning_attn

        return triton_lightning_attn(
            q, k, v, log_decay, scale=scale, initial_state=initial_state, document_ids=document_ids
        )
    return chunked_lightning_attn(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, document_ids=document_ids
    )


def lightning_state(
    k: Tensor, v: Tensor, log_decay: Tensor, *, document_ids: Tensor | None = None
) -> Tensor:
    """Return the final state of `lightning_attn` from a zero state, without outputs: k [b, t, h,
    k], v [b, t, h, v] -> [b, h, k, v]."""
    if runs_kernels(k, v):
        from megatron_hypenet.ops.lightning_attn.triton import triton_lightning_state

        return triton_lightning_state(k, v, log_decay, document_ids=document_ids)
    return chunked_lightning_state(k, v, log_decay, document_ids=document_ids)


def runs_kernels(q: Tensor, v: Tensor) -> bool:
    """Return whether the Triton kernels take these tensors [b, t, h, d]: on CUDA, bf16, fp16 or
    fp32, key and value dims up to 256, not disabled.

    Triton is imported only in this case, so a machine without a GPU need not have it."""
    dims = max(q.shape[-1], v.shape[-1])
    sequences = q.shape[0] * q.shape[2]
    return (
        q.is_cuda
        and enabled("lightning_attn")
        and kernel_fits(q.dtype, dims)
        and sequences <= KERNEL_MAX_SEQUENCES
    )


def kernel_fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernels support heads of this size and dtype."""
    return dtype in KERNEL_DTYPES and head_dim <= KERNEL_MAX_DIM
