"""A vLLM engine in a process of its own, which may be of another environment: vLLM decides which
torch there is, and the training model needs its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self

from megatron_hypenet import __version__
from megatron_hypenet.errors import SetupError

MODULE = "megatron_hypenet.serve.vllm.worker"
_ALONE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "HF_HUB_OFFLINE": "1",
}
"""One process, no network, and prompts as long as they are asked for."""
_KEPT_LINES = 30


class EngineProcess:
    """The process, until the end of its `with` block."""

    def __init__(self, python: str, *, other_environment: bool) -> None:
        """Start `python`; one of another environment does not see this one's PYTHONPATH.
        SetupError when it lacks this package, or has another version of it."""
        environment = {**os.environ, **_ALONE}
        if other_environment:
            environment.pop("PYTHONPATH", None)
        self.python = python
        self._said: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = subprocess.Popen(
            [python, "-m", MODULE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._reader = Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        hello = self._answer()
        self.vllm_version: str | None = hello["vllm"]
        if hello["version"] != __version__:
            self.close()
            raise SetupError(
                f"{python} has megatron-hypenet {hello['version']}, and this is {__version__}; "
                "install the same version there"
            )

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.close()

    def close(self) -> None:
        """End the process, and wait for it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def block_tokens(self, folder: Path, dtype: str) -> int:
        """Return the number of tokens in a block of the engine's cache."""
        return int(self.ask("block_tokens", folder=str(folder), dtype=dtype))

    def start(self, folder: Path, dtype: str, **options: Any) -> bool:
        """Start the engine with options of vllm.LLM; returns whether it is eager."""
        return bool(self.ask("start", folder=str(folder), dtype=dtype, options=options))

    def score(self, prompts: Sequence[Sequence[int]]) -> list[tuple[list[float], list[bool]]]:
        """Return log-probabilities in nats of all tokens but the first, and whether each was the
        likeliest, by prompt."""
        found = self.ask("score", prompts=[list(ids) for ids in prompts])
        return [(logprobs, likeliest) for logprobs, likeliest in found]

    def continued(
        self, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[int] = ()
    ) -> list[dict[str, Any]]:
        """Continue prompts by the likeliest tokens; returns `tokens`, `logprobs`, and how many
        tokens of the prompt were `cached`."""
        given = [list(ids) for ids in prompts]
        found: list[dict[str, Any]] = self.ask(
            "continued", prompts=given, most=most, ends=list(ends)
        )
        return found

    def hidden_states(self, ids: Sequence[int]) -> list[Any]:
        """Return fp32 [t, H] after the embedding, each layer but the last, and the final norm."""
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "states.safetensors"
            self.ask("hidden_states", ids=list(ids), file=str(file))
            found = load_file(file)
        return [found[str(place)] for place in range(len(found))]

    def ask(self, do: str, **given: Any) -> Any:
        """Return what the worker's method `do` returns. SetupError when it fails."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "with": given}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says why
        answer = self._answer()
        if "error" in answer:
            raise SetupError(f"vLLM ({self.python}): {answer['error']}")
        return answer["found"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        code = self._process.returncode
        raise SetupError(
            f"the process of vLLM ended with code {code} ({self.python} -m {MODULE}); it said:\n  "
            + "\n  ".join(self._said)
        )

    def _listen(self, stream: IO[str]) -> None:
        """Keep the last lines that the engine prints, for when it ends."""
        for line in stream:
            self._said.append(line.rstrip())
