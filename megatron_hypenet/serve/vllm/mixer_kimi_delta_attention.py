"""Kimi Delta Attention in vLLM: the delta rule with a learned decay per key channel, optional short
convolutions, one norm per head, a gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear

from megatron_hypenet.export.hf_remote.delta_hypenet import unit_length
from megatron_hypenet.export.hf_remote.mixer_kda import (
    HypeNetKimiDeltaAttention,
    short_convolution,
)
from megatron_hypenet.export.hf_remote.ops_hypenet import rotate
from megatron_hypenet.serve.vllm.delta import DeltaState
from megatron_hypenet.serve.vllm.layers import MixerParts, Positions, sharded
from megatron_hypenet.serve.vllm.states import StateLayer, read_states, write_states


class ConvolvedState(DeltaState):
    """The delta rule behind short convolutions, whose latest inputs are a second state. Inputs are
    q, k and v side by side before the convolutions [T, 3 h d], cos, sin, g and beta; `layer` turns
    the convolved sections into q, k and v."""

    layer: KimiDeltaLayer

    @classmethod
    def state_shapes(cls, config: Any, tensor_ranks: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a matrix per head, and of the last W - 1 inputs of the
        convolutions."""
        (matrices,) = super().state_shapes(config, tensor_ranks)
        if not config.kda_use_conv:
            return (matrices,)
        channels = 3 * config.num_attention_heads * config.head_dim // tensor_ranks
        return matrices, (config.kda_conv_size - 1, channels)

    @classmethod
    def state_dtypes(cls, config: Any, model_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the states; the inputs are kept as they come."""
        return (torch.float32, model_dtype) if config.kda_use_conv else (torch.float32,)

    def decode(self, inputs: list[Tensor], slots: Tensor, new: Tensor) -> Tensor:
        """Convolve and apply the delta rule to one token per request, as the base class says."""
        joined, cos, sin, log_decay, beta = inputs
        joined = self._convolved(joined[:, None], slots, new)[:, 0]
        q, k, v = self.layer.rule_inputs(joined, cos, sin)
        return super().decode([q, k, v, log_decay, beta], slots, new)

    def prefill(self, inputs: list[Tensor], slot: Tensor, new: bool) -> Tensor:
        """Convolve and apply the delta rule to the tokens of one request, as the base class
        says."""
        joined, cos, sin, log_decay, beta = inputs
        joined = self._convolved(joined[None], slot, new)[0]
        q, k, v = self.layer.rule_inputs(joined, cos, sin)
        return super().prefill([q, k, v, log_decay, beta], slot, new)

    def _convolved(self, x: Tensor, slots: Tensor, new: Tensor | bool) -> Tensor:
        """x [n, t, 3 h d] -> the same shape; x itself in a model without convolutions."""
        if len(self.kv_cache) == 1:
            return x
        window = read_states(self.kv_cache[1], slots, new)
        x, window = short_convolution(x, self.layer.taps(), window, None)
        write_states(self.kv_cache[1], slots, window)
        return F.silu(x)


class Taps(nn.Module):
    """Weights [h d, 1, W] of one section's convolution."""

    def __init__(self, channels: int, taps: int) -> None:
        """Build the weights; sizes are those over all ranks."""
        super().__init__()
        self.weight = sharded((channels, 1, taps), 0)


class KimiDeltaLayer(MixerParts):
    """The projections, norms and gate around the states."""

    state_class: ClassVar[type[StateLayer]] = ConvolvedState

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Read sizes and switches from the configuration."""
        config: Any = vllm_config.model_config.hf_config
        heads, d, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        super().__init__(
            config,
            vllm_config.quant_config,
            prefix,
            kv_heads=heads,
            qk_norm=config.kda_use_qk_norm,
        )
        self.use_rope = config.kda_use_rope
        if config.kda_use_conv:
            self.q_conv1d = Taps(heads * d, config.kda_conv_size)
            self.k_conv1d = Taps(heads * d, config.kda_conv_size)
            self.v_conv1d = Taps(heads * d, config.kda_conv_size)
        # small products, which stay in the model's dtype
        self.b_proj = ColumnParallelLinear(hidden, heads, bias=False)
        self.f_a_proj = ReplicatedLinear(hidden, d, bias=False)
        self.f_b_proj = ColumnParallelLinear(d, heads * d, bias=False)
        self.g_a_proj = ReplicatedLinear(hidden, d, bias=False)
        self.g_b_proj = ColumnParallelLinear(d, heads * d, bias=False)
        self.A_log = sharded((1, 1, heads, 1), 2, torch.float32)
        self.dt_bias = sharded((heads * d,), 0, torch.float32)
        self.o_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.state = ConvolvedState(vllm_config, f"{prefix}.state")
        # past nn.Module, which would take it for a part of the state
        object.__setattr__(self.state, "layer", self)

    def taps(self) -> Tensor:
        """Return the weights [3 h d, W] of all convolutions."""
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return torch.cat(tuple(one.weight for one in convolutions)).squeeze(1)

    def rule_inputs(self, joined: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Split sections side by side [T, 3 h d] -> q, k, v [T, h, d] of the delta rule, fp32."""
        q, k, v = self.heads(*joined.chunk(3, dim=-1))
        if self.use_rope:
            q, k = (rotate(y, cos, sin) for y in (q, k))
        return unit_length(q.float()), unit_length(k.float()), v.float()

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """x [T, H] -> [T, H]."""
        joined = self.qkv_proj(x)[0]
        rate = self.f_b_proj(self.f_a_proj(x)[0])[0].float() + self.dt_bias
        rate = F.softplus(rate).unflatten(-1, (-1, self.head_dim))
        log_decay = -self.A_log.exp().view(-1, 1) * rate
        beta = self.b_proj(x)[0].float().sigmoid()
        inputs = [joined, positions.cos, positions.sin, log_decay, beta]
        o = self.state.mixed(inputs, torch.empty_like(log_decay))
        gate = self.g_b_proj(self.g_a_proj(x)[0])[0]
        return self.o_proj(self.o_norm(o.to(x.dtype)).flatten(1) * gate.sigmoid())[0]


HF_NAMES = HypeNetKimiDeltaAttention.hf_names
MIXER = KimiDeltaLayer
