"""Triton kernels of `swiglu`: one block of one row's columns per program, each element read and
written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.rows import as_rows

BLOCK = 1024
WARPS = 4
"""Eight elements per thread: one load of 16 bytes in bf16 from each half."""


@triton.jit
def forward_kernel(x, y, width, stride_x, block: tl.constexpr):
    """Compute y = a sigmoid(a) b of a row (a, b)."""
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = col < width
    gate = tl.load(x + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + width + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        y + row * width + col, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside
    )


@triton.jit
def backward_kernel(x, dy, dx, width, stride_x, stride_dy, block: tl.constexpr):
    """Compute both halves of dx (contiguous): da = dy b s (1 + a (1 - s)), db = dy a s, s =
    sigmoid(a)."""
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = col < width
    gate = tl.load(x + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + width + col, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * stride_dy + col, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    to = dx + row * 2 * width + col
    tl.store(
        to, (grad * up * opened * (1 + gate * (1 - opened))).to(dx.dtype.element_ty), mask=inside
    )
    tl.store(to + width, (grad * gate * opened).to(dx.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """x [..., 2f] -> contiguous [..., f]."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    rows = as_rows(x)
    if y.numel():
        forward_kernel[_grid(rows)](rows, y, width, rows.stride(0), block=BLOCK, num_warps=WARPS)
    return y


def backward(x: Tensor, dy: Tensor) -> Tensor:
    """x [..., 2f], dy [..., f] -> contiguous dx [..., 2f]."""
    width = x.shape[-1] // 2
    dx = x.new_empty(x.shape)
    rows, grads = as_rows(x), as_rows(dy)
    if dx.numel():
        strides = rows.stride(0), grads.stride(0)
        backward_kernel[_grid(rows)](rows, grads, dx, width, *strides, block=BLOCK, num_warps=WARPS)
    return dx


def _grid(rows: Tensor) -> tuple[int]:
    """Return the programs of a launch: the blocks of all rows, in the order they lie in memory."""
    return (rows.shape[0] * triton.cdiv(rows.shape[1] // 2, BLOCK),)


forward_op = torch.library.custom_op("hypenet::swiglu", forward, mutates_args=())
backward_op = torch.library.custom_op("hypenet::swiglu_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@backward_op.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)
