"""SwiGLU's product, `silu(gate) * up`, in one pass over memory on a GPU and with only its input
kept for backward everywhere.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202). Written with torch's own
operations the product keeps silu(gate) beside its input; both gradients need the input alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@kernel_family(
    "swiglu",
    fits=lambda use: kernel_fits(use.dtype),
    check="megatron_hypenet.ops.selftest:check_swiglu_use",
)
def swiglu(x: Tensor) -> Tensor:
    """x [..., 2f], the gate's half before the other -> [..., f] in x's dtype, contiguous.

    On CUDA one kernel each way, fp32 inside; elsewhere torch's operations in x's dtype."""
    if x.is_cuda and enabled("swiglu") and kernel_fits(x.dtype):
        return fused_swiglu(x)
    return _TorchSwiGLU.apply(x)


def kernel_fits(dtype: torch.dtype) -> bool:
    """Return whether the kernel supports this dtype; it takes rows of any width."""
    return dtype in KERNEL_DTYPES


def fused_swiglu(x: Tensor) -> Tensor:
    """Run the kernel; arguments as in `swiglu`."""
    return _FusedSwiGLU.apply(x)


class _TorchSwiGLU(torch.autograd.Function):
    """Computes the gradients that autograd would give, and saves the input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)), dim=-1)


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from megatron_hypenet.ops.swiglu import triton as kernels

        ctx.save_for_backward(x)
        run = kernels.forward_op if torch.compiler.is_compiling() else kernels.forward
        return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        from megatron_hypenet.ops.swiglu import triton as kernels

        run = kernels.backward_op if torch.compiler.is_compiling() else kernels.backward
        return run(ctx.saved_tensors[0], dy)
