"""HyPE's logit scaling of the softmax layers, used at inference: `s_t = ln(t + a) / ln(a)` at 0-based position t.

Source: arXiv 2601.22156. In a config: `"hype <a>"`, plain `"hype"` (a = 362), a number (constant factor), or null (off)."""

import math
import re

import torch
from torch import Tensor

HYPE_DEFAULT_A = 362.0
_PATTERN = re.compile(r"^\s*hype(?:\s+(\d+(?:\.\d+)?))?\s*$")


def parse_logits_scaling(value: str | float | None) -> tuple[str, float] | None:
    """`("hype", a)`, `("constant", factor)` or None (off).

    Raises ValueError for anything else; `a` must exceed 1, since ln(a) divides, and a constant must be positive and finite."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"attn_logits_scaling={value!r}: expected 'hype', 'hype <a>', a number or null")
    if isinstance(value, str):
        match = _PATTERN.match(value)
        if match is None:
            return parse_logits_scaling(_number(value))
        a = float(match.group(1)) if match.group(1) else HYPE_DEFAULT_A
        if a <= 1.0:
            raise ValueError(f"attn_logits_scaling={value!r}: a must exceed 1, because the scale divides by ln(a)")
        return "hype", a
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"attn_logits_scaling={value!r}: a constant factor must be positive and finite")
    return "constant", float(value)


def logits_scale(value: str | float | None, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Factor of q at each position, computed in float64 and cast: positions [t] (0-based, global) -> [t], or None when off."""
    parsed = parse_logits_scaling(value)
    if parsed is None:
        return None
    kind, number = parsed
    t = positions.to(torch.float64)
    scale = torch.log(t + number) / math.log(number) if kind == "hype" else torch.full_like(t, number)
    return scale.to(dtype)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"attn_logits_scaling={text!r}: expected 'hype', 'hype <a>', a number or null") from None
