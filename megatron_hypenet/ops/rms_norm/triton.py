"""Triton kernels of `rms_norm`: forward one row per program, backward a strided set of rows, so
that dweight has few partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.rows import as_rows, warps_of_row

BACKWARD_PROGRAMS = 528  # four for each multiprocessor of an H100
# `rows` stays a run-time argument: a single row would otherwise be compiled, and have to be
# checked, separately.


@triton.jit
def forward_kernel(
    x, residual, summed, y, weight, width, eps, stride_x, stride_residual, block: tl.constexpr
):
    """Compute y = x r w, r = (mean x^2 + eps)^(-1/2); with a residual all that of summed = x +
    residual, rounded. Outputs are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, block)
    inside = col < width
    value = tl.load(x + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * stride_residual + col, mask=inside, other=0.0).to(
            tl.float32
        )
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row * width + col, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(
        y + row * width + col, (value * inverse_rms * scale).to(y.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    x, dy, dresidual, dx, dweight, weight, rows, width, eps, stride_x, stride_dy, stride_dresidual,
    block: tl.constexpr
):  # fmt: skip
    """Compute dx (contiguous) = r (w dy - x r^2 mean(w dy x)), plus dresidual where there is one,
    and this program's share of dweight, one row of `dweight` [programs, width].

    A row is loaded while the previous one is processed; the two means are independent."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, block)
    inside = col < width
    scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([block], dtype=tl.float32)
    first = program.to(tl.int64)
    next_x = tl.load(x + first * stride_x + col, mask=inside, other=0.0)
    next_dy = tl.load(dy + first * stride_dy + col, mask=inside, other=0.0)
    for turn in range(tl.cdiv(rows - program, programs)):
        row = first + turn * programs
        value, grad = next_x.to(tl.float32), next_dy.to(tl.float32)
        if dresidual is not None:
            # needed only after the means
            beside = tl.load(dresidual + row * stride_dresidual + col, mask=inside, other=0.0)
        asked = col < tl.where(row + programs < rows, width, 0)
        next_x = tl.load(x + (row + programs) * stride_x + col, mask=asked, other=0.0)
        next_dy = tl.load(dy + (row + programs) * stride_dy + col, mask=asked, other=0.0)
        weighted = grad * scale
        inverse_rms = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        mean = tl.sum(weighted * value, axis=0) / width * inverse_rms
        normal = value * inverse_rms
        total += grad * normal
        dvalue = (weighted - normal * mean) * inverse_rms
        if dresidual is not None:
            dvalue += beside.to(tl.float32)
        tl.store(dx + row * width + col, dvalue.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + first * width + col, total, mask=inside)


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] -> contiguous [..., n]."""
    return _forward(x, None, weight, eps)[0]


def add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., n] -> norm of their sum, and the sum, contiguous [..., n] in x's dtype."""
    return _forward(x, residual, weight, eps)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm, and its input: x, or the sum of x and the residual."""
    n = x.shape[-1]
    y = x.new_empty(x.shape)
    rows = as_rows(x)
    added, summed = (None, None) if residual is None else (as_rows(residual), x.new_empty(x.shape))
    if y.numel():
        forward_kernel[(rows.shape[0],)](
            rows,
            added,
            summed,
            y,
            weight.contiguous(),
            n,
            eps,
            rows.stride(0),
            0 if added is None else added.stride(0),
            block=triton.next_power_of_2(n),
            num_warps=warps_of_row(n),
        )
    return y, x if summed is None else summed


def backward(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, dy [..., n] -> dx [..., n] contiguous, dweight [n] in weight's dtype, the same in every
    run.

    `dresidual` [..., n] is a further gradient of x: dx is then the sum, rounded once."""
    n = x.shape[-1]
    dx = x.new_empty(x.shape)
    rows = as_rows(x)
    grads = as_rows(dy)
    beside = None if dresidual is None else as_rows(dresidual)
    programs = min(rows.shape[0], BACKWARD_PROGRAMS)
    partial = x.new_empty(programs, n, dtype=torch.float32)
    if dx.numel():
        backward_kernel[(programs,)](
            rows, grads, beside, dx, partial, weight.contiguous(), rows.shape[0], n, eps,
            rows.stride(0), grads.stride(0), 0 if beside is None else beside.stride(0),
            block=triton.next_power_of_2(n), num_warps=warps_of_row(n),
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


forward_op = torch.library.custom_op("hypenet::rms_norm", forward, mutates_args=())
add_forward_op = torch.library.custom_op("hypenet::add_rms_norm", add_forward, mutates_args=())
backward_op = torch.library.custom_op("hypenet::rms_norm_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@add_forward_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@backward_op.register_fake
def _(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)
