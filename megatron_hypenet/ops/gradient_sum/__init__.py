"""The fp32 sum of bf16 gradients, `total = gradient` or `total += gradient`, by vectorised accesses
to memory on a GPU.

torch's own `copy_` and `add_` between two dtypes move one element at a time: on an H100 1.8 TB/s of
3.0. The results are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hypenet.ops.kernels import enabled, kernel_family

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@kernel_family(
    "gradient_sum",
    fits=lambda use: kernel_fits(use.dtype),
    check="megatron_hypenet.ops.selftest:check_gradient_sum_use",
)
def gradient_sum(total: Tensor, gradient: Tensor, *, add: bool) -> None:
    """Write `gradient` [n] to `total` [n], in place, or add it; total is fp32 for the kernel, and
    contiguous like the gradient.

    On CUDA one kernel; elsewhere torch's operations, which give the same bits. No gradient flows
    through this."""
    fits = (
        kernel_fits(gradient.dtype)
        and total.dtype == torch.float32
        and total.is_contiguous()
        and gradient.is_contiguous()
    )
    if total.is_cuda and gradient.is_cuda and enabled("gradient_sum") and fits:
        fused_gradient_sum(total, gradient, add=add)
    elif add:
        total.add_(gradient)
    else:
        total.copy_(gradient)


def kernel_fits(dtype: torch.dtype) -> bool:
    """Return whether the kernel supports gradients of this dtype."""
    return dtype in KERNEL_DTYPES


def fused_gradient_sum(total: Tensor, gradient: Tensor, *, add: bool) -> None:
    """Run the kernel; arguments as in `gradient_sum`. ValueError when the sizes differ; torch would
    broadcast a single gradient."""
    from megatron_hypenet.ops.gradient_sum import triton as kernels

    if total.numel() != gradient.numel():
        raise ValueError(
            f"a sum of {total.numel()} numbers and a gradient of {gradient.numel()} do not belong "
            "together"
        )
    kernels.run(total, gradient, add)
