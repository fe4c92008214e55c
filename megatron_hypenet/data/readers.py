"""Read files of text as batches of whole documents that another process can parse and tokenize.

A batch holds the documents as they are in the file (bytes of lines, pieces of text, values of a
table), so that reading stays far faster than tokenizing. Which documents a batch has depends on the
files alone, and `Place` says where the next one begins, so that reading can go on from there.

A .txt file is one document. It is cut into pieces of about PIECE_CHARACTERS characters at line
ends, so that whole pieces can be held out; only the end of the file is marked.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, NoReturn

from megatron_hypenet.data.opening import damage_named, open_bytes
from megatron_hypenet.data.places import RecordError, Where
from megatron_hypenet.data.sources import SourceFile
from megatron_hypenet.data.tables import batches_of_table
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import reason_of, shown

PIECE_CHARACTERS = 16_000
"""Approximate size of the pieces of a .txt file: a blank line after so many characters ends one,
any line end after twice as many."""
BATCH_BYTES = 1 << 20
"""Bytes of lines, or characters of pieces and lists, in a batch."""
LINE_BYTES = 256 << 20
"""Longest line, or object of a list, that is accepted."""

_TABLE_ROWS = 512


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on."""

    file: int = 0
    """Number of the file."""
    items: int = 0
    """Lines or rows of it that were read."""
    offset: int = 0
    """Bytes of its content (unpacked) that were read; only for files of lines."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some documents of one file, not yet parsed."""

    file: int
    first: int
    """Number of the first line or row, from 1."""
    form: Literal["lines", "pieces", "rows"]
    content: Any
    """lines: bytes. pieces: list of text. rows: list of values, or of JSON objects as text."""
    after: Place
    """Where the next batch begins."""
    read_bytes: int
    """Bytes on the disk that were read of this file so far, about."""
    ends: bool = True
    """Whether the document ends with the last piece."""


@dataclass(frozen=True, slots=True)
class Part:
    """The share of a source that one of several jobs reads: of each file the bytes start .. stop -
    1, from the first line that begins there to the last one that does."""

    file: int
    start: int
    stop: int


def parts_of(files: Sequence[SourceFile], number: int, count: int) -> list[Part]:
    """Return the `number`-th of `count` shares (from 0) of about the same number of bytes on the
    disk.

    Files of lines are split; any other file belongs whole to the share in which it begins.
    """
    total = sum(file.size for file in files)
    low = total * number // count
    high = total * (number + 1) // count
    found = []
    before = 0
    for index, file in enumerate(files):
        start = before
        stop = before + file.size
        before = stop
        if file.splits:
            first, last = max(start, low), min(stop, high)
            if first < last:
                found.append(Part(index, first - start, last - start))
        elif low <= start < high:
            found.append(Part(index, 0, file.size))
    return found


def read_batches(
    files: Sequence[SourceFile], parts: Sequence[Part], column: str, begin: Place | None = None
) -> Iterator[Batch]:
    """Yield all batches of `parts`, or those from `begin` on. `column` is what is read of a table.

    Raises DataError that names the file, and the line where there is one.
    """
    for part in parts:
        place = Place(part.file)
        if begin is not None and begin.file > part.file:
            continue
        if begin is not None and begin.file == part.file:
            place = begin
        file = files[part.file]
        if file.kind in (".parquet", ".arrow"):
            yield from _rows(file, place, column)
        elif file.kind == ".txt":
            yield from _pieces(file, place)
        elif file.kind == ".jsonl" or not _is_list(file):
            yield from _lines(file, part, place)
        else:
            yield from _objects(file, place)


def _lines(file: SourceFile, part: Part, place: Place) -> Iterator[Batch]:
    """Yield blocks of whole lines."""
    stop = part.stop if file.splits else None
    items = place.items
    with damage_named(file, lambda: items), open_bytes(file) as (stream, raw):
        offset = place.offset or _first_line(stream, part.start)
        stream.seek(offset)
        while stop is None or offset < stop:
            room = BATCH_BYTES if stop is None else min(BATCH_BYTES, stop - offset)
            content = stream.read(room)
            if not content:
                break
            if not content.endswith(b"\n"):
                content += _rest_of_line(file, stream, items + content.count(b"\n") + 1)
            count = content.count(b"\n") + (not content.endswith(b"\n"))
            offset += len(content)
            first = items + 1
            items += count
            yield Batch(
                place.file, first, "lines", content, Place(place.file, items, offset), raw.tell()
            )


