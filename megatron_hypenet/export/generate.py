"""Text from a model, token by token as it comes.

Greedy unless a temperature is given; what generation_config.json asks for beside end tokens is left
out, so that a command line says all there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hypenet.errors import SetupError

Emit = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when it ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """0: of all tokens."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    ignore_end: bool = False
    """Whether end tokens end nothing."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What came out."""

    tokens: list[int]
    text: str
    ended: bool
    """Whether the model ended it, rather than the limit."""
    prompt_tokens: int
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Return the rate of tokens per second after the first."""
        rest = self.seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / rest if rest > 0 else 0.0


def end_tokens(model: Any) -> list[int]:
    """Return the tokens that end a text, from generation_config.json or config.json."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = model.config.eos_token_id
    return [] if given is None else [given] if isinstance(given, int) else list(given)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling, emit: Emit | None = None
) -> Generated:
    """Continue the prompt `ids` [t >= 1]; `emit` gets the text in pieces, whole words at a time.

    SetupError when the device runs out of memory."""
    from transformers import GenerationConfig, TextStreamer

    ends = [] if sampling.ignore_end else end_tokens(model)
    times: list[float] = []

    class Pieces(TextStreamer):
        """Hands on finished text and notes when the first token came."""

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if emit is not None and text:
                emit(text)

    torch.manual_seed(sampling.seed)
    kept = model.generation_config
    # its further settings would complete what is not given here
    model.generation_config = GenerationConfig(eos_token_id=ends or None)
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "pad_token_id": ends[0] if ends else 0,
        "eos_token_id": ends or None,
    }
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        options["top_k"] = sampling.top_k
    given = torch.tensor([list(ids)], device=model.device)
    begin = time.perf_counter()
    try:
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise SetupError(
            f"{model.device} ran out of memory with a prompt of {len(ids)} tokens and up to "
            f"{sampling.max_new_tokens} more; shorten them, or choose another device with --device"
        ) from error
    finally:
        model.generation_config = kept
    seconds = time.perf_counter() - begin
    tokens = out[0, len(ids) :].tolist()
    ended = bool(tokens) and tokens[-1] in ends
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    first = (times[0] if times else time.perf_counter()) - begin
    return Generated(tokens, text, ended, len(ids), seconds, first)
