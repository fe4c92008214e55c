"""Text to token files: .txt and .jsonl documents through a tokenizer into Megatron's .bin/.idx
format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_hypenet.data.indexed import TokenFileWriter, open_tokens
from megatron_hypenet.data.tokenizer import end_of_text
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import reason_of, shown

TEXT_SUFFIXES = (".txt", ".jsonl")
PIECE_CHARACTERS = 16_000
"""Approximate size of the pieces into which a .txt file is cut at line ends, so that whole pieces
can be held out; only the end of the file is marked."""
_BATCH_DOCUMENTS = 256
_LINE_BYTES = 256 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ\0": "an xz file",
    b"BZh": "a bzip2 file",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of other kinds of files, which are sometimes given as text by mistake."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of what one preparation wrote."""

    documents: int
    tokens: int
    note: str = ""
    """What was left out of the source, and why; else empty."""


def prepare_file(
    source: Path, prefix: Path, tokenizer: Any, *, end: int | None = None,
    vocab_size: int | None = None, text_key: str = "text",
    on_documents: Callable[[int], None] = lambda count: None,
) -> Counts:  # fmt: skip
    """Tokenize `source` (.txt or .jsonl) into the pair `prefix`.bin/.idx; the end-of-text id
    follows every document.

    `end` is that id (default: the tokenizer's, see `end_of_text`); `vocab_size` is the model's
    (default: the tokenizer's); `on_documents` is called with the running count. A failure leaves no
    files. Raises DataError when the file is missing, of another kind, without text, or the
    tokenizer makes ids beyond `vocab_size`.
    """
    end = end_of_text(tokenizer, None).id if end is None else end
    limit = len(tokenizer) if vocab_size is None else vocab_size
    empty: list[int] = []
    documents = read_documents(source, text_key=text_key, on_empty=empty.append)
    with TokenFileWriter(prefix, vocab_size=limit) as writer:
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            encoded = tokenizer(
                [text for text, _ in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            for ids, (_, complete) in zip(encoded["input_ids"], batch, strict=True):
                ids = [*ids, end] if complete else ids
                if not ids:
                    continue
                if max(ids) >= limit:
                    raise DataError(
                        f"{source}: the tokenizer makes id {max(ids)}, the model's vocabulary has "
                        f"{limit} entries; "
                        "use the tokenizer that belongs to the teacher."
                    )
                writer.add(ids)
            on_documents(writer.num_documents)
        if writer.num_tokens == 0:
            raise DataError(
                f"{source}: holds no text; give a file with at least one sequence of tokens."
            )
    lines = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
    note = (
        f"{source}: {len(empty):,} documents have an empty text and are left out (line {lines})"
        if empty
        else ""
    )
    return Counts(documents=writer.num_documents, tokens=writer.num_tokens, note=note)


def read_documents(
    source: Path, *, text_key: str = "text", on_empty: Callable[[int], None] = lambda line: None
) -> Iterator[tuple[str, bool]]:
    """Yield pairs (text, whether the document ends with it) of a .txt file (one document, in
    pieces) or a .jsonl file (one document per line).

    `on_empty` is called with the line number of every .jsonl object whose text is empty; such an
    object gives no document. Raises DataError that names file and line for every other defect.
    """
    if not source.is_file():
        raise DataError(
            f"{source}: no such file; data takes .txt and .jsonl files and prefixes of prepared "
            ".bin/.idx pairs."
        )
    if source.suffix not in TEXT_SUFFIXES:
        raise DataError(
            f"{source}: unknown kind of data '{source.suffix}'; use .txt, .jsonl, "
            "or the prefix of a .bin/.idx pair."
        )
    with source.open("rb") as stream:
        head = stream.read(8)
    for magic, name in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise DataError(
                f"{source}: not text but {name}; {'convert' if 'UTF' in name else 'unpack'} it "
                "first."
            )
    yield from (
        _text_pieces(source) if source.suffix == ".txt" else _json_lines(source, text_key, on_empty)
    )


def _text_pieces(source: Path) -> Iterator[tuple[str, bool]]:
    """Pieces of whole lines; a blank line after `PIECE_CHARACTERS` ends one, any line end after
    twice as many.

    A byte order mark is dropped, and every line end is a line feed.
    """
    lines: list[str] = []
    size = 0
    try:
        with source.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if "\0" in line:
                    raise DataError(
                        f"{source}, line {number}: holds a NUL character; the file is damaged or "
                        "no text."
                    )
                lines.append(line)
                size += len(line)
                if size >= 2 * PIECE_CHARACTERS or (size >= PIECE_CHARACTERS and not line.strip()):
                    yield "".join(lines), False
                    lines = []
                    size = 0
    except UnicodeDecodeError:
        with source.open("rb") as raw:
            for number, content in enumerate(raw, start=1):
                _decoded(source, number, content)
        raise
    if "".join(lines).strip() or source.stat().st_size > 0:
        yield "".join(lines), True


def _json_lines(
    source: Path, text_key: str, on_empty: Callable[[int], None]
) -> Iterator[tuple[str, bool]]:
    with source.open("rb") as stream:
        number = 0
        while content := stream.readline(_LINE_BYTES + 1):
            number += 1
            if len(content) > _LINE_BYTES:
                raise DataError(
                    f"{source}, line {number}: longer than {_LINE_BYTES >> 20} MiB; "
                    "a .jsonl file has one object a line."
                )
            line = _decoded(source, number, content)
            if not line.strip():
                continue
            text = _text_of(line, f"{source}, line {number}", text_key)
            if text:
                yield text, True
            else:
                on_empty(number)


def _decoded(source: Path, number: int, content: bytes) -> str:
    """Decode line `number` of `source`; a byte order mark on the first one is dropped."""
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}, line {number}: not UTF-8 text: byte {error.start + 1} of the line is "
            f"0x{content[error.start]:02x}; convert the "
            "file, for example with iconv."
        ) from None


def _text_of(line: str, where: str, text_key: str) -> str:
    """The text under `text_key` of the JSON object in `line`; DataError that begins with `where`
    when it has none that can be used."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(key == text_key for key, _ in pairs) > 1:
            raise ValueError(f"the key '{text_key}' is written twice")
        return found

    try:
        record = json.loads(line, object_pairs_hook=once)
    # ValueError also covers a number of thousands of digits
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON: {shown(reason_of(error))}; a .jsonl file has one object a line."
        ) from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        got = (
            f"{type(text).__name__}, not text,"
            if isinstance(record, dict) and text_key in record
            else "no text"
        )
        raise DataError(
            f"{where}: {got} under '{text_key}' (found: {shown(known)}); name the field that holds "
            "it."
        )
    if (half := _SURROGATE.search(text)) is not None:
        raise DataError(
            f"{where}: the text holds \\u{ord(half.group()):04x}, half of a surrogate pair and no "
            f"character (at character {half.start()}); "
            "the text was cut inside a character such as an emoji: correct or remove the line."
        )
    return text


def merge_files(prefixes: Sequence[Path], out: Path) -> Counts:
    """Join prepared pairs, in order, into the pair `out`. Raises DataError when their id types
    differ."""
    files = [open_tokens(prefix) for prefix in prefixes]
    types = {str(file.tokens.dtype) for file in files}
    if len(types) > 1:
        raise DataError(
            f"token files of different id types cannot be joined: {', '.join(sorted(types))}; "
            "prepare all with one tokenizer."
        )
    with TokenFileWriter(out, dtype=files[0].tokens.dtype) as writer:
        for file in files:
            writer.add_file(file)
    return Counts(documents=writer.num_documents, tokens=writer.num_tokens)
