"""Log-probabilities of the training model beside those of what serves it: the exported code, or an
engine, on the same tokens and on every way by which tokens reach it.

The training model is the reference: its logits of whole sequences. An engine answers with the
log-probabilities of tokens on each way: a prompt at once, several together, in chunks, token by
token from its cache, and behind a prefix that it has computed before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BOUND = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.35, "float16": 0.05}
"""Largest accepted difference of a log-probability, in nats, by compute dtype. Measured on a random
model of four layers, exported code and vLLM on a CPU: 1.1e-5 in float32, 0.15 in bfloat16."""
PAD = 0
_SHORT = 5
"""Tokens by which a row of a batch is shorter than the others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said of consecutive tokens of one row."""

    way: str
    """How they reached it."""
    row: int
    first: int
    """Place in the row of the first of these tokens."""
    tokens: list[int]
    logprobs: list[float]
    """In nats."""
    cached: int = 0
    """Tokens before them that came from a prefix cache."""


class Served(Protocol):
    """What is compared with the training model."""

    name: str

    def answers(self, rows: Tensor) -> list[Answer]:
        """Return answers on all ways about rows [b, t] of token ids."""

    def states(self, ids: Tensor) -> list[Tensor] | None:
        """Return hidden states of ids [t], [t, H] each: after the embedding, each layer but the
        last, and the final norm; None where they cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of one engine, compared."""

    engine: str
    way: str
    tokens: int
    cached: int
    max_diff: float
    """In nats, as the mean."""
    mean_diff: float
    worst: str
    """Row and place of the largest difference."""
    ok: bool


def compare(engine: str, answers: Sequence[Answer], logits: Tensor, bound: float) -> list[Way]:
    """Compare answers with the training model's `logits` [b, t, vocab]; one Way for each way, in
    order. NaN is beyond every bound."""
    found: dict[str, list[tuple[Answer, Tensor]]] = {}
    for answer in answers:
        found.setdefault(answer.way, []).append((answer, _differences(answer, logits)))
    return [_way(engine, way, parts, bound) for way, parts in found.items()]


def _differences(answer: Answer, logits: Tensor) -> Tensor:
    """Return distances in nats, float64 [tokens]."""
    before = slice(answer.first - 1, answer.first - 1 + len(answer.tokens))
    wanted = torch.log_softmax(logits[answer.row, before].double(), dim=-1)
    wanted = wanted.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    return (wanted - torch.tensor(answer.logprobs, dtype=torch.float64)).abs().cpu()


def _way(engine: str, way: str, parts: list[tuple[Answer, Tensor]], bound: float) -> Way:
    whole = torch.cat([differences for _, differences in parts])
    answer, differences = max(parts, key=lambda part: _worst(part[1]))
    place = answer.first + int(differences.nan_to_num(nan=torch.inf).argmax())
    return Way(
        engine=engine,
        way=way,
        tokens=len(whole),
        cached=sum(part.cached for part, _ in parts),
        max_diff=float(whole.max()),
        mean_diff=float(whole.mean()),
        worst=f"row {answer.row}, token {place}",
        ok=bool((whole <= bound).all()),
    )


def _worst(differences: Tensor) -> float:
    return float(differences.nan_to_num(nan=torch.inf).max())


class ExportedCode:
    """The exported code in transformers, as a whole model with its cache."""

    name = "exported code"

    def __init__(self, model: Any, new: int) -> None:
        """Take a `model` as `export/hf_model.py` loads it; the last `new` tokens of a row are given
        one by one."""
        self.model = model
        self.new = new

    @torch.inference_mode()
    def answers(self, rows: Tensor) -> list[Answer]:
        """Give rows at once; both with padding on the left; in chunks; the last tokens one by one;
        and those behind a copy of the cache."""
        length = rows.shape[1]
        kept = length - self.new
        pieces = [kept // 3, kept - kept // 3 - 1]
        found = [_answer("one prompt", row, ids, self._pieces(ids, [])) for row, ids in _each(rows)]
        found += self._padded(rows)
        found += [
            _answer("chunks", row, ids, self._pieces(ids, pieces)) for row, ids in _each(rows)
        ]
        one_by_one = list(range(kept, length))
        for row, ids in _each(rows):
            tail = self._pieces(ids, one_by_one)
            found.append(_answer("token by token", row, ids, tail, kept))
        for row, ids in _each(rows):
            # the cache goes another way first, and its copy knows nothing of it
            tail = self._pieces(ids, [kept], detour=True)
            found.append(_answer("copied cache", row, ids, tail, kept, cached=kept))
        return found

    def states(self, ids: Tensor) -> list[Tensor] | None:
        """Return None: the layers were compared one by one already."""
        return None

    def _pieces(self, ids: Tensor, cuts: Sequence[int], *, detour: bool = False) -> Tensor:
        """Return logits [t, vocab] of a row that is given in pieces; with `detour` every cache is
        copied, and the original used for other tokens."""
        from megatron_hypenet.export.hf_remote.generation_hypenet import CACHE

        cache = None
        logits = []
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            given: dict[str, Any] = {} if cache is None else {CACHE: cache}
            out = self.model(self._here(ids[None, start:stop]), use_cache=True, **given)
            logits.append(out.logits[0].cpu())
            cache = out[CACHE]
            if detour and stop < len(ids):
                kept = copy.deepcopy(cache)
                self.model(self._here(ids[None, :1]), use_cache=True, **{CACHE: cache})
                cache = kept
        return torch.cat(logits)

    def _padded(self, rows: Tensor) -> list[Answer]:
        """Return answers about a batch whose second and later rows are shorter, and filled up on
        the left."""
        length = rows.shape[1]
        short = [0 if row == 0 else min(_SHORT * row, length - 2) for row in range(len(rows))]
        given = torch.full_like(rows, PAD)
        mask = torch.zeros_like(rows)
        for row, less in enumerate(short):
            given[row, less:] = rows[row, : length - less]
            mask[row, less:] = 1
        logits = self.model(self._here(given), attention_mask=self._here(mask)).logits.cpu()
        return [
            _answer("batch", row, rows[row, : length - less], logits[row, less:])
            for row, less in enumerate(short)
        ]

    def _here(self, ids: Tensor) -> Tensor:
        return ids.to(self.model.device)


def _each(rows: Tensor) -> list[tuple[int, Tensor]]:
    return list(enumerate(rows))


def _answer(
    way: str, row: int, ids: Tensor, logits: Tensor, first: int = 1, *, cached: int = 0
) -> Answer:
    """Return the answer about ids[first:], from logits [t, vocab] of the whole row `ids` [t]."""
    scores = torch.log_softmax(logits[first - 1 : -1].double(), dim=-1)
    chosen = scores.gather(1, ids[first:, None])[:, 0]
    return Answer(way, row, first, ids[first:].tolist(), chosen.tolist(), cached)
