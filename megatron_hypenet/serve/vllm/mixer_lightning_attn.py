"""Lightning Attention in vLLM: a decayed state per head, one norm over all heads, an output
gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from megatron_hypenet.export.hf_remote.mixer_lightning_attn import (
    HypeNetLightningMixer,
    alibi_slopes,
)
from megatron_hypenet.export.hf_remote.ops_hypenet import rotate
from megatron_hypenet.ops.lightning_attn import StateSlots, lightning_attn, lightning_decode
from megatron_hypenet.serve.vllm.layers import MixerParts, NormOverRanks, Positions
from megatron_hypenet.serve.vllm.states import StateLayer, read_states, write_states


class LightningState(StateLayer):
    """S_t = gamma S_(t-1) + k_t v_t^T, o_t = q_t S_t / sqrt(d). A rank has some of the heads: its
    decays are those of these heads among all."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Compute the decays of this rank's heads."""
        super().__init__(vllm_config, prefix)
        config: Any = vllm_config.model_config.hf_config
        local = self.get_state_shape()[0][0]
        first = get_tensor_model_parallel_rank() * local
        # on the CPU: the kernels keep a copy on their device
        slopes = alibi_slopes(config.num_attention_heads, torch.device("cpu"), torch.float32)
        self.log_decay = -slopes[first : first + local]
        self.scale = config.head_dim**-0.5

    def decode(self, inputs: list[Tensor], slots: Tensor, new: Tensor) -> Tensor:
        """Decode as the base class says; inputs are q, k, v."""
        q, k, v = inputs
        states = StateSlots(self.kv_cache[0], slots, new)
        return lightning_decode(q, k, v, self.log_decay, states, scale=self.scale)

    def prefill(self, inputs: list[Tensor], slot: Tensor, new: bool) -> Tensor:
        """Process the tokens of one request, as the base class says."""
        q, k, v = (x[None] for x in inputs)
        before = None if new else read_states(self.kv_cache[0], slot, new)
        o, after = lightning_attn(q, k, v, self.log_decay, scale=self.scale, initial_state=before)
        write_states(self.kv_cache[0], slot, after)
        return o[0]


class LightningLayer(MixerParts):
    """The projections, norms and gate around the states."""

    state_class: ClassVar[type[StateLayer]] = LightningState

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Read sizes from the configuration."""
        config: Any = vllm_config.model_config.hf_config
        heads = config.num_attention_heads
        super().__init__(config, vllm_config.quant_config, prefix, kv_heads=heads, gate="z_proj")
        self.o_norm = NormOverRanks(heads * config.head_dim, config.rms_norm_eps)
        self.state = LightningState(vllm_config, f"{prefix}.state")

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """x [T, H] -> [T, H]."""
        q, k, v = self.heads(*self.sections(x))
        q, k = (rotate(y, positions.cos, positions.sin) for y in (q, k))
        o = self.state.mixed([q, k, v], torch.empty_like(q)).flatten(1)
        return self.o_proj(self.o_norm(o) * torch.sigmoid(self.gate_of(x)))[0]


HF_NAMES = HypeNetLightningMixer.hf_names
MIXER = LightningLayer
