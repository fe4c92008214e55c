"""The dtype in which sums are kept."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype for tensors of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
