"""Text from vLLM within this process, without a server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hypenet.export.generate import Generated, Sampling


def load(folder: Path, dtype: str | None) -> Any:
    """The engine with the model of a Hugging Face folder; `dtype` None is that of its weights."""
    from vllm import LLM

    return LLM(model=str(folder), dtype=dtype or "auto")


def generate(engine: Any, ids: Sequence[int], sampling: Sampling) -> Generated:
    """Continue the prompt `ids` [t >= 1]. The text comes whole, so the first token is not timed."""
    from vllm import SamplingParams

    asked = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_end,
    )
    begin = time.perf_counter()
    prompt = {"prompt_token_ids": list(ids)}
    found = engine.generate(prompt, asked, use_tqdm=False)[0].outputs[0]
    seconds = time.perf_counter() - begin
    ended = found.finish_reason == "stop"
    return Generated(list(found.token_ids), found.text, ended, len(ids), seconds, 0.0)
