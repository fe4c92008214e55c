"""What a model can do with long texts and with questions, as rows of one table.

A row is {"task", "score", "count"} with "length", "position", "depth" or "way" where they apply.
Models are seen through two functions: scores of given tokens, and the text that continues given
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.data.probes import Probes, score
from megatron_hypenet.data.questions import Question
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.heldout import TokenScores

Row = dict[str, Any]
NEW_TOKENS = 64
"""Most tokens of an answer."""
PLACE = ("task", "way", "length", "position", "depth")
"""What says which measurement a row has."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be evaluated."""

    score: TokenScores
    """ids [b, t] -> nats [b, t - 1] and whether each token was the first choice, on the CPU."""
    answer: Callable[[Sequence[int], int], str]
    """ids, most new tokens -> the greedy continuation."""
    encode: Callable[[str], list[int]]
    end_tokens: Sequence[int] = ()
    """The tokens that end a text."""
    chat: Callable[[list[dict[str, str]], bool], str] | None = None
    """messages, whether the assistant speaks next (else it goes on with the last message) -> text,
    by the tokenizer's chat template; None where it has none."""


def loss_rows(model: Model, tokens: Tensor, length: int, count: int) -> list[Row]:
    """Return held-out loss in nats per token over `count` sequences of `length` tokens from the
    start of `tokens` [n]: of all, and by position, in ranges that double. DataError for too short a
    text."""
    if len(tokens) < length + 1:
        raise DataError(
            f"the text has {len(tokens)} tokens and a sequence of {length} needs {length + 1}; "
            "give a longer text or shorter lengths"
        )
    rows = min(count, (len(tokens) - 1) // length)
    total = torch.zeros(length, dtype=torch.float64)
    for row in range(rows):
        sequence = tokens[None, row * length : (row + 1) * length + 1]
        total += model.score(sequence)[0][0].double()
    by_token = total / rows
    whole = {"task": "loss", "length": length, "score": float(by_token.mean()), "count": rows}
    found: list[Row] = [whole]
    start = 0
    stop = min(64, length)
    while start < length:
        part = float(by_token[start:stop].mean())
        place = f"{start}-{stop - 1}"
        found.append({**whole, "task": "loss by position", "position": place, "score": part})
        start, stop = stop, min(2 * stop, length)
    return found


def probe_row(
    model: Model, probes: Probes, task: str, length: int, depth: float, count: int
) -> Row:
    """Return the share of the answers that were found, in %, over `count` documents."""
    total = 0.0
    for index in range(count):
        probe = probes.document(task, index, length, depth)
        total += score(model.answer(probe.ids, NEW_TOKENS), probe.answers)
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "score": 100 * total / count,
        "count": count,
    }


def question_rows(model: Model, questions: Sequence[Question], name: str) -> list[Row]:
    """Return accuracy in %: of multiple choice by log-likelihood and by generation, of the others
    by an exact match of the first line."""
    choices = [question for question in questions if question.choices]
    exact = [question for question in questions if not question.choices]
    rows: list[Row] = []
    if choices:
        likely = sum(_likeliest(model, question) == question.answer for question in choices)
        said = sum(
            model.answer(model.encode(question.lettered), 8).strip()[:1] == question.letter
            for question in choices
        )
        ways = (("log-likelihood", likely), ("generation", said))
        rows += [_share(name, way, right, len(choices)) for way, right in ways]
    if exact:
        right = sum(
            model.answer(model.encode(question.prompt), NEW_TOKENS)
            .strip()
            .partition("\n")[0]
            .strip()
            == question.answer.strip()
            for question in exact
        )
        rows.append(_share(name, "exact match", right, len(exact)))
    return rows


def _share(name: str, way: str, right: int, count: int) -> Row:
    return {"task": name, "way": way, "score": 100 * right / count, "count": count}


def _likeliest(model: Model, question: Question) -> str:
    """Return the choice with the least loss per token behind the question."""
    prompt = model.encode(f"Question: {question.prompt}\nAnswer:")

    def loss(choice: str) -> float:
        ids = prompt + model.encode(f" {choice}")
        return float(model.score(torch.tensor([ids]))[0][0, len(prompt) - 1 :].mean())

    return min(question.choices, key=loss)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each measurement, with the score of each model beside the others'."""
    table: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = {name: row[name] for name in PLACE if name in row}
        table.setdefault(tuple(place.items()), place)[row["model"]] = row["score"]
    return list(table.values())
