"""Documents that ask for what stands in them: needles, chains of variables, frequent words, pairs
of keys and values, of any length in tokens.

After RULER (arXiv 2404.06654): what is asked for lies at a given depth of filler text, and the
question ends where the answer begins, so that a base model can continue it. A document is a pure
function of (seed, task, index, length, depth)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_hypenet.errors import DataError

Encode = Callable[[str], list[int]]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""Filler of RULER's simplest tasks, for when no text is given."""

_WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market "
    "needle orange pencil quarry rabbit saddle temple umbrella valley window yellow anchor basket "
    "castle dragon eagle falcon guitar harbor insect jungle kettle lemon mirror novel ocean pepper"
).split()
_NUM_KEYS = 4
_NUM_VALUES = 4
_NUM_COMMON = 5
_NUM_PAIRS = 8
_HOPS = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """A document and the texts that its continuation must contain."""

    ids: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """What stands in the filler, by depth in 0..1, and the question behind it."""

    statements: list[tuple[float, str]]
    question: str
    answers: tuple[str, ...]


class Probes:
    """Documents for one tokenizer."""

    def __init__(self, encode: Encode, filler: Sequence[int] | None = None, *, seed: int) -> None:
        """Set up the tasks; `filler`: tokens between the statements, None for RULER's noise.
        DataError for none."""
        self.encode = encode
        self.filler = list(encode(NOISE)) if filler is None else list(filler)
        self.seed = seed
        if not self.filler:
            raise DataError("the filler text has no tokens; give a longer text")

    def document(self, task: str, index: int, length: int, depth: float) -> Probe:
        """Return document `index` of a task, of exactly `length` tokens, with the asked-for
        statement at `depth`. DataError when they do not fit."""
        rng = random.Random(f"{self.seed} {task} {index} {length} {depth}")
        draft = TASKS[task](rng, depth, self._lines(length))
        question = self.encode(draft.question)
        statements = [(at, self.encode(text)) for at, text in draft.statements]
        room = length - len(question) - sum(len(ids) for _, ids in statements)
        if room < 0:
            raise DataError(
                f"{task}: its statements and its question take {length - room} tokens and the "
                f"document has {length}; use longer documents"
            )
        start = rng.randrange(len(self.filler))
        ids: list[int] = []
        taken = 0
        for at, statement in sorted(statements, key=lambda entry: entry[0]):
            ids += self._filler(start + taken, int(at * room) - taken) + statement
            taken = int(at * room)
        ids += self._filler(start + taken, room - taken) + question
        return Probe(ids, draft.answers)

    def _filler(self, start: int, count: int) -> list[int]:
        return [self.filler[(start + i) % len(self.filler)] for i in range(count)]

    def _lines(self, length: int) -> int:
        """Return short lines that fill half of a document, for a task that is made of them."""
        return max(_NUM_COMMON, length // (2 * len(self.encode("\n1234. umbrella"))))


def score(text: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that a continuation contains, 0 to 1."""
    return sum(answer in text for answer in answers) / len(answers)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _needle(key: str, number: str) -> str:
    return f"\nOne of the special magic numbers for {key} is: {number}.\n"


def _ask(key: str) -> str:
    return (
        f"\nWhat is the special magic number for {key} mentioned in the text? "
        f"The special magic number for {key} mentioned in the text is:"
    )


def _single(rng: random.Random, depth: float, lines: int) -> _Draft:
    key = rng.choice(_WORDS)
    number = _number(rng)
    return _Draft([(depth, _needle(key, number))], _ask(key), (number,))


def _multi_key(rng: random.Random, depth: float, lines: int) -> _Draft:
    keys = rng.sample(_WORDS, _NUM_KEYS)
    numbers = [_number(rng) for _ in keys]
    places = [depth, *(rng.random() for _ in keys[1:])]
    needles = [_needle(key, number) for key, number in zip(keys, numbers, strict=True)]
    return _Draft(list(zip(places, needles, strict=True)), _ask(keys[0]), (numbers[0],))


def _multi_value(rng: random.Random, depth: float, lines: int) -> _Draft:
    key = rng.choice(_WORDS)
    numbers = [_number(rng) for _ in range(_NUM_VALUES)]
    places = [depth, *(rng.random() for _ in numbers[1:])]
    question = (
        f"\nWhat are all the special magic numbers for {key} mentioned in the text? "
        f"The special magic numbers for {key} mentioned in the text are:"
    )
    needles = [_needle(key, number) for number in numbers]
    return _Draft(list(zip(places, needles, strict=True)), question, tuple(numbers))


def _variables(rng: random.Random, depth: float, lines: int) -> _Draft:
    """Return a chain of assignments, which begins at `depth` and goes on behind it."""
    names = [word.upper() for word in rng.sample(_WORDS, _HOPS + 1)]
    value = str(rng.randrange(10**4, 10**5))
    places = sorted([depth, *(depth + (1 - depth) * rng.random() for _ in names[1:])])
    given = [value, *(f"VAR {name}" for name in names)]
    texts = [f"\nVAR {name} = {source}.\n" for name, source in zip(names, given, strict=False)]
    question = (
        f"\nFind all variables that are assigned the value {value} in the text above. "
        f"The variables that are assigned the value {value} are:"
    )
    return _Draft(list(zip(places, texts, strict=True)), question, tuple(names))


def _common_words(rng: random.Random, depth: float, lines: int) -> _Draft:
    """Return a list in which few words come often; the depth means nothing here."""
    words = rng.sample(_WORDS, len(_WORDS))
    common = words[:_NUM_COMMON]
    rare = [word for word in words[_NUM_COMMON:] for _ in range(max(1, lines // 200))]
    often = max(3, (lines - len(rare)) // _NUM_COMMON)
    listed = common * often + rare[: max(lines - often * _NUM_COMMON, 0)]
    rng.shuffle(listed)
    text = "\n" + "\n".join(f"{place}. {word}" for place, word in enumerate(listed, 1)) + "\n"
    question = (
        f"\nWhat are the {_NUM_COMMON} most common words in the list above? "
        f"The {_NUM_COMMON} most common words in the list are:"
    )
    return _Draft([(0.5, text)], question, tuple(common))


def _pairs(rng: random.Random, depth: float, lines: int) -> _Draft:
    """Return facts as the recall documents of `data/recall.py` state them: `[ key value ]`."""
    words = rng.sample(_WORDS, 2 * _NUM_PAIRS)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    places = [depth, *(rng.random() for _ in pairs[1:])]
    texts = [f"\n[ {key} {value} ]\n" for key, value in pairs]
    key, value = pairs[0]
    return _Draft(list(zip(places, texts, strict=True)), f"\n[ {key}", (value,))


TASKS: dict[str, Callable[[random.Random, float, int], _Draft]] = {
    "needle": _single,
    "needle_multikey": _multi_key,
    "needle_multivalue": _multi_value,
    "variables": _variables,
    "common_words": _common_words,
    "pairs": _pairs,
}
"""Tasks by name."""
