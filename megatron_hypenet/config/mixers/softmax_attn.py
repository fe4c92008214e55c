"""Softmax attention: every layer of a teacher, and the layers of a student that keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hypenet.config.mixers.base import (
    HfKeys,
    LayoutRules,
    MixerSpec,
    ParamSpec,
    attention_parameters,
    gate_parameter,
    register_mixer_spec,
)

if TYPE_CHECKING:
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import Recompute

ATTENTION = "attn"
"""Name of the mixer that HALO replaces: the only one of a teacher."""


@register_mixer_spec(ATTENTION)
class SoftmaxAttnSpec(MixerSpec):
    """Grouped-query attention; its switches (`attn_use_rope` and others) are the model's."""

    recurrent = False
    core_traffic = 65.0  # norms, RoPE and gate
    hf_keys = HfKeys(
        name=ATTENTION,
        prefix="attn_",
        switches={"attn_use_rope": False, "attn_use_output_gate": True},
    )

    def parameters(self, model: ModelConfig) -> tuple[ParamSpec, ...]:
        """Return q for all heads, k and v for the groups, norms, biases and the output gate if the
        model has them."""
        shared = attention_parameters(model, kv_size=model.kv_size, qk_norm=model.qk_layernorm)
        if not model.attn_use_output_gate:
            return shared
        return (*shared, gate_parameter(model, "o_gate.weight"))

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count two products over half the sequence on average."""
        return 2.0 * model.query_size * seq_length

    def saved_activations(
        self, model: ModelConfig, tensor_ranks: int, recompute: Recompute
    ) -> float:
        """Count the sections, normalised or rotated q and k, and o, with a gate also the product;
        selective recomputation changes nothing here."""
        gated = model.query_size if model.attn_use_output_gate else 0
        changed = model.query_size + model.kv_size
        if not (model.qk_layernorm or model.attn_use_rope):
            changed = 0
        inside = changed + model.query_size + gated
        return (sum(self.sections(model).values()) + inside) / tensor_ranks

    def layout_rules(self, model: ModelConfig) -> LayoutRules:
        """Require whole heads and whole groups on every rank."""
        sizes = ("num_attention_heads", "num_query_groups")
        return LayoutRules(tensor_slices={name: getattr(model, name) for name in sizes})
