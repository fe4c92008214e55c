"""Gated DeltaNet in HypeNet's slot (arXiv 2412.06464; reference: mixer `gdn` of arXiv 2601.22156).

Its writes may overshoot (beta up to 2, so a transition may have negative eigenvalues), and each
head is normalised by itself before the gate."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hypenet.config.mixers.gated_delta_net import GatedDeltaNetSpec
from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.ops.gated_delta_rule import gated_delta_rule
from megatron_hypenet.ops.l2_norm import l2_norm
from megatron_hypenet.parallel.context.delta_rule import context_delta_rule
from megatron_hypenet.parallel.norm import RMSNorm


@register_mixer("gated_delta_net")
class GatedDeltaNet(Mixer):
    """A delta rule with one decay per head and token."""

    spec: GatedDeltaNetSpec

    def add_modules(self) -> None:
        """Build the norms of q and k, and the norm of each head's output."""
        super().add_modules()
        self.o_norm = RMSNorm(
            self.config, self.head_dim, self.model.layernorm_epsilon, per_head=True
        )

    def mix(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Run the delta rule over the sequence, one norm per head, then the gate."""
        q, k, v = (self._activated(parts[name]) for name in "qkv")
        angles = rotary_pos_emb if self.spec.rope else None
        q = l2_norm(self.normalised("q", q, angles))
        k = l2_norm(self.normalised("k", k, angles))
        v = self.heads(v)
        copies = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        # [b, t, heads, head_dim], the op's order
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        o = context_delta_rule(
            gated_delta_rule,
            q,
            k,
            v,
            log_decay(self.weight("A_log"), parts["decay"], self.weight("dt_bias")),
            2 * torch.sigmoid(at_least_float32(parts["beta"])).transpose(0, 1),
            scale=1.0 / math.sqrt(self.head_dim),
            group=self.context_group,
            document_ids=document_ids,
        )
        normed: Any = self.o_norm(o.transpose(0, 1))
        o = normed.flatten(-2)
        return o * F.silu(parts["gate"]) if self.spec.gate else o

    def _activated(self, x: Tensor) -> Tensor:
        return x if self.spec.activation is None else F.silu(x)


def log_decay(rate: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Compute -exp(rate) * softplus(x + bias) in float32 or wider: rate [h] and bias and x's last
    dimension [h] -> [b, t, h]; with bias [h * d] and x [s, b, h * d] -> [b, t, h, d]."""
    step = F.softplus(at_least_float32(x) + bias)
    factor = -rate.exp()
    if x.shape[-1] != rate.shape[0]:
        step = step.unflatten(-1, (rate.shape[0], -1))
        factor = factor[:, None]
    return (factor * step).transpose(0, 1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
