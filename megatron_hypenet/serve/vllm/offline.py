"""A vLLM engine within this process, without a server: text as it comes, log-probabilities of given
tokens, and hidden states."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.generate import Emit, Generated, Sampling

ON_CPU: dict[str, Any] = {
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
}
"""Options where there is no GPU: vLLM would otherwise ask for nearly all of the machine's memory,
and compile for minutes."""


@dataclass(frozen=True, slots=True)
class Continued:
    """Greedy continuation of a prompt."""

    tokens: list[int]
    logprobs: list[float]
    """Log-probabilities of these tokens, in nats."""
    cached: int
    """Tokens of the prompt that came from the prefix cache."""


def load(folder: Path, dtype: str, **options: Any) -> Any:
    """Load the engine with the model of a Hugging Face folder, computing in `dtype`; `options` are
    those of vllm.LLM. SetupError when it does not start."""
    _quiet()
    from vllm import LLM

    try:
        return LLM(model=str(folder), dtype=dtype, **{**_here(), **options})
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"vLLM does not start with {folder}: {error}") from error


def release_memory() -> None:
    """Give back what an engine of this process held, once nothing refers to it."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def block_tokens(folder: Path, dtype: str) -> int:
    """Return the number of tokens in a block of the engine's cache: the prefix cache holds whole
    blocks only. SetupError for a folder that vLLM does not take."""
    _quiet()
    from vllm import EngineArgs

    try:
        given = EngineArgs(
            model=str(folder), dtype=dtype, enable_prefix_caching=True, **_here()
        ).create_engine_config()
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"vLLM does not start with {folder}: {error}") from error
    return int(given.cache_config.block_size)


def _quiet() -> None:
    # stdout is for the text
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _here() -> dict[str, Any]:
    """Return the options for this machine."""
    import torch

    return {} if torch.cuda.is_available() else ON_CPU


def generate(
    engine: Any, ids: Sequence[int], sampling: Sampling, emit: Emit | None = None
) -> Generated:
    """Continue the prompt `ids` [t >= 1]; `emit` gets the text in pieces, as the engine finishes
    them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_end,
        output_kind=RequestOutputKind.DELTA,
    )
    begin = time.perf_counter()
    steps = engine.llm_engine
    steps.add_request("generate", {"prompt_token_ids": list(ids)}, asked)
    tokens: list[int] = []
    pieces: list[str] = []
    first = 0.0
    ended = False
    while steps.has_unfinished_requests():
        for answer in steps.step():
            found = answer.outputs[0]
            first = first or time.perf_counter() - begin
            tokens += found.token_ids
            pieces.append(found.text)
            ended = found.finish_reason == "stop"
            if emit is not None and found.text:
                emit(found.text)
    seconds = time.perf_counter() - begin
    return Generated(tokens, "".join(pieces), ended, len(ids), seconds, first)


def score(engine: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[list[float], list[bool]]]:
    """Return the log-probabilities in nats of all tokens but the first, and whether each was the
    likeliest, by prompt; the prompts are computed together, and none of them from the prefix
    cache."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = []
    for ids, one in zip(prompts, _answers(engine, prompts, asked), strict=True):
        entries = [
            entry[token] for token, entry in zip(ids[1:], one.prompt_logprobs[1:], strict=True)
        ]
        logprobs = [float(entry.logprob) for entry in entries]
        found.append((logprobs, [entry.rank == 1 for entry in entries]))
    return found


def continued(
    engine: Any, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[int] = ()
) -> list[Continued]:
    """Continue the prompts together by up to `most` likeliest tokens; the tokens `ends` end one."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0.0,
        max_tokens=most,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        stop_token_ids=list(ends),
    )
    found = []
    for answer in _answers(engine, prompts, asked):
        out = answer.outputs[0]
        tokens = list(out.token_ids)
        logprobs = [
            float(entry[token].logprob) for token, entry in zip(tokens, out.logprobs, strict=True)
        ]
        found.append(Continued(tokens, logprobs, answer.num_cached_tokens or 0))
    return found


def hidden_states(engine: Any, ids: Sequence[int]) -> list[Any]:
    """Return fp32 [t, H] on the CPU of a prompt that is computed in one piece: after the embedding,
    each layer but the last, and the final norm. The engine is eager and of one process."""
    from vllm import SamplingParams

    found: list[Any] = []
    handles: list[Any] = []

    def keep(_module: Any, _given: Any, out: Any) -> None:
        # a layer gives what its MLP adds and the sum before it; both are changed in place later
        parts = out if isinstance(out, tuple) else (out,)
        found.append(sum(part.float().clone() for part in parts).cpu())

    def watch(model: Any) -> None:
        trunk = model.model
        places = [trunk.embed_tokens, *trunk.layers[:-1]]
        handles.extend(place.register_forward_hook(keep) for place in places)
        handles.append(
            trunk.norm.register_forward_hook(lambda _module, _given, out: keep(None, None, out[0]))
        )

    engine.apply_model(watch)
    try:
        # log-probabilities are asked for so that nothing comes from the prefix cache
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        _answers(engine, [ids], asked)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _answers(engine: Any, prompts: Sequence[Sequence[int]], asked: Any) -> list[Any]:
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    return list(engine.generate(given, asked, use_tqdm=False))
