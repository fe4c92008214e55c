"""Triton kernels of `gated_norm`: forward one row per program, backward a strided set of rows, so
that dweight has few partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.rows import warps_of_row

BACKWARD_PROGRAMS = 528  # four for each multiprocessor of an H100
# `batch` and `rows` stay run-time arguments: a batch of one would otherwise be compiled, and have
# to be checked, separately.


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    x,
    gate,
    y,
    weight,
    batch,
    width,
    eps,
    stride_xt,
    stride_xb,
    stride_gt,
    stride_gb,
    stride_yt,
    stride_yb,
    block: tl.constexpr,
):
    """Compute y = x r w sigmoid(gate) with r = (mean x^2 + eps)^(-1/2)."""
    row = tl.program_id(0)
    col = tl.arange(0, block)
    t = (row // batch).to(tl.int64)
    b = (row % batch).to(tl.int64)
    inside = col < width
    value = tl.load(x + t * stride_xt + b * stride_xb + col, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(
        tl.load(gate + t * stride_gt + b * stride_gb + col, mask=inside, other=0.0).to(tl.float32)
    )
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(
        y + t * stride_yt + b * stride_yb + col,
        (value * inverse_rms * scale * opened).to(y.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["rows", "batch"])
def backward_kernel(
    x, gate, dy, dx, dgate, dweight, weight, rows, batch, width, eps, stride_xt, stride_xb,
    stride_gt, stride_gb, stride_yt, stride_yb,
    stride_dt, stride_db, block: tl.constexpr,
):  # fmt: skip
    """Compute dx (contiguous), dgate, and this program's share of dweight, one row of `dweight`
    [programs, width]."""
    program = tl.program_id(0)
    col = tl.arange(0, block)
    inside = col < width
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([block], dtype=tl.float32)
    for turn in range(tl.cdiv(rows - program, tl.num_programs(0))):
        row = program + turn * tl.num_programs(0)
        t = (row // batch).to(tl.int64)
        b = (row % batch).to(tl.int64)
        value = tl.load(x + t * stride_xt + b * stride_xb + col, mask=inside, other=0.0).to(
            tl.float32
        )
        opened = tl.sigmoid(
            tl.load(gate + t * stride_gt + b * stride_gb + col, mask=inside, other=0.0).to(
                tl.float32
            )
        )
        grad = tl.load(dy + t * stride_yt + b * stride_yb + col, mask=inside, other=0.0).to(
            tl.float32
        )
        inverse_rms = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        normal = value * inverse_rms
        total += grad * opened * normal
        grad = grad * scale
        to = row.to(tl.int64) * width + col
        tl.store(
            dgate + t * stride_dt + b * stride_db + col,
            (grad * normal * opened * (1 - opened)).to(dgate.dtype.element_ty),
            mask=inside,
        )
        grad = grad * opened
        mean = tl.sum(grad * normal, axis=0) / width
        tl.store(
            dx + to, ((grad - normal * mean) * inverse_rms).to(dx.dtype.element_ty), mask=inside
        )
    tl.store(dweight + program * width + col, total, mask=inside)


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate [t, b, n] -> contiguous [t, b, n]."""
    t, b, n = x.shape
    y = x.new_empty(x.shape)
    forward_kernel[(t * b,)](
        x, gate, y, weight, b, n, eps, *x.stride()[:2], *gate.stride()[:2], *y.stride()[:2],
        block=triton.next_power_of_2(n), num_warps=warps_of_row(n),
    )  # fmt: skip
    return y


def backward(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float, dgate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [t, b, n] contiguous, dgate [t, b, n] (contiguous, or the given tensor, filled),
    dweight [n] in weight's dtype."""
    t, b, n = x.shape
    programs = min(t * b, BACKWARD_PROGRAMS)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(programs, n, dtype=torch.float32)
    dgate = gate.new_empty(x.shape) if dgate is None else dgate
    backward_kernel[(programs,)](
        x,
        gate,
        dy,
        dx,
        dgate,
        partial,
        weight,
        t * b,
        b,
        n,
        eps,
        *x.stride()[:2],
        *gate.stride()[:2],
        *dy.stride()[:2],
        *dgate.stride()[:2],
        block=triton.next_power_of_2(n),
        num_warps=warps_of_row(n),
    )
    return dx, dgate, partial.sum(0).to(weight.dtype)


forward_op = torch.library.custom_op("hypenet::gated_norm", forward, mutates_args=())


def _backward(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(x, gate, weight, dy, eps)


backward_op = torch.library.custom_op("hypenet::gated_norm_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(
    x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(x.shape), torch.empty_like(weight)
