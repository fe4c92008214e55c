"""Per-head RMSNorm and then, where there are angles, RoPE, of queries or keys, in one pass over
memory on a GPU.

Source: Qwen3's q/k norm followed by rotate-half RoPE (arXiv 2104.09864), as HypeNet's Lightning
layers apply them (arXiv 2601.22156)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family
from megatron_hypenet.ops.rope import apply_rope

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@kernel_family(
    "norm_rope",
    fits=lambda use: kernel_fits(use.dtype, use.head_dim),
    check="megatron_hypenet.ops.selftest:check_norm_rope_use",
)
def norm_rope(x: Tensor, weight: Tensor, angles: Tensor | None, eps: float) -> Tensor:
    """x [t, b, h, d], weight [d], angles [t, 1, 1, d] (each frequency twice, fp32 or wider) or None
    -> [t, b, h, d] in x's dtype.

    On CUDA one kernel, fp32 inside, gradients for x and weight; elsewhere `rms_norm` and
    `apply_rope`, which round in between."""
    if x.is_cuda and enabled("norm_rope") and kernel_fits(x.dtype, x.shape[-1]):
        return fused_norm_rope(x, weight, angles, eps)
    normal = F.rms_norm(x, (x.shape[-1],), weight, eps)
    return normal if angles is None else apply_rope(normal, angles)


def kernel_fits(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel is made for heads of this size, d / 2 a power of two from 16 on,
    and dtype."""
    half = head_dim // 2
    return dtype in KERNEL_DTYPES and half >= 16 and half & (half - 1) == 0


def fused_norm_rope(x: Tensor, weight: Tensor, angles: Tensor | None, eps: float) -> Tensor:
    """Run the kernel, where `kernel_fits`; arguments as in `norm_rope`."""
    return _NormRope.apply(
        x, weight, None if angles is None else angles.reshape(x.shape[0], -1), eps
    )


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, angles: Tensor | None, eps: float) -> Tensor:
        from megatron_hypenet.ops.norm_rope import triton as kernels

        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, angles)
        ctx.eps = eps
        run = kernels.forward_op if torch.compiler.is_compiling() else kernels.forward
        return run(x, weight, angles, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from megatron_hypenet.ops.norm_rope import triton as kernels

        x, weight, angles = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        run = kernels.backward_op if torch.compiler.is_compiling() else kernels.backward
        dx, dweight = run(x, weight, angles, dy, ctx.eps)
        return dx, dweight, None, None