def _first_line(stream: BinaryIO, start: int) -> int:
    """Return the offset of the first line that begins at `start` or later."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    return start - 1 + len(stream.readline())


def _rest_of_line(file: SourceFile, stream: BinaryIO, number: int) -> bytes:
    rest = stream.readline(LINE_BYTES + 1)
    if len(rest) > LINE_BYTES:
        raise RecordError(
            Where(str(file.path), "line", number),
            f"longer than {LINE_BYTES >> 20} MiB; a {file.kind} file has one object a line.",
        )
    return rest


def _pieces(file: SourceFile, place: Place) -> Iterator[Batch]:
    """Yield pieces of whole lines. A byte order mark is dropped, and every line end is a line
    feed."""
    done = number = place.items
    pieces: list[str] = []
    lines: list[str] = []
    size = total = 0
    with damage_named(file, lambda: number), open_bytes(file) as (stream, raw):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        for _ in range(done):
            next(text, "")
        for line in _checked_lines(file, text, done):
            number += 1
            lines.append(line)
            size += len(line)
            if size >= 2 * PIECE_CHARACTERS or (size >= PIECE_CHARACTERS and not line.strip()):
                pieces.append("".join(lines))
                total += size
                lines = []
                size = 0
                if total >= BATCH_BYTES:
                    after = Place(place.file, number)
                    yield Batch(
                        place.file, done + 1, "pieces", pieces, after, raw.tell(), ends=False
                    )
                    done = number
                    pieces = []
                    total = 0
        if number or file.size:
            pieces.append("".join(lines))
            yield Batch(place.file, done + 1, "pieces", pieces, Place(place.file + 1), file.size)


def _checked_lines(file: SourceFile, text: io.TextIOWrapper, done: int) -> Iterator[str]:
    """Yield the lines of a text; DataError for those that are no text."""
    number = done
    try:
        for number, line in enumerate(iter(partial(text.readline, LINE_BYTES), ""), start=done + 1):
            if len(line) >= LINE_BYTES:
                raise RecordError(
                    Where(str(file.path), "line", number),
                    f"longer than {LINE_BYTES >> 20} MiB; break the text into lines.",
                )
            if "\0" in line:
                raise RecordError(
                    Where(str(file.path), "line", number),
                    "holds a NUL character; the file is damaged or no text.",
                )
            yield line
    except UnicodeDecodeError:
        with open_bytes(file) as (raw, _):
            for number, content in enumerate(iter(partial(raw.readline, LINE_BYTES), b""), start=1):
                decoded(Where(str(file.path), "line", number), number, content)
        raise


def decoded(where: Where, number: int, content: bytes) -> str:
    """Decode line `number`; a byte order mark on the first one is dropped. DataError that begins
    with `where` for bytes that are no UTF-8."""
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            where,
            f"not UTF-8 text: byte {error.start + 1} of the line is "
            f"0x{content[error.start]:02x}; convert the file, for example with iconv.",
        ) from None


def _is_list(file: SourceFile) -> bool:
    """Return whether a .json file holds a list; else it has one object a line."""
    with damage_named(file, lambda: 0), open_bytes(file) as (stream, _):
        while head := stream.read(4096):
            if text := head.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text.startswith(b"[")
    return False


def _objects(file: SourceFile, place: Place) -> Iterator[Batch]:
    """Yield the members of a list as JSON text, read a part at a time."""
    rows: list[str] = []
    first = place.items + 1
    number = size = 0
    with damage_named(file, lambda: number), open_bytes(file) as (stream, raw):
        for number, entry in enumerate(_members(file, stream), start=1):
            if number < first:
                continue
            rows.append(entry)
            size += len(entry)
            if size >= BATCH_BYTES:
                after = Place(place.file, number)
                yield Batch(place.file, first, "rows", rows, after, raw.tell())
                first = number + 1
                rows = []
                size = 0
        if rows:
            yield Batch(place.file, first, "rows", rows, Place(place.file + 1), file.size)


def _members(file: SourceFile, stream: BinaryIO) -> Iterator[str]:
    """Yield the text of each member of the list in `stream`."""
    decoder = json.JSONDecoder()
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    number = at = 0
    buffer = ""
    wanted = "["
    reason = "the list is not closed"
    while True:
        at += len(buffer) - at - len(buffer[at:].lstrip(" \t\r\n")) if at < len(buffer) else 0
        sign = buffer[at : at + 1]
        if wanted == "value" and sign and not (sign == "]" and number == 0):
            try:
                end = decoder.raw_decode(buffer, at)[1]
            except (ValueError, RecursionError) as error:
                reason = shown(reason_of(error).partition("; use sys.")[0])
            else:
                # a number at the end of the buffer may go on behind it
                if end < len(buffer) or sign in '{["':
                    number += 1
                    yield buffer[at:end]
                    at = end
                    wanted = ","
                    continue
        elif sign and sign in (wanted, "]"):
            at += 1
            if sign == "]":
                _refuse_more(file, buffer[at:], text)
                return
            wanted = "value"
            continue
        elif sign:
            _refuse_row(file, number + 1, f"{sign!r} in the place of '{wanted}'")
        # twice as much each time: a value that is not closed is read over and over from its start
        held = len(buffer) - at
        wished = min(max(BATCH_BYTES, held), LINE_BYTES - held)
        more = _more(file, text, number + 1, wished) if wished > 0 else ""
        if not more:
            _refuse_row(file, number + 1, reason)
        buffer = buffer[at:] + more
        at = 0


def _more(file: SourceFile, text: io.TextIOWrapper, row: int, characters: int) -> str:
    try:
        return text.read(characters)
    except UnicodeDecodeError as error:
        _refuse_row(file, row, f"not UTF-8 text: a byte 0x{error.object[error.start]:02x}")


def _refuse_more(file: SourceFile, rest: str, text: io.TextIOWrapper) -> None:
    """Raise DataError when anything but space follows the list."""
    while not rest.strip():
        if not (rest := _more(file, text, 0, BATCH_BYTES)):
            return
    raise DataError(f"{file.path}: not JSON: {shown(rest.strip(), 40)!r} follows the list.")


def _refuse_row(file: SourceFile, row: int, reason: str) -> NoReturn:
    raise RecordError(
        Where(str(file.path), "row", row),
        f"not JSON: {reason}; a .json file holds a list of objects, or one object a line.",
    )


def _rows(file: SourceFile, place: Place, column: str) -> Iterator[Batch]:
    """Yield the values of one column of a table."""
    items = place.items
    with damage_named(file, lambda: items):
        for values, share in batches_of_table(file, column, items, _TABLE_ROWS):
            first = items + 1
            items += len(values)
            after = Place(place.file, items)
            yield Batch(place.file, first, "rows", values, after, round(share * file.size))
