"""Triton kernel of `adamw`: one flat block per program, each element read and written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from megatron_hypenet.ops.adamw import AdamWStep

BLOCK = 1024
WARPS = 4
VECTOR = 4
"""Adjacent elements per thread: 16 bytes of fp32, and half of that for bf16 weights."""


@triton.jit
def kernel(
    weight, gradient, exp_avg, exp_avg_sq, compute_weight, scale, count, kept, beta1, rest1, beta2,
    rest2, step_size, root_correction, eps,
    block: tl.constexpr, vector: tl.constexpr,
):  # fmt: skip
    """Apply m = beta1 m + rest1 g, s = beta2 s + rest2 g^2 and w = kept w - step_size m / (sqrt(s)
    / root_correction + eps), with g scaled.

    Writes nothing where the scale is NaN."""
    factor = tl.load(scale)
    at = tl.program_id(0).to(tl.int64) * block + tl.max_contiguous(tl.arange(0, block), vector)
    inside = at < count
    if factor < float("inf"):
        grad = tl.load(gradient + at, mask=inside, other=0.0) * factor
        mean = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * grad
        square = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * grad * grad
        value = kept * tl.load(weight + at, mask=inside, other=0.0) - step_size * mean / (
            tl.sqrt(square) / root_correction + eps
        )
        tl.store(exp_avg + at, mean, mask=inside)
        tl.store(exp_avg_sq + at, square, mask=inside)
        tl.store(weight + at, value, mask=inside)
        tl.store(compute_weight + at, value.to(compute_weight.dtype.element_ty), mask=inside)


def run(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute_weight: Tensor,
    step: AdamWStep,
    scale: Tensor,
) -> None:
    """Launch the kernel on contiguous tensors of one size. The remainder after whole blocks is a
    launch of its own, so that a size which no power of two divides loses vectorised accesses only
    there."""
    tensors = [x.detach().view(-1) for x in (weight, gradient, exp_avg, exp_avg_sq, compute_weight)]
    count = tensors[0].numel()
    (beta1, beta2) = step.betas
    whole = count - count % BLOCK
    for start, stop in ((0, whole), (whole, count)):
        if start == stop:
            continue
        kernel[(triton.cdiv(stop - start, BLOCK),)](
            *(x[start:stop] for x in tensors),
            scale,
            stop - start,
            1.0 - step.lr * step.weight_decay,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            step.step_size,
            step.root_correction,
            step.eps,
            block=BLOCK,
            vector=VECTOR,
            num_warps=WARPS,
        )
