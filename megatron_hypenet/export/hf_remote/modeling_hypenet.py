"""HypeNet for Hugging Face transformers 4.57 and 5.x (arXiv 2601.22156): recurrent mixers and
softmax attention by layer.

Plain torch on CPU or GPU. Prompts run chunk by chunk, decoding one token at a time, with any
padding in the batch: positions count real tokens only, and padding enters neither an attention nor
a recurrent state. Shapes: b rows, t new tokens, h heads, d head_dim, H hidden_size."""

from collections.abc import Container
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_hypenet import HypeNetCache
from .configuration_hypenet import HypeNetConfig
from .generation_hypenet import CACHE, HypeNetGenerationMixin, check_positions, given_cache
from .layers_hypenet import HypeNetRMSNorm
from .mixers_hypenet import MIXERS
from .ops_hypenet import Step, accumulation_dtype, causal_lm_loss, rope_tables


class HypeNetMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HypeNetConfig) -> None:
        """Sizes from the configuration."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HypeNetDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, config: HypeNetConfig, layer: int) -> None:
        """`layer`: index of the layer; `config.mixer_types` says which mixer it has."""
        super().__init__()
        self.layer = layer
        self.self_attn = MIXERS[config.mixer_types[layer]](config)
        self.mlp = HypeNetMLP(config)
        self.input_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, cache: HypeNetCache | None = None) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        slot = None if cache is None else cache.slots[self.layer]
        x = x + self.self_attn(self.input_layernorm(x), step, slot)
        return x + self.mlp(self.post_attention_layernorm(x))


class HypeNetPreTrainedModel(PreTrainedModel):
    """Loading and saving, shared by the trunk and the language model."""

    config_class = HypeNetConfig
    base_model_prefix = "model"
    _no_split_modules = ["HypeNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # a recurrent state cannot be rolled back: `generate` then refuses assisted decoding
    _is_stateful = True

    def __init__(self, config: HypeNetConfig) -> None:
        """Raise ValueError for settings that this code does not implement, also those changed after
        the configuration was made."""
        config.check()
        super().__init__(config)
        # of the mixers in use alone: transformers 4.57 refuses names that no parameter has
        names = {name for mixer in config.mixers for name in mixer.kept_in_fp32}
        self._keep_in_fp32_modules_strict = sorted(names) or None

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: '
                'HypeNet has "sdpa" and "eager"'
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class HypeNetModel(HypeNetPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: HypeNetConfig) -> None:
        """Random weights; use `from_pretrained` to load."""
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HypeNetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding module."""
        self.embed_tokens = value

    def _step(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: HypeNetCache | None,
    ) -> Step:
        b, t, _ = x.shape
        past: int = 0 if cache is None else cache.length
        new_real = _new_columns(attention_mask, b, t, past)
        first: int | Tensor = 0
        real = new_real
        if cache is not None:
            past, first, real = cache.advance(new_real, b, t, x.device)
        order = (
            torch.arange(1, t + 1, device=x.device)[None]
            if new_real is None
            else new_real.long().cumsum(1)
        )
        positions = (first + order - 1).clamp(min=0)
        if position_ids is not None:
            check_positions(position_ids, positions, new_real)
        dtype = accumulation_dtype(x.dtype)
        cos, sin = rope_tables(self.config.head_dim, self.config.rope_theta, positions, dtype)
        shared = {
            mixer.hf_names[0]: mixer.shared(self.config, positions, dtype)
            for mixer in self.config.mixers
        }
        return Step(cos, sin, shared, new_real, real, past)

    def new_cache(self) -> HypeNetCache:
        """An empty cache."""
        return HypeNetCache(MIXERS[name].new_cache() for name in self.config.mixer_types)

    def _cache(self, given: HypeNetCache | None, use_cache: bool | None) -> HypeNetCache | None:
        """The cache of this call: the given one, a new one, or None. ValueError where a given one
        cannot be used."""
        recomputes = (
            self.training
            and torch.is_grad_enabled()
            and any(layer.gradient_checkpointing for layer in self.layers)
        )
        if given is not None:
            if not isinstance(given, HypeNetCache):
                raise ValueError(
                    "past_key_values must be the HypeNetCache of an earlier call, "
                    f"got {type(given).__name__}"
                )
            if recomputes:
                raise ValueError(
                    "gradient checkpointing runs each layer twice, which would enter its tokens "
                    "twice into the given cache"
                )
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return self.new_cache() if use_cache and not recomputes else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        cache: HypeNetCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [b, t] or inputs_embeds [b, t, H] -> hidden states after the final norm, [b, t,
        H].

        `attention_mask` [b, t] or [b, past + t] marks real tokens with 1. `past_key_values` and
        `cache` are two names of one argument. `output_hidden_states` gives each layer's input and
        the final output. Training with gradient checkpointing makes no cache. ValueError for
        attention maps, other masks, other positions, or a cache of another class; TypeError for an
        unknown keyword."""
        _refuse_unknown(kwargs, self, known=())
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "HypeNet does not return attention maps: its recurrent layers have none; "
                "leave output_attentions out"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        memory = self._cache(given_cache(past_key_values, cache), use_cache)
        step = self._step(x, attention_mask, position_ids, memory)
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        hidden = []
        for layer in self.layers:
            if wanted:
                hidden.append(x)
            x = layer(x, step, memory)
        x = self.norm(x)
        out = BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=(*hidden, x) if wanted else None, **{CACHE: memory}
        )
        return (
            out
            if (self.config.return_dict if return_dict is None else return_dict)
            else out.to_tuple()
        )


def _new_columns(attention_mask: Tensor | None, b: int, t: int, past: int) -> Tensor | None:
    """The last t columns of a mask as bool [b, t], or None when all are real tokens."""
    if attention_mask is None:
        return None
    shape = list(getattr(attention_mask, "shape", [type(attention_mask).__name__]))
    if shape not in ([b, t], [b, past + t]):
        either = f"[{b}, {t}]" + (f" or, with the cached ones, [{b}, {past + t}]" if past else "")
        raise ValueError(
            f"attention_mask must be [rows, tokens] = {either} of 0 and 1, got {shape}"
        )
    new = attention_mask[:, -t:].bool()
    # a compiled graph cannot depend on values: there every mask is applied
    return None if not torch.compiler.is_compiling() and bool(new.all()) else new


class HypeNetForCausalLM(HypeNetPreTrainedModel, HypeNetGenerationMixin):
    """HypeNet with its output head."""

    # transformers 5 maps each tied weight to its source, 4.57 lists the tied ones
    _tied_weights_keys = (
        ["lm_head.weight"]
        if transformers.__version__.startswith("4.")
        else {"lm_head.weight": "model.embed_tokens.weight"}
    )

    def __init__(self, config: HypeNetConfig) -> None:
        """Random weights; use `from_pretrained` to load."""
        super().__init__(config)
        self.model = HypeNetModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding module."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
        cache: HypeNetCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Next-token logits [b, t, vocab] (the last `logits_to_keep` tokens, 0 for all); with
        `labels` [b, t] also the mean cross entropy.

        Labels are shifted inside, unless they come shifted, as `shift_labels`; -100 is left out;
        `num_items_in_batch` replaces the count in the mean (gradient accumulation).
        `model.loss_function = f` puts another function in the place of `causal_lm_loss`; it gets
        the further keywords. TypeError for keywords without labels, and for those that
        `causal_lm_loss` does not know."""
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        own_loss = has_labels and self.loss_function is not causal_lm_loss
        _refuse_unknown(kwargs, self, known=kwargs if own_loss else ("shift_labels",))
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            output_attentions=output_attentions,
            cache=cache,
        )
        hidden = out.last_hidden_state
        logits = self.lm_head(
            hidden[:, -logits_to_keep:]
            if isinstance(logits_to_keep, int)
            else hidden[:, logits_to_keep]
        )
        loss = None
        if has_labels:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        named = {CACHE: out.get(CACHE)}
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **named
        )
        return (
            result
            if (self.config.return_dict if return_dict is None else return_dict)
            else result.to_tuple()
        )


def _refuse_unknown(keywords: dict[str, Any], model: nn.Module, known: Container[str]) -> None:
    """TypeError for further keywords of `model.forward` that are not in `known`."""
    packing = sorted(
        {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
        & set(keywords)
    )
    if packing:
        raise TypeError(
            f"HypeNet does not take rows with several documents ({', '.join(packing)}); "
            "give each document its own row"
        )
    unknown = sorted(name for name in keywords if name not in known)
    if unknown:
        raise TypeError(
            f"{type(model).__name__}.forward() got unexpected keyword arguments: "
            f"{', '.join(unknown)}"
        )


__all__ = ["HypeNetCache", "HypeNetForCausalLM", "HypeNetModel", "HypeNetPreTrainedModel"]
