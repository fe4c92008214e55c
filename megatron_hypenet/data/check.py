"""Look at a corpus before anything starts: its files, their kinds and its first document. What
would fail in a job after hours in the queue fails here, without reading all of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hypenet.config.schema import STAGES, RunConfig, SourceConfig
from megatron_hypenet.data.places import Fields
from megatron_hypenet.data.readers import parts_of, read_batches
from megatron_hypenet.data.records import documents_of
from megatron_hypenet.data.sources import Found, find_files, is_prepared
from megatron_hypenet.errors import DataError

LEAST_FACT_TOKENS = 4
"""Tokens of a fact in a recall document, at least: bracket, key, value and bracket. A tokenizer may
need more, which is found before it reads the text."""
MOST_TEXT_BYTES = 10**9
"""Text of a run that a GPU job tokenizes by itself, in bytes on the disk: a few minutes."""


def check_text(found: Found, fields: Fields, source: Path) -> None:
    """Raise DataError unless the first document of every kind of file in `found` can be read."""
    kinds = {
        (file.kind, file.codec): number for number, file in reversed([*enumerate(found.files)])
    }
    some = False
    for number in sorted(kinds.values()):
        parts = [part for part in parts_of(found.files, 0, 1) if part.file == number]
        for batch in read_batches(found.files, parts, fields.key):
            if fields.chat and batch.form == "pieces":
                raise DataError(
                    f"{found.files[number].path}: a .txt file holds no conversations; give .jsonl, "
                    ".json or a table"
                )
            name = str(found.files[number].path)
            documents = documents_of(
                batch, name, fields.key, chat=fields.chat, on_empty=lambda line: None
            )
            if next(documents, None) is not None:
                some = True
                break
    if not some and len(kinds) == len(found.files):
        raise DataError(
            f"{source}: holds no text; give a file with at least one sequence of tokens."
        )


def check_source(source: SourceConfig) -> int:
    """Check a source of a run: a pair can be opened, a text has a first document. Returns the
    bytes of text that are to be tokenized; 0 for a pair.

    Raises DataError that names the file, and the line or row.
    """
    if is_prepared(source.path):
        # numpy, which commands that only start processes do without
        from megatron_hypenet.data.indexed import open_tokens

        open_tokens(source.path)
        return 0
    found = find_files(source.path)
    check_text(found, Fields(source.text_key, source.messages_key), source.path)
    return found.size


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallUse:
    """A place where a run makes recall documents."""

    setting: str
    """The setting to change, with its value."""
    num_pairs: int
    seq_length: int


def recall_uses(run: RunConfig) -> list[RecallUse]:
    """Return the places where a run makes recall documents whatever its layer selection reads:
    stages that train on some, and evaluations at the shortest length."""
    found = [
        RecallUse(
            setting=f"{name}.seq_length={run.stage(name).seq_length}",
            num_pairs=run.data.recall_pairs,
            seq_length=run.stage(name).seq_length,
        )
        for name in (STAGES if run.data.recall_fraction > 0 else ())
    ]
    shortest = min((*run.eval.length_multiples, *run.eval.gate.multiples))
    pairs, length = run.eval.recall_pairs, run.eval.seq_length * shortest
    setting = f"eval.recall_pairs={pairs}"
    return [*found, RecallUse(setting=setting, num_pairs=pairs, seq_length=length)]


def check_recall_lengths(run: RunConfig) -> None:
    """Raise DataError when recall documents cannot fit whatever the tokenizer is."""
    problems: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    for use in recall_uses(run):
        least = 2 * use.num_pairs * LEAST_FACT_TOKENS
        if use.seq_length < least:
            problems[
                f"{use.setting}: a recall document with {use.num_pairs} facts needs at least "
                f"{least} tokens; seq_length is {use.seq_length}. Use a longer seq_length or fewer "
                "recall pairs."
            ] = None
    refuse_recall(list(problems))


def refuse_recall(problems: Sequence[str]) -> None:
    """Raise DataError with all problems of a run's recall documents, if there are any."""
    if problems:
        raise DataError(
            "the recall documents do not fit the configuration:\n  - " + "\n  - ".join(problems)
        )


def refuse_large_text(sources: Sequence[SourceConfig], tokenizer: Path) -> None:
    """Raise DataError when a GPU job would tokenize more than MOST_TEXT_BYTES, with the commands
    that do it before.

    GPUs would wait for it, and a run starts it again from the beginning when it is interrupted.
    """
    texts = [source for source in sources if not is_prepared(source.path)]
    sizes = [find_files(source.path).size for source in texts]
    if sum(sizes) <= MOST_TEXT_BYTES:
        return
    commands = [
        shlex.join(prepare_words(source, tokenizer))
        for source, size in zip(texts, sizes, strict=True)
        if size == max(sizes) or size > MOST_TEXT_BYTES
    ]
    raise DataError(
        f"the text takes {sum(sizes) / 1e9:.1f} GB, and GPUs would wait while it is tokenized; "
        f"prepare it first, and name the prefix in data.train:\n  " + "\n  ".join(commands)
    )


def prepare_words(source: SourceConfig, tokenizer: Path) -> list[str]:
    """Return the command that prepares a source."""
    path = source.path
    name = path.name.split(".")[0].replace("*", "") or "corpus"
    words = ["hypenet", "data", "prepare", str(path), str(path.parent / f"{name}.tokens")]
    words += ["--tokenizer", str(tokenizer)]
    if source.messages_key is not None:
        return [*words, "--messages-key", source.messages_key]
    return words if source.text_key == "text" else [*words, "--text-key", source.text_key]
