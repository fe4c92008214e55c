"""What vLLM says of tokens on every way by which they reach it, for the comparison with the
training model (`export/parity.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.errors import SetupError
from megatron_hypenet.export.parity import Answer
from megatron_hypenet.serve.vllm.process import EngineProcess

CHUNKS = 2
"""A long prompt is this many pieces of the engine's largest, and half of one."""
_ROWS = 2


class VllmEngine:
    """A model in the process of an engine, started for prompts of `length` tokens that take several
    pieces."""

    name = "vLLM"

    def __init__(
        self, process: EngineProcess, folder: Path, dtype: str, *, least: int, new: int
    ) -> None:
        """Start an engine for prompts of `length` tokens, `least` or more, and `new` generated
        ones. SetupError when it does not start."""
        self.process = process
        self.folder = folder
        self.dtype = dtype
        self.new = new
        # prefixes are cached in whole blocks, and a piece of a prompt is one of them or more
        self.piece = max(process.block_tokens(folder, dtype), least // CHUNKS)
        self.length = CHUNKS * self.piece + self.piece // 2
        self.options: dict[str, Any] = {
            "max_model_len": self.length + new + 1,
            "max_num_seqs": 4,
            "max_num_batched_tokens": self.piece,
            "enable_prefix_caching": True,
        }
        self.eager = process.start(folder, dtype, **self.options)
        self._told: list[Answer] = []

    def rows(self, vocab_size: int, seed: int) -> Tensor:
        """Return two prompts of random tokens with what the engine continues them by, [2, length +
        new]: its answers while it decodes are about tokens that it chose."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(vocab_size, (_ROWS, self.length), generator=generator)
        decoded = self.process.continued(prompts.tolist(), self.new)
        self._told = [
            Answer("token by token", row, self.length, one["tokens"], one["logprobs"])
            for row, one in enumerate(decoded)
        ]
        return torch.cat([prompts, torch.tensor([one["tokens"] for one in decoded])], dim=1)

    def answers(self, rows: Tensor) -> list[Answer]:
        """Return answers about `rows`, as this object has made them. SetupError when no token came
        from the prefix cache."""
        whole = rows[:, : self.length].tolist()
        ((alone, _),) = self.process.score([whole[0][: self.piece]])
        ((long, _),) = self.process.score([whole[0]])
        parts = [whole[0][: self.length // 2], whole[1], whole[1][:2], whole[0]]
        together = self.process.score(parts)
        found = [
            Answer("one prompt", 0, 1, whole[0][1 : self.piece], alone),
            Answer("chunks", 0, 1, whole[0][1:], long),
            *(
                Answer("batch", row, 1, ids[1:], scores)
                for row, ids, (scores, _) in zip((0, 1, 1, 0), parts, together, strict=True)
            ),
            *self._told,
        ]
        again = [
            self.process.continued([rows[0, :stop].tolist()], 1)[0]
            for stop in range(self.length - 1, self.length + min(self.new, 4))
        ]
        if not all(one["cached"] for one in again):
            raise SetupError(
                f"vLLM took none of {self.length} tokens from its prefix cache the second time; "
                "is prefix caching off in this engine?"
            )
        found += [
            Answer("prefix cache", 0, stop, one["tokens"], one["logprobs"], one["cached"])
            for stop, one in enumerate(again, self.length - 1)
        ]
        return found

    def states(self, ids: Tensor) -> list[Tensor] | None:
        """Return hidden states of a prompt of one piece. A compiled engine is started again, as an
        eager one."""
        if not self.eager:
            self.eager = self.process.start(
                self.folder, self.dtype, **self.options, enforce_eager=True
            )
        return list(self.process.hidden_states(ids[: self.piece].tolist()))
