"""torch's flash attention with what its public function hides: bottom-right causal blocks,
log-sum-exps, and packed documents.

`aten::_flash_attention_forward` takes [b, m, h, d] as it lies in memory, fewer key/value groups
than heads, and aligns causal blocks bottom-right; its backward accepts the output and log-sum-exp
of a longer row of blocks, which makes it a step of ring attention."""

from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megatron_hypenet.parallel.context.documents import Documents, Packing, Span

_FORWARD = torch.ops.aten._flash_attention_forward
_BACKWARD = torch.ops.aten._flash_attention_backward
_PACKED_LOG_SUMS = TorchVersion(torch.__version__) >= "2.7"
"""Since torch 2.7 packed sequences get their log-sum-exps as [h, tokens]; before, padded to the
longest one."""


def supports(q: Tensor, documents: Documents | None) -> bool:
    """Return whether the kernel takes tensors like q [b, m, h, d]."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and (documents is None or _PACKED_LOG_SUMS)
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: tuple[Span, ...],
    keys: tuple[Span, ...],
    *,
    causal: bool,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """Compute `blocks.attend`: o [b, m, h, d] in q's dtype, log-sum-exp [b, h, m] in fp32."""
    if documents is None:
        o, log_sum, *_ = _FORWARD(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return o, log_sum
    b, m, h, _ = q.shape
    packing = documents.packing(queries, keys)
    if packing.empty:
        return torch.zeros_like(q), q.new_full((b, h, m), -torch.inf, dtype=torch.float32)
    packed = (_take(q, packing.query_rows), _take(k, packing.key_rows), _take(v, packing.key_rows))
    o, log_sum, *_ = _FORWARD(*packed, *_lengths(packing), 0.0, causal, False, scale=scale)
    if packing.query_rows is not None:
        packed_sums = log_sum
        o = _put(o, packing.query_rows, q).flatten(0, 1)
        log_sum = packed_sums.new_full((h, b * m), -torch.inf)
        log_sum[:, packing.query_rows] = packed_sums
    return o.unflatten(0, (b, m)), log_sum.unflatten(1, (b, m)).transpose(0, 1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log_sum: Tensor,
    queries: tuple[Span, ...],
    keys: tuple[Span, ...],
    *,
    causal: bool,
    scale: float,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `blocks.attend_backward`: dq, dk, dv in q's dtype."""
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # state of the dropout that is off
    grad = grad.contiguous()
    o = o.to(q.dtype).contiguous()
    if documents is None:
        sums = log_sum.contiguous()
        return _BACKWARD(
            grad,
            q,
            k,
            v,
            o,
            sums,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
        )
    packing = documents.packing(queries, keys)
    if packing.empty:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    packed = [_take(x, packing.query_rows) for x in (grad, q)] + [
        _take(x, packing.key_rows) for x in (k, v)
    ]
    sums = log_sum.transpose(0, 1).flatten(1, 2)
    sums = (sums if packing.query_rows is None else sums[:, packing.query_rows]).contiguous()
    out = _take(o, packing.query_rows)
    grads = _BACKWARD(
        *packed, out, sums, *_lengths(packing), 0.0, causal, unused, unused, scale=scale
    )
    rows = (packing.query_rows, packing.key_rows, packing.key_rows)
    dq, dk, dv = (_put(g, r, x) for g, r, x in zip(grads, rows, (q, k, v), strict=True))
    return dq, dk, dv


def _lengths(packing: Packing) -> tuple[Any, ...]:
    return packing.query_bounds, packing.key_bounds, packing.max_queries, packing.max_keys


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    """[b, t, h, d] -> the packed rows [tokens, h, d]."""
    flat = x.flatten(0, 1)
    return flat if rows is None else flat[rows]


def _put(packed: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Return the inverse of `_take`, with zeros elsewhere."""
    if rows is None:
        return packed.view(like.shape)
    flat = packed.new_zeros(like.shape[0] * like.shape[1], *like.shape[2:])
    flat[rows] = packed
    return flat.view(like.shape)
