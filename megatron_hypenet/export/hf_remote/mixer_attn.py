"""Softmax attention of a HypeNet: grouped queries, no positions, logit scaling, an output gate.

Shapes: b rows, t new tokens, h heads, g key/value heads, d head_dim, H hidden_size."""

import math

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .attention_hypenet import softmax_attention
from .layers_hypenet import HypeNetMixer
from .ops_hypenet import Step, hype_constant
from .slots_hypenet import KeyValueSlot


class HypeNetSoftmaxMixer(HypeNetMixer):
    """Grouped-query softmax attention without positions, with logit scaling and an output gate."""

    hf_names = ("attn",)
    steps_in_place = True

    def __init__(self, config: PretrainedConfig) -> None:
        """Read sizes and switches from the configuration."""
        super().__init__(config, gate="o_gate", qk_norm=config.attn_use_qk_norm)

    @staticmethod
    def shared(config: PretrainedConfig, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the logit scaling at these positions."""
        return query_scale(config.attn_logits_scaling, positions, dtype)

    @staticmethod
    def new_cache() -> KeyValueSlot:
        """Return a slot for keys and values."""
        return KeyValueSlot()

    def forward(self, x: Tensor, step: Step, slot: KeyValueSlot | None) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        q, k, v = self.project(x)
        scale = step.shared[self.hf_names[0]]
        if scale is not None:
            q = (q * scale).to(q.dtype)
        if slot is not None:
            k, v = slot.update(k, v, step.at)
        o = softmax_attention(q, k, v, step, plain=self.config._attn_implementation == "eager")
        return self.merge(o.transpose(1, 2).flatten(2), x)


def query_scale(
    setting: str | float | None, positions: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return the factor of q in softmax layers at 0-based `positions` [b or 1, t]: ln(t + a) /
    ln(a) for "hype <a>", a constant, or None."""
    a = hype_constant(setting)
    if a is not None:
        return (torch.log(positions.to(dtype) + a) / math.log(a))[:, None, :, None]
    return (
        None
        if setting is None
        else torch.full((1, 1, 1, 1), float(setting), dtype=dtype, device=positions.device)
    )


MIXER = HypeNetSoftmaxMixer
