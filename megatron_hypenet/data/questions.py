"""Questions of a local file, one JSON object a line.

{"question": "...", "choices": ["...", "..."], "answer": 0}      multiple choice
{"prompt": "...", "answer": "..."}                               exact match"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import MIB, FileKind
from megatron_hypenet.untrusted.json_text import parse_json

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KIND = FileKind(
    error=DataError,
    advice="give a JSON object a line, as docs/evaluation.md shows",
    max_bytes=256 * MIB,
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `choices` is empty where an exact answer is asked for."""

    prompt: str
    choices: tuple[str, ...]
    answer: str
    """The text that is right: of the choices, or alone."""

    @property
    def lettered(self) -> str:
        """Return the question with its choices by letter, as text to continue with a letter."""
        options = "".join(
            f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)
        )
        return f"Question: {self.prompt}{options}\nAnswer:"

    @property
    def letter(self) -> str:
        """Return the letter of the right choice."""
        return LETTERS[self.choices.index(self.answer)]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file. DataError, with the line, for one that is none, and for no
    lines."""
    lines = _KIND.read_text(path).split("\n")
    found = [
        _question(parse_json(_KIND, path, line), f"{path}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path}: it has no questions; give a JSON object a line")
    return found


def _question(raw: Any, where: str) -> Question:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: {type(raw).__name__}, not a JSON object")
    if "choices" not in raw:
        prompt, answer = raw.get("prompt"), raw.get("answer")
        if not isinstance(prompt, str) or not isinstance(answer, str) or not (prompt and answer):
            raise DataError(f"{where}: prompt and answer must be texts, or give choices")
        return Question(prompt, (), answer)
    question, choices, right = raw.get("question"), raw["choices"], raw.get("answer")
    if not isinstance(question, str) or not question:
        raise DataError(f"{where}: question must be a text")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(choice, str) and choice for choice in choices)
        or len(set(choices)) < len(choices)
    ):
        raise DataError(f"{where}: choices must be 2 to {len(LETTERS)} different texts")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f"{where}: answer must be the place of the right choice, 0 for the first")
    return Question(question, tuple(choices), choices[right])
