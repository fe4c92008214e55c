"""RMSNorm of a whole row and then the output gate, `rms_norm(x) * w * sigmoid(gate)`, in one pass
over memory on a GPU.

Source: HypeNet's Lightning layer, which normalises all heads together and then gates (arXiv
2601.22156). It is for processes that hold whole rows: a row that is split over tensor-parallel
ranks needs its sum of squares from all of them first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_MAX_WIDTH = 16384


@kernel_family(
    "gated_norm",
    fits=lambda use: use.tensor_ranks == 1 and kernel_fits(use.dtype, use.width),
    check="megatron_hypenet.ops.selftest:check_gated_norm_use",
)
def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [t, b, n], weight [n] -> [t, b, n] in x's dtype.

    On CUDA one kernel, fp32 inside, gradients for all three; elsewhere plain torch, which rounds in
    between."""
    if x.is_cuda and enabled("gated_norm") and kernel_fits(x.dtype, x.shape[-1]):
        return fused_gated_norm(x, gate, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps) * torch.sigmoid(gate)


def kernel_fits(dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernel supports rows of this width (one program holds a row) and dtype."""
    return dtype in KERNEL_DTYPES and width <= KERNEL_MAX_WIDTH


def fused_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run the kernel; arguments as in `gated_norm`."""
    return _GatedNorm.apply(x, gate, weight, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        from megatron_hypenet.ops.gated_norm import triton as kernels

        x, gate = (a if a.stride(-1) == 1 else a.contiguous() for a in (x, gate))
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        run = kernels.forward_op if torch.compiler.is_compiling() else kernels.forward
        return run(x, gate, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from megatron_hypenet.ops.gated_norm import triton as kernels

        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        run = kernels.backward_op if torch.compiler.is_compiling() else kernels.backward
        x, gate, weight = ctx.saved_tensors
        return *run(x, gate, weight, dy, ctx.eps), None
