"""L2 normalisation of the heads of q and k, as the delta rules need it."""

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype

EPSILON = 1e-6
"""Added to the sum of squares (HypeNet reference, mixers gdn and kda; fla.modules.l2norm)."""


def l2_norm(x: Tensor) -> Tensor:
    """Return x / sqrt(sum(x^2) + 1e-6) over the last dimension, in x's dtype; computed in float32,
    in float64 for float64 inputs."""
    accumulated = x.to(accumulation_dtype(x.dtype))
    return (accumulated * torch.rsqrt(accumulated.square().sum(-1, keepdim=True) + EPSILON)).to(
        x.dtype
    )
