"""Triton kernel of `gradient_sum`: one flat block per program, each element read and written
once."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4
VECTOR = 4
"""Adjacent elements per thread: 16 bytes of the sum. With eight, which are 16 bytes of a bf16
gradient, the store would first have to move elements to other threads through shared memory."""


@triton.jit
def kernel(total, gradient, count, add: tl.constexpr, block: tl.constexpr, vector: tl.constexpr):
    """Compute total = gradient, or total += gradient. The width of the accesses follows from the
    alignment of both, which each launch checks."""
    at = tl.program_id(0).to(tl.int64) * block + tl.max_contiguous(tl.arange(0, block), vector)
    inside = at < count
    value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if add:
        value += tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, value, mask=inside)


def run(total: Tensor, gradient: Tensor, add: bool) -> None:
    """Launch the kernel on contiguous tensors of one size; total is fp32, and is overwritten or
    added to."""
    if count := total.numel():
        kernel[(triton.cdiv(count, BLOCK),)](
            total, gradient, count, add=add, block=BLOCK, vector=VECTOR, num_warps=WARPS
        )
