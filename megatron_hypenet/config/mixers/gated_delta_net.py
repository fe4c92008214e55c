"""Gated DeltaNet (arXiv 2412.06464) in HypeNet's slot: a delta rule with one decay per head and
token.

Source of shapes, switches and initial values: the HypeNet reference (arXiv 2601.22156, mixer
`gdn`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_hypenet.config.mixers.base import (
    ONES,
    SECTION,
    HfKeys,
    Init,
    LayoutRules,
    MixerSpec,
    ParamSpec,
    attention_parameters,
    register_mixer_spec,
)

if TYPE_CHECKING:
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import Recompute

CHUNK_TOKENS = 64
"""Tokens of a chunk in which FLOPs are counted."""
LEAST_RATE = 2.0**-20
"""Lower end of a decay rate that is drawn from zero: its logarithm has to exist."""


@register_mixer_spec("gated_delta_net")
class GatedDeltaNetSpec(MixerSpec):
    """Writes are corrections of what the state predicts; writes and decays depend on the token."""

    expand_kv: bool = False
    """Keys and values for every query head, not for groups of them as in the teacher."""
    qk_norm: bool = True
    """RMSNorm of each head of q and k, taken over from the teacher if it has one."""
    rope: bool = True
    """q and k are rotated by position, as HyPE does in RNN layers."""
    gate: bool = True
    """The normalised output is multiplied by silu(g_proj x)."""
    activation: str | None = None
    """Any name: SiLU on q, k and v after their projections."""

    kernel_families = ("gated_delta_rule",)
    core_traffic = 490.0  # 5.5 ms a layer, 16,384 tokens: delta_mixers.py
    hf_keys = HfKeys(
        name="gdn",
        spellings=("gated_delta_net",),
        prefix="gdn_",
        switches={"gdn_use_short_conv": False},
        settings={
            "expand_kv_proj": "expand_kv",
            "gdn_use_qk_norm": "qk_norm",
            "gdn_use_rope": "rope",
            "gdn_use_gate": "gate",
            "gdn_activation": "activation",
        },
        absent={
            "expand_kv_proj": False,
            "gdn_use_qk_norm": False,
            "gdn_use_rope": False,
            "gdn_use_gate": False,
        },
        ignored=("gdn_expand_v", "gdn_attn_mode", "gdn_fuse_cross_entropy"),
    )

    def hf_sizes(self) -> Mapping[str, str]:
        """Derive gdn_nkv from `expand_kv`; the reference's weight transfer reads the two keys of
        its Lightning mixer for this one, too."""
        groups = "num_attention_heads" if self.expand_kv else "num_key_value_heads"
        return {
            "gdn_nh": "num_attention_heads",
            "gdn_nkv": groups,
            "lightning_nkv": groups,
            "lightning_head_dim": "head_dim",
        }

    def key_heads(self, model: ModelConfig) -> int:
        """Return the number of heads of k and of v."""
        return model.num_attention_heads if self.expand_kv else model.num_query_groups

    def parameters(self, model: ModelConfig) -> tuple[ParamSpec, ...]:
        """Return the attention's parameters, a gate, and per head: decay rate, step size, write
        size."""
        heads = model.num_attention_heads
        kv_size = self.key_heads(model) * model.kv_channels
        taken = attention_parameters(model, kv_size=kv_size, qk_norm=self.qk_norm)
        gates = [("beta", "b_proj", heads), ("decay", "a_proj", heads)]
        if self.gate:
            gates.insert(0, ("gate", "g_proj", model.query_size))
        return (
            *taken,
            *(xavier_section(model, *gate) for gate in gates),
            ParamSpec(
                name="A_log", shape=(heads,), tp_dim=0, hf_names=("A_log",), dtype="float32",
                init=Init("uniform", LEAST_RATE, 16.0, "log"),
            ),
            ParamSpec(
                name="dt_bias", shape=(heads,), tp_dim=0, hf_names=("dt_bias",), dtype="float32",
                init=Init("log_uniform", 0.001, 0.1, "inverse_softplus"),
            ),
            ParamSpec(
                name="o_norm.weight", shape=(model.kv_channels,), tp_dim=None, init=ONES,
                hf_names=("o_norm.weight",),
            ),
        )  # fmt: skip

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count per head; see `delta_rule_flops`."""
        return model.num_attention_heads * delta_rule_flops(model.kv_channels)

    def saved_activations(
        self, model: ModelConfig, tensor_ranks: int, recompute: Recompute
    ) -> float:
        """Count the sections; unless recomputed also normalised and expanded q, k and v, o, and its
        norm and gate in float32 steps."""
        kv = 2 * self.key_heads(model) * model.kv_channels
        sections = model.query_size * (2 if self.gate else 1) + kv + 2 * model.num_attention_heads
        inside = 0 if recompute == "selective" else 10 * model.query_size + kv
        return (sections + inside) / tensor_ranks

    def layout_rules(self, model: ModelConfig) -> LayoutRules:
        """Require whole heads of q and of k on every rank."""
        slices = {"num_attention_heads": model.num_attention_heads}
        if not self.expand_kv:
            slices["num_query_groups"] = model.num_query_groups
        return LayoutRules(tensor_slices=slices)


def xavier_section(model: ModelConfig, name: str, hf_name: str, rows: int) -> ParamSpec:
    """Describe a section of the input projection that no teacher has: Xavier-uniform with gain
    2^-2.5, as the reference draws it."""
    bound = 2**-2.5 * math.sqrt(6 / (model.hidden_size + rows))
    return ParamSpec(
        name=SECTION + name, shape=(rows, model.hidden_size), tp_dim=0,
        init=Init("uniform", -bound, bound), hf_names=(f"{hf_name}.weight",),
    )  # fmt: skip


def delta_rule_flops(d: int) -> float:
    """Count the FLOPs per head and token of the chunked delta rule: read, predict and update a d x
    d state, and half a chunk of four products (A, P, the solve, the values)."""
    return 6.0 * d * d + 4.0 * CHUNK_TOKENS * d
