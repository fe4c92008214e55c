"""The shape of one model; the same class describes teacher and student.

Names are megatron-core's. A teacher (Qwen3, Llama, Qwen2) is the configuration whose layers are all
softmax, with RoPE and without an output gate; a student keeps softmax ("attn") in some layers and
has an RNN mixer in the others. What is particular to the teacher's family, norms of q and k, biases
and the scaling of RoPE, its student keeps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from megatron_hypenet.config.mixers import MixerSpec, mixer_spec, mixer_specs, with_settings
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.rope import RopeScaling, YarnScaling
from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted.files import findings, shown

MAX_LAYERS = 10_000
"""Largest number of layers; this bound and the ones below keep a damaged file from allocating
memory that no model needs."""

PositiveInt = Annotated[int, Field(gt=0, le=1 << 40, strict=True)]
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS, strict=True)]
Width = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]
Heads = Annotated[int, Field(gt=0, le=1 << 16, strict=True)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 31, strict=True)]
TokenId = Annotated[int, Field(ge=0, le=1 << 31, strict=True)]
Number = Annotated[float, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
LogitsScaling = str | float | None

_LATER_FIELDS: dict[str, object] = {
    "mixers": {},
    "rope_scaling": None,
    "qk_layernorm": True,
    "add_qkv_bias": False,
}
_HYPE_PATTERN = re.compile(r"hype(?:\s+(\d+(?:\.\d+)?))?")


def check_logits_scaling(value: LogitsScaling) -> LogitsScaling:
    """Accept "hype", "hype A" with A > 1, a positive number, or None; ValueError says what was
    wrong otherwise."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"attn_logits_scaling must be 'hype <a>', a number or null, got {shown(repr(value))}"
        )
    if isinstance(value, int | float):
        if not value > 0:
            raise ValueError(
                f"attn_logits_scaling as a number multiplies q and must be > 0, got {value!r}"
            )
        return float(value)
    match = _HYPE_PATTERN.fullmatch(value.strip())
    if match is None:
        raise ValueError(
            "attn_logits_scaling must be 'hype', 'hype <a>' (e.g. 'hype 500'), a number or null, "
            f"got {shown(repr(value))}"
        )
    if match.group(1) is not None and float(match.group(1)) <= 1:
        raise ValueError(
            f"attn_logits_scaling 'hype <a>' divides by ln(a) and needs a > 1, got {shown(value)!r}"
        )
    return " ".join(value.split())


