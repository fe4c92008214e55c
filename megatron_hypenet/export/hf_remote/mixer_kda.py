"""Kimi Delta Attention of a HypeNet: the delta rule with a learned decay per key channel and token.

Shapes: b rows, t new tokens, h heads, d head_dim, H hidden_size, W tokens of the convolution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .delta_hypenet import INITIAL_DT_BIAS, HypeNetDeltaMixer
from .layers_hypenet import HypeNetRMSNorm
from .ops_hypenet import Step, accumulation_dtype
from .slots_hypenet import StateSlot, in_memory_of

_MOST_CONV_TOKENS = 64


class WindowSlot(StateSlot):
    """A state, and the inputs [b, W - 1, 3 h d] of the convolutions at the last real tokens."""

    kept = ("state", "window")
    window: Tensor | None


class HypeNetKimiDeltaAttention(HypeNetDeltaMixer):
    """g = -exp(A_log) softplus(f_b f_a x + dt_bias) per key channel, beta = sigmoid(b x) per head;
    optional short convolutions with SiLU on q, k and v; one norm per head, then a gate."""

    hf_names = ("kda", "kimi_delta_attention")
    steps_in_place = True

    def __init__(self, config: PretrainedConfig) -> None:
        """Read sizes and switches from the configuration."""
        heads = config.num_attention_heads
        super().__init__(config, kv_heads=heads, qk_norm=config.kda_use_qk_norm)
        self.use_rope = config.kda_use_rope
        hidden = config.hidden_size
        d = config.head_dim
        if config.kda_use_conv:
            sizes = heads * d, heads * d, config.kda_conv_size
            self.q_conv1d = nn.Conv1d(*sizes, groups=heads * d, bias=False)
            self.k_conv1d = nn.Conv1d(*sizes, groups=heads * d, bias=False)
            self.v_conv1d = nn.Conv1d(*sizes, groups=heads * d, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.f_a_proj = nn.Linear(hidden, d, bias=False)
        self.f_b_proj = nn.Linear(d, heads * d, bias=False)
        self.g_a_proj = nn.Linear(hidden, d, bias=False)
        self.g_b_proj = nn.Linear(d, heads * d, bias=False)
        self.A_log = nn.Parameter(torch.zeros(1, 1, heads, 1))
        self.dt_bias = nn.Parameter(torch.full((heads * d,), INITIAL_DT_BIAS))
        self.o_norm = HypeNetRMSNorm(d, config.rms_norm_eps)

    @staticmethod
    def settings(config: PretrainedConfig) -> dict[str, Sequence[Any]]:
        """Return the allowed values: the sizes are those of the attention; a convolution needs its
        length."""
        values: dict[str, Sequence[Any]] = {
            "kda_num_heads": (config.num_attention_heads,),
            "kda_head_dim": (config.head_dim,),
            "kda_use_qk_norm": (True, False),
            "kda_use_rope": (False, True),
            "kda_use_conv": (False, True),
        }
        if getattr(config, "kda_use_conv", False):
            values["kda_conv_size"] = range(2, _MOST_CONV_TOKENS + 1)
        return values

    @staticmethod
    def new_cache() -> WindowSlot:
        """Return a slot for one matrix per head, and the window of the convolutions."""
        return WindowSlot("Kimi Delta Attention")

    def inputs(self, x: Tensor, step: Step, slot: StateSlot | None) -> tuple[Tensor, ...]:
        """x [b, t, H] -> q, k, v [b, t, h * d]."""
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.config.kda_use_conv:
            return projected
        assert slot is None or isinstance(slot, WindowSlot)
        joined = torch.cat(projected, dim=-1)
        weight = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])
        window = None if slot is None else slot.window
        joined, window = short_convolution(joined, weight.squeeze(1), window, step.new_real)
        if slot is not None:
            slot.window = in_memory_of(slot.window, window)
        return F.silu(joined).chunk(3, dim=-1)

    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> g [b, h, t, d]."""
        rate = F.softplus(self.f_b_proj(self.f_a_proj(x)).to(dtype) + self.dt_bias.to(dtype))
        rate = rate.unflatten(-1, (-1, self.config.head_dim))
        return (-self.A_log.to(dtype).exp() * rate).transpose(1, 2)

    def strength(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> beta [b, h, t], in 0..1."""
        return self.b_proj(x).to(dtype).sigmoid().transpose(1, 2)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """o [b, t, h, d] -> [b, t, h * d]."""
        return self.o_norm(o).flatten(2) * self.g_b_proj(self.g_a_proj(x)).sigmoid()


def short_convolution(
    x: Tensor, weight: Tensor, window: Tensor | None, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply a causal depthwise convolution over real tokens: x [b, t, channels], weight [channels,
    W], the last W - 1 inputs before these (None: zeros) -> y [b, t, channels], the last W - 1
    inputs now.

    The last tap is the token's own. Padding is left out, as if its columns were not there; what y
    has there is unused."""
    b, t, channels = x.shape
    before = weight.shape[1] - 1
    if window is None:
        window = x.new_zeros(b, before, channels)
    if new_real is None:
        inputs = torch.cat([window, x], dim=1)
        outputs = _sliding_sums(inputs, weight)
        return outputs, inputs[:, t:].clone()  # a view would keep all inputs
    # real tokens move together, padding goes into a column behind all of them
    order = new_real.long().cumsum(1) - 1
    columns = torch.where(new_real, before + order, before + t)[..., None].expand_as(x)
    inputs = F.pad(window, (0, 0, 0, t + 1)).scatter(1, columns, x)
    outputs = _sliding_sums(inputs[:, :-1], weight)
    outputs = outputs.gather(1, order.clamp(min=0)[..., None].expand_as(x))
    last = new_real.sum(1)[:, None] + torch.arange(before, device=x.device)
    return outputs, inputs.gather(1, last[..., None].expand(-1, -1, channels))


def _sliding_sums(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [b, W - 1 + t, channels], weight [channels, W] -> [b, t, channels], summed in fp32
    (fp64)."""
    dtype = accumulation_dtype(inputs.dtype)
    summed = inputs.to(dtype)
    taps = weight.shape[1]
    t = inputs.shape[1] - taps + 1
    total = sum(summed[:, tap : tap + t] * weight[:, tap].to(dtype) for tap in range(taps))
    assert isinstance(total, Tensor)
    return total.to(inputs.dtype)


MIXER = HypeNetKimiDeltaAttention
