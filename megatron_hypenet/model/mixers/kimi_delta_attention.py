"""Kimi Delta Attention in HypeNet's slot (arXiv 2510.26692; reference: mixer `kda` of arXiv
2601.22156)."""

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F

from megatron_hypenet.config.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from megatron_hypenet.model.mixers.base import Mixer, register_mixer
from megatron_hypenet.model.mixers.gated_delta_net import (
    at_least_float32,
    log_decay,
)
from megatron_hypenet.ops.kimi_delta_attention import kimi_delta_attention
from megatron_hypenet.ops.l2_norm import l2_norm
from megatron_hypenet.ops.short_conv import short_conv
from megatron_hypenet.parallel.context.delta_rule import context_delta_rule
from megatron_hypenet.parallel.context.state_exchange import (
    join_chunks,
    preceding_ids,
    preceding_tokens,
)
from megatron_hypenet.parallel.norm import RMSNorm


@register_mixer("kimi_delta_attention")
class KimiDeltaAttention(Mixer):
    """A delta rule with one decay per key channel and token."""

    spec: KimiDeltaAttentionSpec

    def add_modules(self) -> None:
        """Build the norms of q and k, and the norm of each head's output."""
        super().add_modules()
        self.o_norm = RMSNorm(
            self.config, self.head_dim, self.model.layernorm_epsilon, per_head=True
        )

    def mix(
        self, parts: dict[str, Tensor], rotary_pos_emb: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        """Run the convolutions, the delta rule over the sequence, one norm per head, then the
        gate."""
        mixed = [parts[name] for name in "qkv"]
        if self.spec.conv:
            mixed = self._convolved(mixed, document_ids)
        q, k, v = mixed
        angles = rotary_pos_emb if self.spec.rope else None
        q = l2_norm(self.normalised("q", q, angles))
        k = l2_norm(self.normalised("k", k, angles))
        v = self.heads(v)
        # [b, t, heads, head_dim], the op's order
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        step = self._expanded(parts["decay_down"], "decay_up")
        o = context_delta_rule(
            kimi_delta_attention,
            q,
            k,
            v,
            log_decay(self.weight("A_log"), step, self.weight("dt_bias")),
            torch.sigmoid(at_least_float32(parts["beta"])).transpose(0, 1),
            scale=1.0 / math.sqrt(self.head_dim),
            group=self.context_group,
            document_ids=document_ids,
        )
        normed: Any = self.o_norm(o.transpose(0, 1))
        return normed.flatten(-2) * torch.sigmoid(self._expanded(parts["gate_down"], "gate_up"))

    def _expanded(self, x: Tensor, name: str) -> Tensor:
        """Apply the second half of a low-rank projection: x [s, b, head_dim / tensor ranks], of
        which all heads need every channel -> [s, b, local heads * head_dim]."""
        if self.tensor_size > 1:
            x = all_gather_last_dim_from_tensor_parallel_region(x, group=self.tensor_group)
        return F.linear(x, self.weight(name))

    def _convolved(self, mixed: list[Tensor], document_ids: Tensor | None) -> list[Tensor]:
        """Return q, k and v [s, b, width] after their convolutions; one exchange for all three."""
        weight = torch.cat([self.weight(f"{letter}_conv") for letter in "qkv"])
        before = weight.shape[1] - 1
        group = self.context_group
        rows = preceding_tokens(torch.cat(mixed, dim=-1).transpose(0, 1), before, group)
        ids = preceding_ids(document_ids, before, group)
        joined = join_chunks(short_conv(rows, weight, ids), group).transpose(0, 1)
        return list(joined.chunk(3, dim=-1))
