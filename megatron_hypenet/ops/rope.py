"""Rotary position embedding in the rotate-half convention of Qwen3 and Llama (arXiv 2104.09864),
and its frequencies scaled for longer contexts."""

import math

import torch
from torch import Tensor

from megatron_hypenet.config.rope import Llama3Scaling, RopeScaling, YarnScaling


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the last dimension of `x` by `angles`, both broadcastable: x [t, b, h, k], angles [t,
    1, 1, k] -> [t, b, h, k].

    `angles` holds each frequency twice (first half, second half), as Megatron's RotaryEmbedding
    returns it, in fp32 or wider. Cosine and sine are taken in the dtype of `angles`, then cast to
    x's: positions never pass through bf16."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def scaled_frequencies(inverse: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Return the scaled form of plain RoPE's angles per token, `inverse` [d / 2] = base^(-2 i / d)
    -> [d / 2] in its dtype."""
    if isinstance(scaling, Llama3Scaling):
        return llama3_frequencies(inverse, scaling)
    return yarn_frequencies(inverse, base, scaling)


def llama3_frequencies(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Apply Llama 3.1's rule (`rope_type` llama3 of its published config.json): with n turns within
    the original context, s = (n - low) / (high - low) held within 0 and 1, the result is
    inverse * (s + (1 - s) / factor)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / scaling.factor)


def yarn_frequencies(inverse: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    """Apply YaRN (arXiv 2309.00071, section 3.2): channels that turn often keep their frequency,
    slow ones are divided by `factor`, with a linear ramp over the channels between. The ramp's ends
    are whole channels, as in the paper's code and in transformers."""
    half = inverse.shape[0]

    def channel(turns: float) -> float:
        per_turn = scaling.original_max_position_embeddings / turns
        return half * math.log(per_turn / (2 * math.pi)) / math.log(base)

    first = max(math.floor(channel(scaling.beta_fast)), 0)
    last = min(math.ceil(channel(scaling.beta_slow)), 2 * half - 1)
    channels = torch.arange(half, dtype=inverse.dtype, device=inverse.device)
    stretched = ((channels - first) / max(last - first, 0.001)).clamp(0, 1)
    return inverse * (1 - stretched + stretched / scaling.factor)
