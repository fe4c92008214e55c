"""Functions for kernels over rows: the view of a tensor as rows, and the number of warps for a
whole row."""

import triton
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Reshape [..., n] to [rows, n] with each row contiguous; copy only when rows are not
    contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def warps_of_row(width: int) -> int:
    """Return the number of warps: sixteen elements per thread, in 4 to 16 warps."""
    return max(4, min(16, triton.next_power_of_2(width) // 512))
