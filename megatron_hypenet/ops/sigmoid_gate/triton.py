"""Triton kernels of `sigmoid_gate`: one block of one row's columns per program, each element read
and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.rows import as_rows

BLOCK = 1024
WARPS = 4
"""Eight elements per thread: one access of 16 bytes in bf16."""


@triton.jit
def forward_kernel(x, gate, y, width, stride_x, stride_g, block: tl.constexpr):
    """Compute y = x sigmoid(gate), contiguous."""
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = col < width
    value = tl.load(x + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(gate + row * stride_g + col, mask=inside, other=0.0).to(tl.float32))
    tl.store(y + row * width + col, (value * opened).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    x, gate, dy, dx, dgate, width, stride_x, stride_g, stride_dy, block: tl.constexpr
):
    """Compute dx = dy s, dgate = dy x s (1 - s), s = sigmoid(gate); both contiguous."""
    blocks = tl.cdiv(width, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = col < width
    value = tl.load(x + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(gate + row * stride_g + col, mask=inside, other=0.0).to(tl.float32))
    grad = tl.load(dy + row * stride_dy + col, mask=inside, other=0.0).to(tl.float32) * opened
    tl.store(dx + row * width + col, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(
        dgate + row * width + col,
        (grad * value * (1 - opened)).to(dgate.dtype.element_ty),
        mask=inside,
    )


def forward(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate [..., n] -> contiguous [..., n]."""
    y = x.new_empty(x.shape)
    rows = as_rows(x)
    gates = as_rows(gate)
    if y.numel():
        forward_kernel[_grid(rows)](
            rows,
            gates,
            y,
            rows.shape[1],
            rows.stride(0),
            gates.stride(0),
            block=BLOCK,
            num_warps=WARPS,
        )
    return y


def backward(x: Tensor, gate: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x, gate, dy [..., n] -> dx, dgate [..., n], contiguous."""
    dx = x.new_empty(x.shape)
    dgate = gate.new_empty(x.shape)
    rows = as_rows(x)
    gates = as_rows(gate)
    grads = as_rows(dy)
    if dx.numel():
        strides = rows.stride(0), gates.stride(0), grads.stride(0)
        backward_kernel[_grid(rows)](
            rows, gates, grads, dx, dgate, rows.shape[1], *strides, block=BLOCK, num_warps=WARPS
        )
    return dx, dgate


def _grid(rows: Tensor) -> tuple[int]:
    """Return the programs of a launch: the blocks of all rows, in the order they lie in memory."""
    return (rows.shape[0] * triton.cdiv(rows.shape[1], BLOCK),)


forward_op = torch.library.custom_op("hypenet::sigmoid_gate", forward, mutates_args=())
backward_op = torch.library.custom_op("hypenet::sigmoid_gate_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(x: Tensor, gate: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(x.shape)
