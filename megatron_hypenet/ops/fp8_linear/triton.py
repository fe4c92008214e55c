"""Triton kernel of `quantize_rows`: one row per program, read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.rows import as_rows, warps_of_row

LARGEST = tl.constexpr(448.0)


@triton.jit
def quantize_kernel(x, values, scales, width, stride, block: tl.constexpr):
    """Compute the scale of a row and its values in e4m3."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, block)
    inside = col < width
    here = tl.load(x + row * stride + col, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(here), 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    scaled = tl.minimum(tl.maximum(here / scale, -LARGEST), LARGEST)
    # maximum and minimum pass over a NaN, which has to reach the product
    scale = tl.where(tl.max((here != here).to(tl.int32), 0) > 0, float("nan"), scale)
    tl.store(values + row * width + col, scaled.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, k] -> (e4m3 [rows, k] contiguous, fp32 [rows])."""
    rows = as_rows(x)
    values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(rows.shape[1])
    if values.numel():
        quantize_kernel[(len(rows),)](
            rows,
            values,
            scales,
            rows.shape[1],
            rows.stride(0),
            block=block,
            num_warps=warps_of_row(block),
        )
    return values, scales
