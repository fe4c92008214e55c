"""Rotary position embedding in the rotate-half convention of Qwen3 (arXiv 2104.09864)."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the last dimension of `x` by `angles`, both broadcastable: x [t, b, h, k], angles [t,
    1, 1, k] -> [t, b, h, k].

    `angles` holds each frequency twice (first half, second half), as Megatron's RotaryEmbedding
    returns it, in fp32 or wider. Cosine and sine are taken in the dtype of `angles`, then cast to
    x's: positions never pass through bf16."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
