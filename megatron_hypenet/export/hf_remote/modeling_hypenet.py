"""HypeNet for Hugging Face transformers 4.57 and 5.x (arXiv 2601.22156): recurrent mixers and
softmax attention by layer.

torch on CPU or GPU, with Triton kernels where it is installed. Prompts run chunk by chunk, decoding
one token at a time, on a GPU as a CUDA graph and without waiting for it, with any padding in the
batch: positions count real tokens only, and padding enters neither an attention nor a recurrent
state. Shapes: b rows, t new tokens, h heads, d head_dim, H hidden_size.

The trunk, its calls for all kinds of input and the language model depend on each other line by line
and stay in one file."""

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
from .generation_hypenet import (
    CACHE,
    HypeNetGenerationMixin,
    check_positions,
    check_shape,
    given_cache,
    new_columns,
)
from .layers_hypenet import HypeNetRMSNorm
from .mixers_hypenet import MIXERS
from .ops_hypenet import Step, accumulation_dtype, causal_lm_loss, rope_tables

_PREFILL_TOKENS = 16384
"""Tokens of all rows that pass through the layers at once; longer prompts go in pieces, which
bounds their memory."""
_IN_PLACE_DEVICES = ("cuda",)
"""Where single tokens update the cache in place, so that a CUDA graph can."""


class HypeNetMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: HypeNetConfig) -> None:
        """Read sizes from the configuration."""
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
        """Build layer number `layer`; `config.mixer_types` says which mixer it has."""
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
        """Initialise random weights; use `from_pretrained` to load."""
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HypeNetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding module."""
        self.embed_tokens = value

    def _step(
        self,
        x: Tensor,
        new_real: Tensor | None,
        position_ids: Tensor | None,
        cache: HypeNetCache | None,
    ) -> Step:
        """Return the arguments of the layers for x [b, t, H], which the cache counts."""
        b, t, _ = x.shape
        past = 0
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
        return self._arguments(x, positions, new_real, real, past, None)

    def _arguments(
        self,
        x: Tensor,
        positions: Tensor,
        new_real: Tensor | None,
        real: Tensor | None,
        past: int,
        at: Tensor | None,
    ) -> Step:
        dtype = accumulation_dtype(x.dtype)
        config = self.config
        cos, sin = rope_tables(
            config.head_dim, config.rope_theta, positions, dtype, config.llama3_scaling
        )
        shared = {
            mixer.hf_names[0]: mixer.shared(self.config, positions, dtype)
            for mixer in self.config.mixers
        }
        return Step(cos, sin, shared, new_real, real, past, at)

    def steps_in_place(self, new: Tensor, cache: HypeNetCache | None) -> bool:
        """Return whether a call with `new` tokens [b, t] or their embeddings is a step of one token
        that updates `cache` in place."""
        return (
            cache is not None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and cache.length > 0
            and new.shape[1] == 1
            and new.device.type in _IN_PLACE_DEVICES
            and self.config._attn_implementation != "eager"
            and all(mixer.steps_in_place for mixer in self.config.mixers)
        )

    def one_token(self, x: Tensor, new_real: Tensor | None, cache: HypeNetCache) -> Tensor:
        """x [b, 1, H] or its tokens [b, 1] -> final hidden states [b, 1, H], between `begin_step`
        and `end_step` of the cache. Nothing depends on a value that the host would have to know."""
        if not x.is_floating_point():
            x = self.embed_tokens(x)
        positions, real = cache.record_step(new_real)
        step = self._arguments(x, positions, new_real, real, 0, cache.at)
        return self._run(x, step, cache)

    def new_cache(self) -> HypeNetCache:
        """Return an empty cache."""
        return HypeNetCache(MIXERS[name].new_cache() for name in self.config.mixer_types)

    def _cache(self, given: HypeNetCache | None, use_cache: bool | None) -> HypeNetCache | None:
        """Return the cache of this call: the given one, a new one, or None. ValueError where a
        given one cannot be used."""
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
        keep_last: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [b, t] or inputs_embeds [b, t, H] -> hidden states after the final norm, [b, t,
        H].

        `attention_mask` [b, t] or [b, past + t] marks real tokens with 1. `past_key_values` and
        `cache` are two names of one argument. `output_hidden_states` gives each layer's input and
        the final output. `keep_last`: at least the last tokens of a long prompt are wanted, 0 for
        all. Training with gradient checkpointing makes no cache. ValueError for attention maps,
        other masks, other positions, or a cache of another class; TypeError for an unknown
        keyword."""
        _refuse_unknown(kwargs, self, known=())
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "HypeNet does not return attention maps: its recurrent layers have none; "
                "leave output_attentions out"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        check_shape(given, embedded=inputs_embeds is not None)
        memory = self._cache(given_cache(past_key_values, cache), use_cache)
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        in_place = self.steps_in_place(given, memory) and not wanted and position_ids is None
        b, t = given.shape[:2]
        past = 0 if memory is None else memory.length
        new_real = new_columns(attention_mask, b, t, past, look=not in_place)
        hidden: list[Tensor] | None = None
        if in_place and memory is not None:
            memory.begin_step(b, given.device, masked=new_real is not None)
            x = self.one_token(given, new_real, memory)
            memory.end_step()
        elif self._is_long(b, t, memory) and not wanted:
            x = self._in_pieces(given, new_real, position_ids, memory, keep_last)
        else:
            x = self.embed_tokens(given) if inputs_embeds is None else given
            hidden = [] if wanted else None
            x = self._run(x, self._step(x, new_real, position_ids, memory), memory, hidden)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if hidden is None else tuple(hidden),
            **{CACHE: memory},
        )
        return (
            out
            if (self.config.return_dict if return_dict is None else return_dict)
            else out.to_tuple()
        )

    def _run(
        self, x: Tensor, step: Step, memory: HypeNetCache | None, inputs: list[Tensor] | None = None
    ) -> Tensor:
        """Run x [b, t, H] through all layers and the final norm; a list `inputs` gets each layer's
        input and the final output."""
        for layer in self.layers:
            if inputs is not None:
                inputs.append(x)
            x = layer(x, step, memory)
        x = self.norm(x)
        if inputs is not None:
            inputs.append(x)
        return x

    def _is_long(self, b: int, t: int, memory: HypeNetCache | None) -> bool:
        return (
            memory is not None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and b * t > _PREFILL_TOKENS
        )

    def _in_pieces(
        self,
        given: Tensor,
        new_real: Tensor | None,
        position_ids: Tensor | None,
        memory: HypeNetCache | None,
        keep_last: int,
    ) -> Tensor:
        """Run a long prompt, piece by piece, into the cache; returns at least the final hidden
        states of the `keep_last` last tokens."""
        b, t = given.shape[:2]
        size = max(_PREFILL_TOKENS // b, 1)
        kept: list[Tensor] = []
        for start in range(0, t, size):
            part = slice(start, start + size)
            x = given[:, part]
            if not x.is_floating_point():
                x = self.embed_tokens(x)
            real = None if new_real is None else new_real[:, part]
            positions = None if position_ids is None else position_ids[:, part]
            x = self._run(x, self._step(x, real, positions, memory), memory)
            kept.append(x)
            while keep_last and sum(y.shape[1] for y in kept[1:]) >= keep_last:
                del kept[0]
        return torch.cat(kept, dim=1)


class HypeNetForCausalLM(HypeNetPreTrainedModel, HypeNetGenerationMixin):
    """HypeNet with its output head.

    On a GPU single tokens run as a CUDA graph where that gives the same; `model.use_cuda_graph =
    False` turns it off."""

    use_cuda_graph = True

    # transformers 5 maps each tied weight to its source, 4.57 lists the tied ones
    _tied_weights_keys = (
        ["lm_head.weight"]
        if transformers.__version__.startswith("4.")
        else {"lm_head.weight": "model.embed_tokens.weight"}
    )

    def __init__(self, config: HypeNetConfig) -> None:
        """Initialise random weights; use `from_pretrained` to load."""
        super().__init__(config)
        self.model = HypeNetModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding module."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
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
        """Return next-token logits [b, t, vocab] (the last `logits_to_keep` tokens, 0 for all);
        with `labels` [b, t] also the mean cross entropy.

        Labels are shifted inside, unless they come shifted, as `shift_labels`; -100 is left out;
        `num_items_in_batch` replaces the count in the mean (gradient accumulation).
        `model.loss_function = f` puts another function in the place of `causal_lm_loss`; it gets
        the further keywords. TypeError for keywords without labels, and for those that
        `causal_lm_loss` does not know."""
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        own_loss = has_labels and self.loss_function is not causal_lm_loss
        _refuse_unknown(kwargs, self, known=kwargs if own_loss else ("shift_labels",))
        memory = given_cache(past_key_values, cache)
        asks_more = has_labels or any(
            x is not None for x in (inputs_embeds, position_ids, output_attentions)
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (
            input_ids is not None
            and isinstance(memory, HypeNetCache)
            and isinstance(logits_to_keep, int)
            and not (asks_more or output_hidden_states)
            and self.model.steps_in_place(input_ids, memory)
        ):
            logits = self._one_token(input_ids, attention_mask, memory)
            result = CausalLMOutputWithPast(logits=logits, **{CACHE: memory})
            return self._as_wanted(result, return_dict)
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
            keep_last=logits_to_keep if isinstance(logits_to_keep, int) else 0,
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
        return self._as_wanted(result, return_dict)

    def _as_wanted(
        self, result: CausalLMOutputWithPast, return_dict: bool | None
    ) -> CausalLMOutputWithPast | tuple:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _one_token(
        self, input_ids: Tensor, attention_mask: Tensor | None, memory: HypeNetCache
    ) -> Tensor:
        """Return logits [b, 1, vocab] after one more token per row, as a CUDA graph where
        possible."""
        b = len(input_ids)
        new_real = new_columns(attention_mask, b, 1, memory.length, look=False)
        memory.begin_step(b, input_ids.device, masked=new_real is not None)

        def run(ids: Tensor, real: Tensor | None) -> Tensor:
            return self.lm_head(self.model.one_token(ids, real, memory))

        logits = memory.run_step(self, run, input_ids, new_real)
        memory.end_step()
        return logits


def _refuse_unknown(keywords: dict[str, Any], model: nn.Module, known: Container[str]) -> None:
    """Raise TypeError for further keywords of `model.forward` that are not in `known`."""
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
