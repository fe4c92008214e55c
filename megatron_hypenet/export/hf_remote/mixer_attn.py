"""Softmax attention of a HypeNet: grouped queries, no positions, logit scaling, an output gate.

Shapes: b rows, t new tokens, h heads, g key/value heads, d head_dim, H hidden_size."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig

from .cache_hypenet import KeyValueSlot
from .layers_hypenet import HypeNetMixer
from .ops_hypenet import Step, hype_constant, is_open

_QUERY_BLOCK_TOKENS = 1024


class HypeNetSoftmaxMixer(HypeNetMixer):
    """Grouped-query softmax attention without positions, with logit scaling and an output gate."""

    hf_names = ("attn",)

    def __init__(self, config: PretrainedConfig) -> None:
        """Sizes from the configuration."""
        super().__init__(config, gate="o_gate")

    @staticmethod
    def shared(config: PretrainedConfig, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Logit scaling at these positions."""
        return query_scale(config.attn_logits_scaling, positions, dtype)

    @staticmethod
    def new_cache() -> KeyValueSlot:
        """Keys and values."""
        return KeyValueSlot()

    def forward(self, x: Tensor, step: Step, slot: KeyValueSlot | None) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        q, k, v = self.project(x)
        scale = step.shared[self.hf_names[0]]
        if scale is not None:
            q = (q * scale).to(q.dtype)
        if slot is not None:
            k, v = slot.update(k, v)
        o = softmax_attention(q, k, v, step, plain=self.config._attn_implementation == "eager")
        return self.merge(o.transpose(1, 2).flatten(2), x)


def query_scale(
    setting: str | float | None, positions: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Factor of q in softmax layers at 0-based `positions` [b or 1, t]: ln(t + a) / ln(a) for "hype
    <a>", a constant, or None."""
    a = hype_constant(setting)
    if a is not None:
        return (torch.log(positions.to(dtype) + a) / math.log(a))[:, None, :, None]
    return (
        None
        if setting is None
        else torch.full((1, 1, 1, 1), float(setting), dtype=dtype, device=positions.device)
    )


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, step: Step, *, plain: bool = False
) -> Tensor:
    """Causal attention of q [b, h, t, d] over k, v [b, g, past + t, d] -> [b, h, t, d]; padded keys
    are left out.

    `plain`: by products and a softmax, not by a fused kernel."""
    if plain:
        with sdpa_kernel(SDPBackend.MATH):
            return softmax_attention(q, k, v, step)
    b, h, t, d = q.shape
    groups = k.shape[1]
    if t == 1:
        # the query heads of one group become its queries: no copy of k and v for grouped heads
        mask = None if step.real is None else (step.real | _is_last(step.real))[:, None, None, :]
        o = F.scaled_dot_product_attention(
            q.reshape(b, groups, h // groups, d), k, v, attn_mask=mask
        )
        return o.reshape(b, h, 1, d)
    k, v = (x.repeat_interleave(h // groups, dim=1) for x in (k, v))
    if step.real is None and step.past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    columns = torch.arange(step.past + t, device=q.device)
    blocks = [(0, t)]
    if not is_open(t):
        starts = range(0, t, _QUERY_BLOCK_TOKENS)
        blocks = [(start, min(start + _QUERY_BLOCK_TOKENS, t)) for start in starts]
    outputs = []
    for start, stop in blocks:
        own = columns[step.past + start : step.past + stop, None]
        mask = (columns <= own)[None]
        if step.real is not None:
            # a padded query sees itself: a row without any key would be NaN
            mask = mask & (step.real[:, None, :] | (columns == own))
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=mask[:, None])
        )
    return torch.cat(outputs, dim=2)


def _is_last(real: Tensor) -> Tensor:
    last = torch.zeros_like(real[:1])
    last[:, -1] = True
    return last


MIXER = HypeNetSoftmaxMixer
