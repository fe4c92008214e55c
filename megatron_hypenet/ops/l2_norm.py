"""L2 normalisation of the heads of q and k, as the delta rules need it."""

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the sum of squares (HypeNet reference, mixers gdn and kda; fla.modules.l2norm)."""


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, in x's dtype; computed in float32, in
    float64 for float64 inputs."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON)).to(x.dtype)
