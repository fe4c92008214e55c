"""HypeNet configuration for Hugging Face transformers 4.57 and 5.x (arXiv 2601.22156)."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .layers_hypenet import HypeNetMixer
from .mixers_hypenet import MIXERS
from .ops_hypenet import Llama3Scaling, hype_constant, llama3_scaling

_SUPPORTED = {
    "attention_bias": False,
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "hidden_act": "silu",
}
"""The only value of each of these switches that the modelling code implements; mixers say which
values theirs may have."""

_ALSO_SUPPORTED = {
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
}
"""The same for switches of other models, which a config.json may carry."""

_DEFAULT_MIXER = "lightning-attn" if "lightning-attn" in MIXERS else next(iter(MIXERS))


class HypeNetConfig(PretrainedConfig):
    """Shape and switches of a HypeNet.

    `mixer_types` names the mixer of every layer: "attn" (softmax attention without positions,
    gated) or a recurrent mixer, such as "lightning-attn" (linear attention with a fixed decay per
    head, with RoPE). The keys of a mixer that no layer has are kept and mean nothing.
    `attn_logits_scaling` multiplies the queries of the softmax layers at 0-based position t: "hype
    <a>" by ln(t + a) / ln(a), plain "hype" with a = 362, a number by itself, None not at all. From
    its teacher a HypeNet has `attn_use_qk_norm` (softmax layers normalise q and k per head),
    `qkv_bias` (biases of q, k and v in all layers) and `rope_scaling` (null, or Llama 3's).
    """

    model_type = "hypenet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        mixer_types: list[str] | None = None,
        attn_logits_scaling: str | float | None = None,
        attn_use_qk_norm: bool = True,
        qkv_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise ValueError for settings that the modelling code does not implement."""
        switches = {name: kwargs.pop(name, supported) for name, supported in _SUPPORTED.items()}
        layer_types = kwargs.pop("layer_types", None)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.attn_logits_scaling = attn_logits_scaling
        self.attn_use_qk_norm = attn_use_qk_norm
        self.qkv_bias = qkv_bias
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # transformers 5 keeps theta inside rope_parameters
        rope = rope_parameters or rope_scaling or {}
        self.rope_theta = float(
            rope_theta if rope_theta is not None else rope.get("rope_theta", 1e6)
        )
        if rope.get("rope_theta") not in (None, self.rope_theta):
            raise ValueError(
                f"HypeNet has one rope_theta, here {self.rope_theta}, got rope_parameters={rope!r}"
            )
        if llama3_scaling(rope) is not None:
            if hasattr(type(self), "rope_scaling"):  # transformers 5
                self.rope_parameters = {**rope, "rope_theta": self.rope_theta}
            else:
                self.rope_scaling = rope
        given = [_DEFAULT_MIXER] * num_hidden_layers if mixer_types is None else mixer_types
        self.mixer_types = [MIXERS[name].hf_names[0] if name in MIXERS else name for name in given]
        self.layer_types = _layer_types(self.mixer_types) if layer_types is None else layer_types
        for name, value in switches.items():
            setattr(self, name, value)
        for mixer in self.mixers:
            for name, values in mixer.settings(self).items():
                if isinstance(values, range):
                    continue
                # a size of null is the default one, a switch of null is a value to be checked
                is_size = isinstance(values[0], int) and not isinstance(values[0], bool)
                if not hasattr(self, name) or (is_size and getattr(self, name) is None):
                    setattr(self, name, values[0])
        self.check()

    @property
    def mixers(self) -> tuple[type[HypeNetMixer], ...]:
        """Return the mixers that layers have, each once; without those that this code does not
        know."""
        return tuple(dict.fromkeys(MIXERS[name] for name in self.mixer_types if name in MIXERS))

    @property
    def llama3_scaling(self) -> Llama3Scaling | None:
        """Return the scaling of RoPE's frequencies, None for plain RoPE."""
        return llama3_scaling(self._rope())

    def _rope(self) -> dict[str, Any] | None:
        """Return what transformers 5 calls rope_parameters and transformers 4 rope_scaling."""
        return getattr(self, "rope_parameters", None) or getattr(self, "rope_scaling", None)

    def check(self) -> None:
        """Raise ValueError for a mixer, a switch or a size that the modelling code does not
        implement.

        The model calls it too: `from_pretrained(..., name=value)` changes a configuration that is
        already made."""
        supported: list[tuple[str, Sequence[Any]]] = [
            (name, (value,)) for name, value in {**_SUPPORTED, **_ALSO_SUPPORTED}.items()
        ]
        for mixer in self.mixers:
            supported += mixer.settings(self).items()
        wrong = [
            f"{name}={value!r} (supported: {_listed(values)})"
            for name, values in supported
            if (value := getattr(self, name, None if isinstance(values, range) else values[0]))
            not in values
        ]
        if wrong:
            raise ValueError(f"this HypeNet code does not implement {', '.join(wrong)}")
        rope = self._rope()
        llama3_scaling(rope)
        if (rope or {}).get("rope_theta") not in (None, self.rope_theta):
            raise ValueError(
                f"HypeNet has one rope_theta, here {self.rope_theta}, got rope_parameters={rope!r}"
            )
        for name in ("attn_use_qk_norm", "qkv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is true or false, got {getattr(self, name)!r}")
        hype_constant(self.attn_logits_scaling)
        if not MIXERS.keys() >= set(self.mixer_types) or (
            len(self.mixer_types) != self.num_hidden_layers
        ):
            raise ValueError(
                f"mixer_types must name one of {sorted(MIXERS)} for {self.num_hidden_layers} "
                f"layers, got {self.mixer_types}"
            )
        kinds = {"full_attention", "linear_attention"}
        if not isinstance(self.layer_types, list) or not kinds.issuperset(self.layer_types):
            raise ValueError(
                f"layer_types must name {' or '.join(sorted(kinds))} for each layer, "
                f"got {self.layer_types!r}"
            )
        # they follow from the mixers; a teacher's may have come along
        self.layer_types = _layer_types(self.mixer_types)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )


def _layer_types(mixer_types: Sequence[str]) -> list[str]:
    """Return what kind of layer each mixer makes, in the words of inference engines, which size the
    caches of the layers by them."""
    return ["full_attention" if name == "attn" else "linear_attention" for name in mixer_types]


def _listed(values: Sequence[Any]) -> str:
    """Return the values as a message shows them."""
    if isinstance(values, range):
        return f"{values[0]} to {values[-1]}"
    return " or ".join(repr(value) for value in values)


__all__ = ["HypeNetConfig"]
