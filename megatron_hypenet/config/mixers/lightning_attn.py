"""Lightning Attention, HypeNet's RNN mixer (arXiv 2601.22156): fixed decays, one norm over all
heads, an output gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hypenet.config.mixers.base import (
    ONES,
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

CHUNK_TOKENS = 64
"""Tokens of a chunk in which FLOPs are counted."""


@register_mixer_spec("lightning_attn")
class LightningAttnSpec(MixerSpec):
    """As many key and value heads as query heads; its decays are constants, not parameters."""

    is_default = True
    kernel_families = ("lightning_attn", "lightning_mix", "gated_norm")
    core_traffic = 85.0  # 20 ms of 21 layers, 16,384 tokens: step.py --profile
    hf_keys = HfKeys(
        name="lightning-attn",
        spellings=("lightning_attn",),
        prefix="lightning_",
        switches={
            "expand_kv_proj": True,
            "lightning_scale": "1/sqrt(d)",
            "lightning_use_qk_norm": True,
            "lightning_use_rope": True,
            "lightning_use_output_norm": True,
            "lightning_use_output_gate": True,
            "lightning_use_short_conv": False,
            "lightning_rope_scaling": None,
        },
        sizes={
            "lightning_nh": "num_attention_heads",
            "lightning_nkv": "num_attention_heads",
            "lightning_head_dim": "head_dim",
        },
    )

    def parameters(self, model: ModelConfig) -> tuple[ParamSpec, ...]:
        """Return q, k, v and gate for all heads, the per-head norms, fresh ones where the teacher
        has none, and the norm over all heads."""
        return (
            *attention_parameters(model, kv_size=model.query_size),
            gate_parameter(model, "z_proj.weight"),
            ParamSpec(
                name="o_norm.weight", shape=(model.query_size,), tp_dim=0, init=ONES,
                hf_names=("o_norm.weight",),
            ),
        )  # fmt: skip

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """Count per head: state update and read, 4 d^2, and half a chunk of two products."""
        d = model.kv_channels
        return model.num_attention_heads * (4.0 * d * d + 2.0 * CHUNK_TOKENS * d)

    def saved_activations(
        self, model: ModelConfig, tensor_ranks: int, recompute: Recompute
    ) -> float:
        """Count the four sections; unless recomputed also rotated q and k, o, and the gated norm of
        o, which over several ranks is three operations."""
        inside = 0 if recompute == "selective" else 4 if tensor_ranks == 1 else 6
        return (4 + inside) * model.query_size / tensor_ranks

    def layout_rules(self, model: ModelConfig) -> LayoutRules:
        """Require whole heads on every rank."""
        return LayoutRules(tensor_slices={"num_attention_heads": model.num_attention_heads})
