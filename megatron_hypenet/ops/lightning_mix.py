"""Everything a Lightning layer does between its two projections, as one node of the autograd graph:
q/k norm and RoPE, the scan, output norm and gate (arXiv 2601.22156).

The kernels are those of `norm_rope`, `lightning_attn` and `gated_norm`. In one node each kernel
writes its part of the fused projection's gradient in place, so that no pass over memory
concatenates the parts (a fifth of all traffic)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.ops import gated_norm, norm_rope
from megatron_hypenet.ops.kernels import KernelUse, enabled, kernel_family
from megatron_hypenet.ops.lightning_attn import dispatch


def fits(projected: Tensor, head_dim: int) -> bool:
    """Whether `lightning_mix` takes a projection [t, b, 4 h d] here: where each of its kernels
    would run, outside torch.compile."""
    if not (projected.is_cuda and enabled("lightning_mix")) or torch.compiler.is_compiling():
        return False
    width = projected.shape[-1] // 4
    sequences = projected.shape[1] * (width // head_dim)
    return (
        kernel_fits(projected.dtype, head_dim, width) and sequences <= dispatch.KERNEL_MAX_SEQUENCES
    )


def kernel_fits(dtype: torch.dtype, head_dim: int, width: int) -> bool:
    """Whether all kernels are made for this dtype, heads of this size, and rows of `width` = heads
    * head_dim."""
    rows = norm_rope.kernel_fits(dtype, head_dim) and gated_norm.kernel_fits(dtype, width)
    return rows and dispatch.kernel_fits(dtype, head_dim)


def _runs(use: KernelUse) -> bool:
    alone = use.tensor_ranks == use.context_ranks == 1
    return alone and kernel_fits(use.dtype, use.head_dim, use.width)


@kernel_family(
    "lightning_mix",
    fits=_runs,
    check="megatron_hypenet.ops.lightning_attn.selftest:check_lightning_mix_use",
    needs=("norm_rope", "lightning_attn", "gated_norm"),
    surveyed=({"documents": True},),
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
) -> Tensor:
    """projected [t, b, 4 h d], the sections q, k, v, gate of all h heads one after the other -> [t,
    b, h d] in its dtype, where `fits`.

    q_weight, k_weight [d], o_weight [h d]; angles [t, 1, 1, d] (each frequency twice, fp32 or
    wider); log_decay [h] (fp32 or wider, <= 0); document_ids [b, t] as in `lightning_attn`; scale
    not 0. fp32 inside; between the steps values are rounded to the dtype. Gradients reach projected
    and the three weights."""
    from megatron_hypenet.ops.lightning_attn import triton as scan

    decay = scan._log2_decay(log_decay, projected.device)
    ids = scan._ids(document_ids)
    flat = angles.reshape(projected.shape[0], -1)
    return _LightningMix.apply(
        projected.contiguous(), q_weight, k_weight, o_weight, flat, decay, float(scale), eps, ids
    )


def _sections(projected: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views: q, k, v [t, b, h, d] and gate [t, b, h d]."""
    q, k, v, gate = projected.chunk(4, -1)
    return *(x.unflatten(-1, (-1, head_dim)) for x in (q, k, v)), gate  # type: ignore[return-value]


class _LightningMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, q_weight: Tensor, k_weight: Tensor, o_weight: Tensor,
        angles: Tensor, decay: Tensor, scale: float,
        eps: float, ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
        from megatron_hypenet.ops.lightning_attn import triton as scan
        from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels

        raw_q, raw_k, v, gate = _sections(projected, q_weight.shape[0])
        q = norm_rope_kernels.forward(raw_q, q_weight, angles, eps)
        k = norm_rope_kernels.forward(raw_k, k_weight, angles, eps)
        o, _, states = scan.forward(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), decay, scale, None, ids
        )
        # no copy: the scan's output has the memory order of its input
        rows = o.transpose(0, 1).flatten(-2)
        ctx.save_for_backward(
            projected, q, k, rows, states, q_weight, k_weight, o_weight, angles, decay, ids
        )
        ctx.scale = scale
        ctx.eps = eps
        return gated_norm_kernels.forward(rows, gate, o_weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
        from megatron_hypenet.ops.lightning_attn import triton as scan
        from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels

        projected, q, k, rows, states, q_weight, k_weight, o_weight, angles, decay, ids = (
            ctx.saved_tensors
        )
        eps = ctx.eps
        head_dim = q_weight.shape[0]
        gradient = torch.empty_like(projected)
        raw_q, raw_k, v, gate = _sections(projected, head_dim)
        d_raw_q, d_raw_k, dv, dgate = _sections(gradient, head_dim)
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        do, _, do_weight = gated_norm_kernels.backward(rows, gate, o_weight, dy, eps, dgate=dgate)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        do = do.unflatten(-1, (-1, head_dim))
        scan.backward_into(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            do.transpose(0, 1),
            decay,
            ctx.scale,
            states,
            None,
            None,
            ids,
            dq.transpose(0, 1),
            dk.transpose(0, 1),
            dv.transpose(0, 1),
            None,
        )
        _, dq_weight = norm_rope_kernels.backward(raw_q, q_weight, angles, dq, eps, dx=d_raw_q)
        _, dk_weight = norm_rope_kernels.backward(raw_k, k_weight, angles, dk, eps, dx=d_raw_k)
        return gradient, dq_weight, dk_weight, do_weight, None, None, None, None, None
