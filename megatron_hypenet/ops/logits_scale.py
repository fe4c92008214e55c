"""HyPE's logit scaling of the softmax layers, used at inference: `s_t = ln(t + a) / ln(a)` at
0-based position t.

Source: arXiv 2601.22156. A config says `"hype <a>"`, plain `"hype"` (a = 362), a number (constant
factor), or null (off); `config/model.py` has already refused anything else."""

import math

import torch
from torch import Tensor

from megatron_hypenet.config.model import check_logits_scaling

HYPE_DEFAULT_A = 362.0


def logits_scale(value: str | float | None, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Compute the factor of q at each position in float64 and cast it: positions [t] (0-based,
    global) -> [t], or None when off.
    -> [t], or None when off.

    Raises ValueError for a value that no config accepts."""
    value = check_logits_scaling(value)
    if value is None:
        return None
    t = positions.to(torch.float64)
    if isinstance(value, float):
        return torch.full_like(t, value).to(dtype)
    _, _, number = value.partition(" ")
    a = float(number) if number else HYPE_DEFAULT_A
    return (torch.log(t + a) / math.log(a)).to(dtype)
