"""Linear layers in FP8 (e4m3) without gradients: weights quantised once, activations a row at a
time.

Every row of the weight (an output feature) and every row of the activations (a token) has a scale
of its own, so one large value costs no other row its digits, and no row has to wait for the largest
value of the whole tensor. The scales are applied to the fp32 sums of the product.

Source of the format: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.ops.kernels import enabled, kernel_family

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest value of e4m3."""
UNIT = 16
"""Both sizes of a weight are multiples of this: what FP8 matrix products on a GPU ask for."""
LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 matrix products."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, k] -> (e4m3 [rows, k], scales [rows] in fp32) with x = values * scale up to
    rounding.

    The largest value of a row becomes 448; a row of zeros gets scale 1, one with a NaN the
    scale NaN. One kernel on CUDA, torch's operations elsewhere."""
    if x.is_cuda and enabled("fp8_rows"):
        from megatron_hypenet.ops.fp8_linear import triton as kernels

        return kernels.quantize_rows(x)
    return torch_quantize_rows(x)


def torch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the torch form; arguments as in `quantize_rows`. For float64 the scales are float64."""
    wide = x.to(accumulation_dtype(x.dtype))
    largest = wide.abs().amax(dim=-1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


@kernel_family(
    "fp8_rows",
    fits=lambda use: use.fp8 and kernel_fits(use.dtype),
    check="megatron_hypenet.ops.selftest:check_fp8_rows_use",
    checked_uses=({"fp8": True},),
)
def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [..., k], weight [n, k] in e4m3, weight_scale [n] in fp32 -> [..., n] in x's dtype; not
    differentiable.

    On CUDA one product of cuBLAS or CUTLASS with fp32 sums (x in bfloat16; n and k multiples of
    16); elsewhere the same values are multiplied in fp32."""
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:
        y = torch._scaled_mm(
            values,
            weight.t(),
            scale_a=scale[:, None],
            scale_b=weight_scale[None, :],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    else:
        wide = accumulation_dtype(x.dtype)
        y = values.to(wide) @ weight.to(wide).t()
        y = (y * scale[:, None] * weight_scale[None, :]).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def kernel_fits(dtype: torch.dtype) -> bool:
    """Return whether the kernel runs for this dtype on this machine's GPU."""
    return (
        dtype == torch.bfloat16
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= LEAST_CAPABILITY
    )
