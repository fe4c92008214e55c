"""The output gate of a softmax layer, `x * sigmoid(gate)`, in one pass over memory on a GPU.

Source: HypeNet's attention layers (arXiv 2601.22156). With torch's own operations both ways
together take fourteen passes instead of eight, and the sigmoid stays in memory for backward; both
gradients need x and the gate alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@kernel_family(
    "sigmoid_gate",
    fits=lambda use: kernel_fits(use.dtype),
    check="megatron_hypenet.ops.selftest:check_sigmoid_gate_use",
)
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate [..., n] -> [..., n] in x's dtype.

    On CUDA one kernel each way, fp32 inside; elsewhere torch's operations in x's dtype."""
    if x.is_cuda and enabled("sigmoid_gate") and kernel_fits(x.dtype):
        return fused_sigmoid_gate(x, gate)
    return x * torch.sigmoid(gate)


def kernel_fits(dtype: torch.dtype) -> bool:
    """Return whether the kernel supports this dtype; it takes rows of any width."""
    return dtype in KERNEL_DTYPES


def fused_sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Run the kernel; arguments as in `sigmoid_gate`, the result contiguous."""
    return _SigmoidGate.apply(x, gate)


class _SigmoidGate(torch.autograd.Function):
    """Keeps x and the gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        from megatron_hypenet.ops.sigmoid_gate import triton as kernels

        ctx.save_for_backward(x, gate)
        run = kernels.forward_op if torch.compiler.is_compiling() else kernels.forward
        return run(x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        from megatron_hypenet.ops.sigmoid_gate import triton as kernels

        run = kernels.backward_op if torch.compiler.is_compiling() else kernels.backward
        x, gate = ctx.saved_tensors
        return run(x, gate, dy)
