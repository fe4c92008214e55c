"""The families of Transformers that can be teachers, as Hugging Face's config.json describes them:
Qwen3, Llama and Qwen2, all dense.

They differ in two things: whether q and k are normalised per head, and whether the projections of
q, k and v have biases. What a family's config.json may leave out, transformers' own configuration
class fills in, and so does this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import ConfigError

QWEN3 = "qwen3"
LLAMA = "llama"
QWEN2 = "qwen2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of teachers."""

    model_type: str
    architecture: str
    qk_layernorm: bool
    """Whether q and k are normalised per head."""
    add_qkv_bias: bool
    """Whether the projections of q, k and v have biases."""
    default_theta: float | None = None
    """RoPE's theta where config.json has none; None: it must have one."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Values of other keys that config.json may leave out."""
    derived: tuple[str, ...] = ()
    """Keys that follow from others where they are left out or null: `head_dim` is hidden_size /
    num_attention_heads, `num_key_value_heads` is num_attention_heads."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written into the family's config.json, with their one supported value."""

    def completed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with the keys that the family lets it leave out; what does not follow
        from others stays missing, for the reader to refuse."""
        heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
        sizes = {"num_key_value_heads": heads}
        if type(heads) is int and type(hidden) is int and heads > 0 and hidden % heads == 0:
            sizes["head_dim"] = hidden // heads
        missing = {key: sizes.get(key) for key in self.derived if raw.get(key) is None}
        return {**self.defaults, **raw, **missing}


_SLIDING = {"use_sliding_window": False, "sliding_window": None}
TEACHERS = {
    family.model_type: family
    for family in (
        Family(
            model_type=QWEN3,
            architecture="Qwen3ForCausalLM",
            qk_layernorm=True,
            add_qkv_bias=False,
            switches={"attention_bias": False, **_SLIDING},
        ),
        Family(
            model_type=LLAMA,
            architecture="LlamaForCausalLM",
            qk_layernorm=False,
            add_qkv_bias=False,
            default_theta=10_000.0,
            defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
            derived=("head_dim", "num_key_value_heads"),
            switches={"attention_bias": False, "mlp_bias": False},
        ),
        Family(
            model_type=QWEN2,
            architecture="Qwen2ForCausalLM",
            qk_layernorm=False,
            add_qkv_bias=True,
            derived=("head_dim",),
            switches=_SLIDING,
        ),
    )
}
"""All families of teachers by `model_type`. Llama's defaults are those of transformers'
LlamaConfig; published Qwen2 folders leave only head_dim out."""


def teacher_family(config: ModelConfig) -> Family:
    """Return the family of a teacher of this shape; ConfigError where none has its norms and
    biases."""
    for family in TEACHERS.values():
        same_norms = family.qk_layernorm == config.qk_layernorm
        if same_norms and family.add_qkv_bias == config.add_qkv_bias:
            return family
    raise ConfigError(
        f"a teacher with qk_layernorm={config.qk_layernorm} and add_qkv_bias={config.add_qkv_bias} "
        f"is none of {', '.join(TEACHERS)}: it has no Hugging Face form"
    )
