"""Gated DeltaNet in vLLM: the delta rule with a learned decay per head, one norm per head, an
optional gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear

from megatron_hypenet.export.hf_remote.delta_hypenet import unit_length
from megatron_hypenet.export.hf_remote.mixer_gdn import HypeNetGatedDeltaNet
from megatron_hypenet.export.hf_remote.ops_hypenet import rotate
from megatron_hypenet.serve.vllm.delta import DeltaState
from megatron_hypenet.serve.vllm.layers import MixerParts, Positions, sharded
from megatron_hypenet.serve.vllm.states import StateLayer


class GatedDeltaNetLayer(MixerParts):
    """The projections, norms and gate around the states; keys and values may be grouped."""

    state_class: ClassVar[type[StateLayer]] = DeltaState

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Read sizes and switches from the configuration."""
        config: Any = vllm_config.model_config.hf_config
        super().__init__(
            config,
            vllm_config.quant_config,
            prefix,
            kv_heads=config.gdn_nkv,
            gate="g_proj" if config.gdn_use_gate else None,
            qk_norm=config.gdn_use_qk_norm,
        )
        self.use_rope = config.gdn_use_rope
        self.activated = config.gdn_activation is not None
        heads = config.num_attention_heads
        # two small products, which stay in the model's dtype
        self.a_proj = ColumnParallelLinear(config.hidden_size, heads, bias=False)
        self.b_proj = ColumnParallelLinear(config.hidden_size, heads, bias=False)
        self.A_log = sharded((heads,), 0, torch.float32)
        self.dt_bias = sharded((heads,), 0, torch.float32)
        self.o_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.state = DeltaState(vllm_config, f"{prefix}.state")

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """x [T, H] -> [T, H]."""
        sections = self.sections(x)
        q, k, v = self.heads(*(map(F.silu, sections) if self.activated else sections))
        if self.use_rope:
            q, k = (rotate(y, positions.cos, positions.sin) for y in (q, k))
        q, k = unit_length(q.float()), unit_length(k.float())
        k, v = (y.float().repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        rate = F.softplus(self.a_proj(x)[0].float() + self.dt_bias)
        log_decay = (-self.A_log.exp() * rate)[..., None]
        beta = 2.0 * self.b_proj(x)[0].float().sigmoid()
        o = self.state.mixed([q, k, v, log_decay, beta], torch.empty_like(q))
        o = self.o_norm(o.to(x.dtype)).flatten(1)
        return self.o_proj(o if self.gate_name is None else o * F.silu(self.gate_of(x)))[0]


HF_NAMES = HypeNetGatedDeltaNet.hf_names
MIXER = GatedDeltaNetLayer
