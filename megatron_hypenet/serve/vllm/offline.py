"""Text from vLLM within this process, without a server."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.generate import Generated, Sampling

ON_CPU: dict[str, Any] = {
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 1 << 28,
    "enforce_eager": True,
}
"""Options where there is no GPU: vLLM would otherwise ask for nearly all of the machine's memory,
and compile for minutes."""


def load(folder: Path, dtype: str) -> Any:
    """Load the engine with the model of a Hugging Face folder, computing in `dtype`. SetupError
    when it does not start."""
    # stdout is for the text
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from vllm import LLM

    options = {} if torch.cuda.is_available() else ON_CPU
    try:
        return LLM(model=str(folder), dtype=dtype, **options)
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"vLLM does not start with {folder}: {error}") from error


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
