"""The fixed decays of Lightning Attention: ALiBi's slopes, the same in every layer, never learned.

Source: arXiv 2601.22156 (HypeNet); slopes as in ALiBi, arXiv 2108.12409, section 3.
`fla.ops.lightning_attn` scales its decays by the layer index and is NOT this function."""

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slopes of all heads, float64 [num_heads]; the decay of head h is `exp(-slope[h])`
    per token.

    For a power of two n: `2^(-8 (i + 1) / n)`, i = 0..n-1. Otherwise the slopes of the power of two
    m below n, followed by every second slope of the set for 2m, until there are n. Tensor-parallel
    ranks compute all heads and then take their slice. Raises ValueError when `num_heads` is not
    positive."""
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: at least one head is needed")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(power) + _geometric(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float64)


def log_decay(num_heads: int) -> Tensor:
    """Return the log of the per-token decay of each head, float64 [num_heads], all negative:
    `-alibi_slopes`."""
    return -alibi_slopes(num_heads)


def _geometric(count: int) -> list[float]:
    return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]
