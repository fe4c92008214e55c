"""The chunk kernels of flash-linear-attention, called with this package's arguments.

They take packed sequences as one row of tokens with the bounds of all documents, and one state per
document; here documents are ids per token and states belong to rows."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_MAX_DIM = 256
Kernel = Callable[..., tuple[Tensor, Tensor]]


@functools.cache
def is_installed() -> bool:
    """Return whether flash-linear-attention's ops can be found (the `kernels` extra)."""
    return importlib.util.find_spec("fla") is not None


def kernel_fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernels are installed, and support this dtype and heads of this size."""
    return is_installed() and dtype in KERNEL_DTYPES and head_dim <= KERNEL_MAX_DIM


def run_kernel(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call one of fla's chunk kernels with arguments as in `naive_gated_delta_rule`; returns o in
    q's dtype and the final states [b, h, k, v] in float32.

    With documents the host reads their bounds, so it waits for the device once."""
    options |= {"scale": scale, "output_final_state": True}
    gates = (log_decay.float(), beta.float())
    state = None if initial_state is None else initial_state.float()
    if document_ids is None:
        o, final = kernel(q, k, v, *gates, initial_state=state, **options)
        return o, final
    first, bounds = document_bounds(document_ids)
    if state is not None:
        given = state
        state = state.new_zeros(len(bounds) - 1, *given.shape[1:])
        state = state.index_copy(0, first, given)
    rows = q.shape[:2]
    flat = (x.flatten(0, 1)[None].contiguous() for x in (q, k, v, *gates))
    o, finals = kernel(*flat, initial_state=state, cu_seqlens=bounds, **options)
    last = torch.cat([first[1:], first.new_tensor([len(bounds) - 1])]) - 1
    return o[0].unflatten(0, rows), finals.index_select(0, last)


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """document_ids [b, t] -> (number of each row's first document [b], bounds of all documents in
    the rows one after the other, [documents + 1]), int64 on their device."""
    b, t = document_ids.shape
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    where = starts.flatten().nonzero().flatten()
    bounds = torch.cat([where, where.new_tensor([b * t])])
    first = torch.searchsorted(where, torch.arange(b, device=where.device) * t)
    return first, bounds
