"""Everything a Lightning layer does between its two projections, as one node of the autograd graph:
q/k norm and RoPE, the scan, output norm and gate (arXiv 2601.22156).

The kernels are those of `norm_rope`, `lightning_attn` and `gated_norm`. In one node each kernel
writes its part of the fused projection's gradient in place, so that no pass over memory
concatenates the parts (a fifth of all traffic)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hypenet.ops import gated_norm, norm_rope
from megatron_hypenet.ops.kernels import KernelUse, enabled, kernel_family
from megatron_hypenet.ops.lightning_attn import dispatch


class Transfer(Protocol):
    """What carries states between the chunks of a sequence whose chunks lie on several ranks; the
    tensors are those of this rank's two chunks, [2, h, d, d] in fp32
    (`parallel.context.state_exchange.StateTransfer`)."""

    def send(self, *summary: Tensor) -> None:
        """Start to send the states in which the chunks end, each from zero."""

    def incoming(self) -> Tensor:
        """Return the states that enter the chunks."""

    def send_gradient(self, gradient: Tensor) -> None:
        """Start to send the gradients of the incoming states."""

    def summary_gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of what was sent."""


def fits(projected: Tensor, head_dim: int, *, split: bool = False) -> bool:
    """Return whether `lightning_mix` takes a projection [t, b, 4 h d] here: where each of its
    kernels would run, outside torch.compile; one sequence at a time if sequences are `split` over
    ranks."""
    if split and projected.shape[1] != 1:
        return False
    if not (projected.is_cuda and enabled("lightning_mix")) or torch.compiler.is_compiling():
        return False
    width = projected.shape[-1] // 4
    sequences = projected.shape[1] * (width // head_dim)
    return (
        kernel_fits(projected.dtype, head_dim, width) and sequences <= dispatch.KERNEL_MAX_SEQUENCES
    )


def kernel_fits(dtype: torch.dtype, head_dim: int, width: int) -> bool:
    """Return whether all kernels are made for this dtype, heads of this size, and rows of `width` =
    heads
    * head_dim."""
    rows = norm_rope.kernel_fits(dtype, head_dim) and gated_norm.kernel_fits(dtype, width)
    return rows and dispatch.kernel_fits(dtype, head_dim)


def _runs(use: KernelUse) -> bool:
    return use.tensor_ranks == 1 and kernel_fits(use.dtype, use.head_dim, use.width)


@kernel_family(
    "lightning_mix",
    fits=_runs,
    check="megatron_hypenet.ops.lightning_attn.selftest:check_lightning_mix_use",
    needs=("norm_rope", "lightning_attn", "gated_norm"),
    checked_uses=({"documents": True},),
)
def lightning_mix(
    projected: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    o_weight: Tensor,
    angles: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    eps: float,
    document_ids: Tensor | None = None,
    transfer: Transfer | None = None,
) -> Tensor:
    """projected [t, b, 4 h d], the sections q, k, v, gate of all h heads one after the other -> [t,
    b, h d] in its dtype, where `fits`.

    q_weight, k_weight [d], o_weight [h d]; angles [t, 1, 1, d] (each frequency twice, fp32 or
    wider); log_decay [h] (fp32 or wider, <= 0); document_ids [b, t] as in `lightning_attn`; scale
    not 0. fp32 inside; between the steps values are rounded to the dtype. Gradients reach projected
    and the three weights.

    With `transfer` the tokens are two chunks of one sequence, b = 1: document_ids [2, t / 2], one
    row per chunk; states enter and leave through it."""
    from megatron_hypenet.ops.lightning_attn import triton as scan

    decay = scan._log2_decay(log_decay, projected.device)
    ids = scan._ids(document_ids)
    flat = angles.reshape(projected.shape[0], -1)
    return _LightningMix.apply(
        projected.contiguous(), q_weight, k_weight, o_weight, flat, decay, float(scale), eps, ids,
        transfer,
    )  # fmt: skip


def _sections(projected: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return views: q, k, v [t, b, h, d] and gate [t, b, h d]."""
    q, k, v, gate = projected.chunk(4, -1)
    return *(x.unflatten(-1, (-1, head_dim)) for x in (q, k, v)), gate  # type: ignore[return-value]


def _rows(x: Tensor, transfer: Transfer | None) -> Tensor:
    """Return x [t, b, h, d] as the scan takes it, without a copy: [b, t, h, d], or the two chunks
    of one sequence as rows, [2, t / 2, h, d]."""
    return x.transpose(0, 1) if transfer is None else x.squeeze(1).unflatten(0, (2, -1))


def _tokens(x: Tensor, transfer: Transfer | None) -> Tensor:
    """Return the inverse of `_rows`."""
    return x.transpose(0, 1) if transfer is None else x.flatten(0, 1)[:, None]


class _LightningMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, q_weight: Tensor, k_weight: Tensor, o_weight: Tensor,
        angles: Tensor, decay: Tensor, scale: float,
        eps: float, ids: Tensor | None, transfer: Transfer | None,
    ) -> Tensor:  # fmt: skip
        from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
        from megatron_hypenet.ops.lightning_attn import triton as scan
        from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels

        raw_q, raw_k, v, gate = _sections(projected, q_weight.shape[0])
        k = norm_rope_kernels.forward(raw_k, k_weight, angles, eps)
        key, value = _rows(k, transfer), _rows(v, transfer)
        if transfer is not None:
            transfer.send(scan.final_state(key, value, decay, ids))
        q = norm_rope_kernels.forward(raw_q, q_weight, angles, eps)
        initial = None if transfer is None else transfer.incoming().contiguous()
        o, _, states = scan.forward(_rows(q, transfer), key, value, decay, scale, initial, ids)
        # no copy: the scan's output has the memory order of its input
        rows = _tokens(o, transfer).flatten(-2)
        ctx.save_for_backward(
            projected, q, k, rows, states, initial, q_weight, k_weight, o_weight, angles, decay, ids
        )
        ctx.transfer = transfer
        ctx.scale = scale
        ctx.eps = eps
        return gated_norm_kernels.forward(rows, gate, o_weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
        from megatron_hypenet.ops.lightning_attn import triton as scan
        from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels

        projected, q, k, rows, states, initial, *weights, angles, decay, ids = ctx.saved_tensors
        q_weight, k_weight, o_weight = weights
        eps = ctx.eps
        transfer = ctx.transfer
        head_dim = q_weight.shape[0]
        gradient = torch.empty_like(projected)
        raw_q, raw_k, v, gate = _sections(projected, head_dim)
        d_raw_q, d_raw_k, dv, dgate = _sections(gradient, head_dim)
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        do, _, do_weight = gated_norm_kernels.backward(rows, gate, o_weight, dy, eps, dgate=dgate)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        query, key, value, d_out = (
            _rows(x, transfer) for x in (q, k, v, do.unflatten(-1, (-1, head_dim)))
        )
        d_final = None
        if transfer is not None:
            from_outputs = scan.final_state(query, d_out, decay, ids, reverse=True)
            transfer.send_gradient(from_outputs * ctx.scale)
            (d_final,) = transfer.summary_gradients()
        d_query, d_key, d_value = (_rows(x, transfer) for x in (dq, dk, dv))
        scan.backward_into(
            query, key, value, d_out, decay, ctx.scale, states, initial, d_final, ids,
            d_query, d_key, d_value, None,
        )  # fmt: skip
        _, dq_weight = norm_rope_kernels.backward(raw_q, q_weight, angles, dq, eps, dx=d_raw_q)
        _, dk_weight = norm_rope_kernels.backward(raw_k, k_weight, angles, dk, eps, dx=d_raw_k)
        return gradient, dq_weight, dk_weight, do_weight, None, None, None, None, None, None
