"""Triton kernels of `norm_rope`. A program takes a few tokens and all of their heads: each sine is
taken once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# with 128 columns a thread then moves 16 bytes at a time
TOKENS = 8
WARPS = 2

# One kernel for all values: a batch of one, for example, would be compiled, and have to be checked,
# separately.
SIZES = ["rows", "batch", "heads"]


@triton.jit
def _places(x_rows, batch, stride_t, stride_b, tokens: tl.constexpr):
    """Return offsets of this program's rows (tokens times batch, batch innermost), their positions
    along t, and which exist."""
    row = tl.program_id(0) * tokens + tl.arange(0, tokens)
    position = row // batch
    return (
        position.to(tl.int64) * stride_t + (row % batch).to(tl.int64) * stride_b,
        position,
        row < x_rows,
    )


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x, y, weight, angles, rows, batch, heads, eps,
    stride_xt, stride_xb, stride_xh, stride_yt, stride_yb, stride_yh, stride_at,
    half: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """Compute y1 = a cos - b sin, y2 = b cos + a sin with (a, b) the normalised and weighted halves
    of x; without angles y = (a, b)."""
    col = tl.arange(0, half)[None, :]
    x_at, position, exists = _places(rows, batch, stride_xt, stride_xb, tokens)
    y_at, _, _ = _places(rows, batch, stride_yt, stride_yb, tokens)
    inside = exists[:, None]
    if angles is not None:
        angle = tl.load(
            angles + position[:, None].to(tl.int64) * stride_at + col, mask=inside, other=0.0
        ).to(tl.float32)
        cos, sin = tl.cos(angle), tl.sin(angle)
    w1 = tl.load(weight + col).to(tl.float32)
    w2 = tl.load(weight + half + col).to(tl.float32)
    for head in range(heads):
        at = x + (x_at + head * stride_xh)[:, None] + col
        x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps)[:, None]
        a, b = x1 * inverse_rms * w1, x2 * inverse_rms * w2
        to = y + (y_at + head * stride_yh)[:, None] + col
        if angles is not None:
            a, b = a * cos - b * sin, b * cos + a * sin
        tl.store(to, a.to(y.dtype.element_ty), mask=inside)
        tl.store(to + half, b.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    x, dy, dx, dweight, weight, angles, rows, batch, heads, eps,
    stride_xt, stride_xb, stride_xh, stride_yt, stride_yb, stride_yh, stride_dt, stride_db,
    stride_dh, stride_at,
    half: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """Compute dx, and this program's share of dweight, one row of `dweight` [programs, 2 half]:
    summed later, in a fixed order."""
    col = tl.arange(0, half)[None, :]
    x_at, position, exists = _places(rows, batch, stride_xt, stride_xb, tokens)
    y_at, _, _ = _places(rows, batch, stride_yt, stride_yb, tokens)
    dx_at, _, _ = _places(rows, batch, stride_dt, stride_db, tokens)
    inside = exists[:, None]
    if angles is not None:
        angle = tl.load(
            angles + position[:, None].to(tl.int64) * stride_at + col, mask=inside, other=0.0
        ).to(tl.float32)
        cos, sin = tl.cos(angle), tl.sin(angle)
    w1 = tl.load(weight + col).to(tl.float32)
    w2 = tl.load(weight + half + col).to(tl.float32)
    sum1 = tl.zeros([tokens, half], dtype=tl.float32)
    sum2 = tl.zeros([tokens, half], dtype=tl.float32)
    for head in range(heads):
        at = x + (x_at + head * stride_xh)[:, None] + col
        dy_from = dy + (y_at + head * stride_yh)[:, None] + col
        x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        dy1 = tl.load(dy_from, mask=inside, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_from + half, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps
        # rows past the end add nothing to dweight, whatever eps
        inverse_rms = tl.where(exists, tl.rsqrt(mean_square), 0.0)[:, None]
        n1, n2 = x1 * inverse_rms, x2 * inverse_rms
        da = dy1
        db = dy2
        if angles is not None:
            da = dy1 * cos + dy2 * sin
            db = dy2 * cos - dy1 * sin
        sum1 += da * n1
        sum2 += db * n2
        da, db = da * w1, db * w2
        mean = tl.sum(da * n1 + db * n2, axis=1)[:, None] / (2 * half)
        to = dx + (dx_at + head * stride_dh)[:, None] + col
        tl.store(to, ((da - n1 * mean) * inverse_rms).to(dx.dtype.element_ty), mask=inside)
        tl.store(to + half, ((db - n2 * mean) * inverse_rms).to(dx.dtype.element_ty), mask=inside)
    own = dweight + tl.program_id(0) * (2 * half) + tl.arange(0, half)
    tl.store(own, tl.sum(sum1, axis=0))
    tl.store(own + half, tl.sum(sum2, axis=0))


def forward(x: Tensor, weight: Tensor, angles: Tensor | None, eps: float) -> Tensor:
    """x [t, b, h, d], angles [t, d] or None -> contiguous [t, b, h, d]."""
    t, b, h, d = x.shape
    y = x.new_empty(x.shape)
    forward_kernel[(triton.cdiv(t * b, TOKENS),)](
        x,
        y,
        weight,
        angles,
        t * b,
        b,
        h,
        eps,
        *x.stride()[:3],
        *y.stride()[:3],
        0 if angles is None else angles.stride(0),
        half=d // 2,
        tokens=TOKENS,
        num_warps=WARPS,
    )
    return y


def backward(
    x: Tensor,
    weight: Tensor,
    angles: Tensor | None,
    dy: Tensor,
    eps: float,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dx [t, b, h, d] (contiguous, or the given tensor, filled) and dweight [d] in weight's
    dtype."""
    t, b, h, d = x.shape
    programs = triton.cdiv(t * b, TOKENS)
    dx = x.new_empty(x.shape) if dx is None else dx
    partial = x.new_empty(programs, d, dtype=torch.float32)
    backward_kernel[(programs,)](
        x,
        dy,
        dx,
        partial,
        weight,
        angles,
        t * b,
        b,
        h,
        eps,
        *x.stride()[:3],
        *dy.stride()[:3],
        *dx.stride()[:3],
        0 if angles is None else angles.stride(0),
        half=d // 2,
        tokens=TOKENS,
        num_warps=WARPS,
    )
    return dx, partial.sum(0).to(weight.dtype)


forward_op = torch.library.custom_op("hypenet::norm_rope", forward, mutates_args=())


def _backward(
    x: Tensor, weight: Tensor, angles: Tensor | None, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return backward(x, weight, angles, dy, eps)


backward_op = torch.library.custom_op("hypenet::norm_rope_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(x: Tensor, weight: Tensor, angles: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@backward_op.register_fake
def _(
    x: Tensor, weight: Tensor, angles: Tensor | None, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)
