"""Softmax attention in vLLM: grouped queries, no positions, scaled queries, an output gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from megatron_hypenet.export.hf_remote.mixer_attn import HypeNetSoftmaxMixer
from megatron_hypenet.serve.vllm.layers import MixerParts, Positions
from megatron_hypenet.serve.vllm.plugin import cached_head_size


class SoftmaxLayer(MixerParts):
    """Queries are scaled before the engine's attention: they are never cached, so the scale of a
    position does not depend on how a prompt is cut or paged."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Read sizes from the configuration."""
        config: Any = vllm_config.model_config.hf_config
        super().__init__(
            config,
            vllm_config.quant_config,
            prefix,
            kv_heads=config.num_key_value_heads,
            gate="o_gate",
            qk_norm=config.attn_use_qk_norm,
        )
        self.filled = cached_head_size(self.head_dim)
        self.attn = Attention(
            self.num_heads,
            self.filled,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """x [T, H] -> [T, H]."""
        q, k, v = self.heads(*self.sections(x))
        if positions.query_scale is not None:
            q = (q * positions.query_scale).to(q.dtype)
        if fill := self.filled - self.head_dim:
            q, k, v = (F.pad(y, (0, fill)) for y in (q, k, v))
        o = self.attn(q.flatten(1), k.flatten(1), v.flatten(1).contiguous())
        o = o.unflatten(-1, (-1, self.filled))[..., : self.head_dim].flatten(1)
        return self.o_proj(o * torch.sigmoid(self.gate_of(x)))[0]


HF_NAMES = HypeNetSoftmaxMixer.hf_names
MIXER = SoftmaxLayer
