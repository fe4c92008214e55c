"""Gated DeltaNet of a HypeNet: the delta rule with a learned decay per head and token.

Shapes: b rows, t new tokens, h heads, g key/value heads, d head_dim, H hidden_size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .delta_hypenet import INITIAL_DT_BIAS, HypeNetDeltaMixer
from .layers_hypenet import HypeNetRMSNorm
from .ops_hypenet import Step
from .slots_hypenet import StateSlot


class HypeNetGatedDeltaNet(HypeNetDeltaMixer):
    """g = -exp(A_log) softplus(a x + dt_bias) and beta = 2 sigmoid(b x) per head; keys and values
    may be grouped; one norm per head, then an optional gate with SiLU."""

    hf_names = ("gdn", "gated_delta_net")
    steps_in_place = True
    g_proj: nn.Linear

    def __init__(self, config: PretrainedConfig) -> None:
        """Read sizes and switches from the configuration."""
        gate = "g_proj" if config.gdn_use_gate else None
        qk_norm = config.gdn_use_qk_norm
        super().__init__(config, kv_heads=config.gdn_nkv, gate=gate, qk_norm=qk_norm)
        self.use_rope = config.gdn_use_rope
        self.activated = config.gdn_activation is not None
        heads = config.num_attention_heads
        self.b_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.full((heads,), INITIAL_DT_BIAS))
        self.o_norm = HypeNetRMSNorm(config.head_dim, config.rms_norm_eps)

    @staticmethod
    def settings(config: PretrainedConfig) -> dict[str, Sequence[Any]]:
        """Return the allowed values, the default first: as many heads as the attention has; keys
        and values as many, or those of its groups. An activation of any name is SiLU, as in the
        reference."""
        heads = config.num_attention_heads
        activation = getattr(config, "gdn_activation", None)
        return {
            "gdn_nh": (heads,),
            "gdn_nkv": (config.num_key_value_heads, heads),
            "gdn_use_qk_norm": (False, True),
            "gdn_use_rope": (False, True),
            "gdn_use_gate": (False, True),
            "gdn_activation": (None, activation if isinstance(activation, str) else "silu"),
            "gdn_use_short_conv": (False,),
        }

    @staticmethod
    def new_cache() -> StateSlot:
        """Return a slot for one matrix per head."""
        return StateSlot("Gated DeltaNet")

    def inputs(self, x: Tensor, step: Step, slot: StateSlot | None) -> tuple[Tensor, ...]:
        """x [b, t, H] -> q [b, t, h * d], k and v [b, t, g * d]."""
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(map(F.silu, projected)) if self.activated else projected

    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> g [b, h, t, 1]."""
        rate = F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        return (-self.A_log.to(dtype).exp() * rate).transpose(1, 2)[..., None]

    def strength(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> beta [b, h, t], in 0..2: eigenvalues may be negative."""
        return 2.0 * self.b_proj(x).to(dtype).sigmoid().transpose(1, 2)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """o [b, t, h, d] -> [b, t, h * d]."""
        o = self.o_norm(o).flatten(2)
        return o if self.gate_name is None else o * F.silu(self.g_proj(x))


MIXER = HypeNetGatedDeltaNet
