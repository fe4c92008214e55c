"""What a HypeNet takes: checks of its inputs, and its interface for `generate` of transformers 4.57
and 5.x, with its cache, its inputs of each step, and refusals of what it cannot do.

Shapes: b rows, t new tokens."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_hypenet import HypeNetCache

CACHE = (
    "cache"
    if "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
    else "past_key_values"
)
"""The name of the cache in the installed transformers, in outputs and in `generate`: `cache` since
5.24."""

_FOR_PREPARATION = (
    "next_sequence_length",
    "is_first_iteration",
    "cache_position",
    "position_ids",
    "mm_encoder_outputs",
)
"""Keywords of `generate`'s own bookkeeping, which end in `prepare_inputs_for_generation`: positions
follow from the mask."""


def given_cache(
    past_key_values: HypeNetCache | None, cache: HypeNetCache | None
) -> HypeNetCache | None:
    """Return the cache, whichever name it was given by; ValueError for both."""
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "past_key_values and cache are two names of one argument; give one of them"
        )
    return cache if past_key_values is None else past_key_values


def check_positions(given: Tensor, positions: Tensor, real: Tensor | None) -> None:
    """Positions follow from the mask. ValueError for others, such as several documents packed into
    one row.

    given [b or 1, t], positions [b or 1, t], real [b, t] bool or None. In a compiled graph, which
    raises nothing, an assertion."""
    message = (
        "position_ids must count the real tokens of each row from 0; packed rows and shifted "
        "positions are not supported"
    )
    if given.dim() != 2 or given.shape[1] != positions.shape[1]:
        raise ValueError(f"{message}; got the shape {list(given.shape)}")
    same = given == positions
    right = (same if real is None else same | ~real).all()
    if torch.compiler.is_compiling():
        torch._assert_async(right, message)
    elif not bool(right):
        raise ValueError(message)


def check_shape(given: Tensor, *, embedded: bool) -> None:
    """Raise ValueError unless these are tokens [b, t] or, `embedded`, their embeddings [b, t, H],
    of at least one token."""
    if given.dim() != (3 if embedded else 2) or given.shape[1] == 0:
        raise ValueError(
            "expected input_ids [rows, tokens] or inputs_embeds [rows, tokens, hidden_size] "
            f"of at least one token, got the shape {list(given.shape)}"
        )


def new_columns(
    attention_mask: Tensor | None, b: int, t: int, past: int, *, look: bool = True
) -> Tensor | None:
    """Return the last t columns of a mask as bool [b, t], or None when all are real tokens; without
    `look` every mask is given back, for a look waits for the device."""
    if attention_mask is None:
        return None
    shape = list(getattr(attention_mask, "shape", [type(attention_mask).__name__]))
    if shape not in ([b, t], [b, past + t]):
        either = f"[{b}, {t}]" + (f" or, with the cached ones, [{b}, {past + t}]" if past else "")
        raise ValueError(
            f"attention_mask must be [rows, tokens] = {either} of 0 and 1, got {shape}"
        )
    new = attention_mask[:, -t:]
    # a compiled graph cannot depend on values: there every mask is applied
    if not look or torch.compiler.is_compiling():
        return new.bool()
    if bool((new == 1).all()):
        return None
    if not bool(((new == 0) | (new == 1)).all()):
        raise ValueError(
            "attention_mask must be 1 at real tokens and 0 at padding; it has other values, "
            "as a mask has that is added to attention scores"
        )
    return new.bool()


class HypeNetGenerationMixin(GenerationMixin):
    """Generation with a HypeNetCache."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        given, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if given is not None:
            real = None if mask is None else mask.bool()
            order = (
                torch.arange(given.shape[-1], device=given.device)[None]
                if real is None
                else real.long().cumsum(1) - 1
            )
            check_positions(given, order, real)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.is_assistant:
            raise ValueError(
                "a HypeNet cannot be an assistant_model: its recurrent states cannot be rolled "
                "back when drafts are rejected"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "HypeNet has its own cache; "
                f"cache_implementation={generation_config.cache_implementation!r} is not available"
            )
        cache = given_cache(
            model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None)
        )
        if cache is not None:
            _check_given(cache, model_kwargs)
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = self.model.new_cache()
        if cache is not None:
            # whatever has been switched on or off since the last call would be missed by a graph
            cache.steps.forget()
            cache.generates = False
            cache.expect(generation_config.max_length or 0)
            model_kwargs[CACHE] = cache

    def _update_model_kwargs_for_generation(
        self, outputs: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        cache = outputs.get(CACHE)
        if cache is not None:
            cache.generates = True
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: HypeNetCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: HypeNetCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the tokens that the cache has not seen, with whatever else `forward` takes.

        How many are new follows from the mask; transformers 5 leaves out a mask of ones and says
        how many (next_sequence_length), or gives the new tokens alone."""
        memory = given_cache(past_key_values, cache)
        seen = 0 if memory is None else memory.get_seq_length()
        new = kwargs.get("next_sequence_length")
        if attention_mask is not None:
            new = attention_mask.shape[1] - seen
        if new is not None and new < 1:
            raise ValueError(
                f"the cache has seen {seen} tokens, no fewer than the input has; "
                "it is continued by a longer input"
            )
        inputs = {name: value for name, value in kwargs.items() if name not in _FOR_PREPARATION}
        if memory is not None and memory.generates:
            # only real tokens are added: a mask would have to be read
            attention_mask = None
        inputs |= {"attention_mask": attention_mask, CACHE: memory}
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:
            return {"inputs_embeds": inputs_embeds[:, seen:], **inputs}
        return {
            "input_ids": (input_ids if new is None else input_ids[:, -new:]).contiguous(),
            **inputs,
        }


def _check_given(cache: HypeNetCache, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless `generate` was given a HypeNetCache and at least one token that it
    has not seen."""
    if not isinstance(cache, HypeNetCache):
        raise ValueError(
            "past_key_values must be the HypeNetCache of an earlier call, "
            f"got {type(cache).__name__}"
        )
    # transformers 5 has dropped a mask of ones by now; the positions that it made are as many
    columns = [
        model_kwargs[name].shape[-1]
        for name in ("attention_mask", "position_ids")
        if model_kwargs.get(name) is not None
    ]
    if columns and columns[0] <= cache.get_seq_length():
        raise ValueError(
            f"the cache has seen {cache.get_seq_length()} tokens and the input has {columns[0]}: "
            "give the"
            " whole text so far, with the cached tokens and at least one new one"
        )
