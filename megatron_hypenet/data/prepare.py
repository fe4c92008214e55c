"""Text to token files: .txt and .jsonl documents through a tokenizer into Megatron's .bin/.idx format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_hypenet.data.indexed import TokenFileWriter, open_tokens
from megatron_hypenet.data.tokenizer import end_of_text_id
from megatron_hypenet.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl")
PIECE_CHARACTERS = 16_000
"""A .txt file is cut at line ends into pieces of about this size, so that whole pieces can be held out; only its end is marked."""
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one preparation wrote."""

    documents: int
    tokens: int


def prepare_file(
    source: Path, prefix: Path, tokenizer: Any, *, vocab_size: int | None = None, text_key: str = "text",
    on_documents: Callable[[int], None] = lambda count: None,
) -> Counts:  # fmt: skip
    """Tokenize `source` (.txt or .jsonl) into the pair `prefix`.bin/.idx; the end-of-text id follows every document.

    `vocab_size` is the model's (default: the tokenizer's); `on_documents` hears the running count. Nothing is left behind on failure.
    Raises DataError when the file is missing, of another kind, without text, or the tokenizer makes ids beyond `vocab_size`.
    """
    end = end_of_text_id(tokenizer)
    limit = len(tokenizer) if vocab_size is None else vocab_size
    documents = read_documents(source, text_key=text_key)
    with TokenFileWriter(prefix, vocab_size=limit) as writer:
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids, (_, complete) in zip(encoded["input_ids"], batch, strict=True):
                ids = [*ids, end] if complete else ids
                if not ids:
                    continue
                if max(ids) >= limit:
                    raise DataError(
                        f"{source}: the tokenizer makes id {max(ids)}, the model's vocabulary has {limit} entries; "
                        "use the tokenizer that belongs to the teacher."
                    )
                writer.add(ids)
            on_documents(writer.num_documents)
        if writer.num_tokens == 0:
            raise DataError(f"{source}: holds no text; give a file with at least one sequence of tokens.")
    return Counts(documents=writer.num_documents, tokens=writer.num_tokens)


def read_documents(source: Path, *, text_key: str = "text") -> Iterator[tuple[str, bool]]:
    """(text, does the document end with it) pairs of a .txt file (one document, in pieces) or a .jsonl file (one document a line)."""
    if not source.is_file():
        raise DataError(f"{source}: no such file; data takes .txt and .jsonl files and prefixes of prepared .bin/.idx pairs.")
    if source.suffix not in TEXT_SUFFIXES:
        raise DataError(f"{source}: unknown kind of data '{source.suffix}'; use .txt, .jsonl, or the prefix of a .bin/.idx pair.")
    try:
        yield from _text_pieces(source) if source.suffix == ".txt" else _json_lines(source, text_key)
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text: {error}; convert it, for example with iconv.") from error


def _text_pieces(source: Path) -> Iterator[tuple[str, bool]]:
    """Pieces of whole lines; a blank line after `PIECE_CHARACTERS` ends one, any line end after twice as many."""
    lines: list[str] = []
    size = 0
    with source.open(encoding="utf-8") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= 2 * PIECE_CHARACTERS or (size >= PIECE_CHARACTERS and not line.strip()):
                yield "".join(lines), False
                lines, size = [], 0
    if "".join(lines).strip() or source.stat().st_size > 0:
        yield "".join(lines), True


def _json_lines(source: Path, text_key: str) -> Iterator[tuple[str, bool]]:
    with source.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}, line {number}: not JSON: {error}; a .jsonl file has one object a line.") from error
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{source}, line {number}: no text under '{text_key}' (found: {known}); name the field that holds it.")
            if text:
                yield text, True


def merge_files(prefixes: Sequence[Path], out: Path) -> Counts:
    """Join prepared pairs, in order, into the pair `out`. Raises DataError when their id types differ."""
    files = [open_tokens(prefix) for prefix in prefixes]
    types = {str(file.tokens.dtype) for file in files}
    if len(types) > 1:
        raise DataError(f"token files of different id types cannot be joined: {', '.join(sorted(types))}; prepare all with one tokenizer.")
    with TokenFileWriter(out, dtype=files[0].tokens.dtype) as writer:
        for file in files:
            writer.add_file(file)
    return Counts(documents=writer.num_documents, tokens=writer.num_tokens)