class ModelConfig(BaseModel):
    """Shape and switches of one model; written to every checkpoint as model.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_layers: Layers = Field(description="Number of decoder layers.")
    hidden_size: Width = Field(description="Width of the residual stream.")
    ffn_hidden_size: Width = Field(description="Inner width of the SwiGLU MLP.")
    num_attention_heads: Heads = Field(
        description="Query heads of every layer; an RNN mixer has as many key and value heads."
    )
    num_query_groups: Heads = Field(
        description="Key/value heads of a softmax layer; divides num_attention_heads."
    )
    kv_channels: Heads = Field(
        description="Channels of one head; even. Heads times channels need not equal hidden_size."
    )
    vocab_size: Vocabulary = Field(description="Rows of the embedding and of the output head.")
    layernorm_epsilon: Number = Field(
        default=1e-6, gt=0, le=1, description="Epsilon of every RMSNorm."
    )
    rotary_base: Number = Field(default=1e6, gt=0, description="RoPE theta.")
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="Scaling of RoPE's frequencies, null for plain RoPE; written only where set.",
    )
    qk_layernorm: Switch = Field(
        default=True,
        description="Softmax layers normalise q and k per head, as in the teacher: true for Qwen3, "
        "false for Llama and Qwen2; written only where false.",
    )
    add_qkv_bias: Switch = Field(
        default=False,
        description="The projections of q, k and v have biases, as in the teacher: true for Qwen2; "
        "written only where true.",
    )
    share_embeddings_and_output_weights: Switch = Field(
        description="The output head is the embedding matrix; follows the teacher."
    )
    mixer_types: tuple[str, ...] = Field(
        description="Mixer of every layer, first to last: attn or the name of an RNN mixer."
    )
    mixers: dict[str, SerializeAsAny[MixerSpec]] = Field(
        default={},
        description="Settings of mixers by name, for those that have any; written only where there "
        "are some.",
    )
    attn_use_rope: Switch = Field(
        description="Softmax layers rotate q and k: true in a teacher, false (NoPE) in a student."
    )
    attn_use_output_gate: Switch = Field(
        description="Softmax layers gate their output: false in a teacher, true in a student."
    )
    attn_logits_scaling: LogitsScaling = Field(
        default=None,
        description="Inference-time factor on q of softmax layers: 'hype <a>' = ln(t+a)/ln(a), "
        "a number, or null for off.",
    )
    max_position_embeddings: PositiveInt = Field(
        default=32768, description="Longest context the model claims; copied to the HF folder."
    )
    init_method_std: Number = Field(
        default=0.02, gt=0, description="Standard deviation of freshly initialised matrices."
    )
    bos_token_id: TokenId | None = Field(
        default=None, description="Begin-of-sequence token, if the tokenizer has one."
    )
    eos_token_id: TokenId | None = Field(
        default=None, description="End-of-sequence token, if the tokenizer has one."
    )
    pad_token_id: TokenId | None = Field(
        default=None, description="Padding token, if the tokenizer has one."
    )

    @field_validator("attn_logits_scaling", mode="before")
    @classmethod
    def _scaling(cls, value: LogitsScaling) -> LogitsScaling:
        return check_logits_scaling(value)

    @field_validator("mixers", mode="before")
    @classmethod
    def _settings(cls, value: object) -> object:
        """Validate each entry by the specification of its name."""
        if not isinstance(value, Mapping):
            return value
        known = mixer_specs()
        if unknown := sorted(set(map(str, value)) - set(known)):
            raise ValueError(
                f"settings of unknown mixers {shown(unknown)}; known: {', '.join(sorted(known))}"
            )
        return {name: with_settings(name, settings) for name, settings in value.items()}

    @model_serializer(mode="wrap")
    def _without_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields that have the value of all files written before there were such
        fields."""
        values: dict[str, Any] = handler(self)
        for name, before in _LATER_FIELDS.items():
            if values.get(name) == before:
                values.pop(name, None)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups={self.num_query_groups} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.kv_channels % 2:
            raise ValueError(
                f"kv_channels={self.kv_channels} is odd; RoPE rotates pairs of channels, "
                "so it must be even"
            )
        if len(self.mixer_types) != self.num_layers:
            raise ValueError(
                f"mixer_types has {len(self.mixer_types)} entries for "
                f"num_layers={self.num_layers}; give one per layer"
            )
        known = mixer_specs()
        if unknown := sorted(set(self.mixer_types) - set(known)):
            raise ValueError(
                f"mixer_types: unknown mixers {shown(unknown)}; "
                f"known mixers: {', '.join(sorted(known))}"
            )
        if unused := sorted(set(self.mixers) - set(self.mixer_types)):
            raise ValueError(
                f"mixers has settings of {', '.join(unused)}, which no layer in mixer_types uses"
            )
        return self

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Return the indices of the softmax layers, ascending."""
        return tuple(index for index, mixer in enumerate(self.mixer_types) if mixer == ATTENTION)

    @property
    def is_teacher(self) -> bool:
        """Return true for the shape of a Transformer: all layers softmax, RoPE on, no output
        gate."""
        return (
            len(self.attention_layers) == self.num_layers
            and self.attn_use_rope
            and not self.attn_use_output_gate
        )

    @property
    def query_size(self) -> int:
        """Return the width of all query heads together, num_attention_heads * kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Return the width of all key (or value) heads of a softmax layer together,
        num_query_groups * kv_channels."""
        return self.num_query_groups * self.kv_channels

    @property
    def heads_per_group(self) -> int:
        """Return the number of query heads that share a key/value head; an RNN mixer repeats it as
        often."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def least_values(self) -> int:
        """Return the number of elements in the large matrices that every model of this shape has
        with any mixers: a lower bound of its size."""
        layer = 2 * self.query_size * self.hidden_size + 3 * self.hidden_size * self.ffn_hidden_size
        return self.vocab_size * self.hidden_size + self.num_layers * layer

    def replace(self, **changes: object) -> Self:
        """Return a copy with `changes`, validated again (pydantic's own model_copy does not
        validate)."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def spec(self, mixer: str) -> MixerSpec:
        """Return the specification of a mixer with this model's settings; ConfigError for an
        unknown name."""
        return self.mixers.get(mixer) or mixer_spec(mixer)()

    @property
    def num_parameters(self) -> int:
        """Return the number of weights of a model of this shape."""
        per_layer = 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        mixers = sum(self.spec(name).num_parameters(self) for name in self.mixer_types)
        tables = 1 if self.share_embeddings_and_output_weights else 2
        table = tables * self.vocab_size * self.hidden_size
        return mixers + self.num_layers * per_layer + table + self.hidden_size

    @property
    def used_mixers(self) -> tuple[str, ...]:
        """Return the names of the mixers in this model, each once, in order of their first
        layer."""
        return tuple(dict.fromkeys(self.mixer_types))

    def with_mixers(self, mixer_types: Iterable[str], settings: Iterable[MixerSpec] = ()) -> Self:
        """Return the student with these mixers: this shape with softmax layers gated and without
        RoPE (HyPE).

        `settings` are specifications whose settings the student takes; those of unused mixers are
        left out. Norms of q and k, biases and RoPE's frequencies stay the teacher's. ConfigError
        for a teacher with YaRN."""
        if isinstance(self.rope_scaling, YarnScaling):
            raise ConfigError(
                f"rope_scaling = {self.rope_scaling.model_dump()}: a teacher with YaRN can be "
                "imported, scored and exported, but no student can be made of it: HyPE reaches "
                "long contexts with the frequencies that the weights were trained with. Set "
                "rope_scaling to null in the config.json of the teacher's folder (rope_type "
                "'default' in rope_parameters) and import it again"
            )
        types = tuple(mixer_types)
        given = {spec.name: spec for spec in (*self.mixers.values(), *settings)}
        kept = {
            name: spec for name, spec in given.items() if name in types and type(spec).model_fields
        }
        return self.replace(
            mixer_types=types, mixers=kept, attn_use_rope=False, attn_use_output_gate=True
        )

    def converted(self, spec: MixerSpec) -> Self:
        """Return the student with this RNN mixer in every layer."""
        return self.with_mixers((spec.name,) * self.num_layers, (spec,))

    def to_json(self) -> str:
        """Return the configuration as indented JSON with a closing newline, keys in declaration
        order."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; ConfigError lists everything that does not fit."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = "; ".join(findings(error, whole="model"))
            raise ConfigError(f"model configuration is invalid: {problems}") from error
