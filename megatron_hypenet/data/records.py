"""Records of a file of text: the value of the field that holds a document, checked.

A document is a text, or a conversation: a list of messages with `role` and `content`. Every defect
is a DataError that names file and line, or row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from megatron_hypenet.data.places import RecordError, Where
from megatron_hypenet.data.readers import Batch, decoded
from megatron_hypenet.untrusted.files import reason_of, shown

_SURROGATE = re.compile("[\ud800-\udfff]")

Document = tuple[Where, Any]
"""(file and line or row, text or list of messages)."""


def documents_of(
    batch: Batch, file: str, key: str, *, chat: bool, on_empty: Callable[[int], None]
) -> Iterator[Document]:
    """Yield the documents of a batch of `file` under `key`; with `chat` they are conversations.

    `on_empty` is called with the number of each line or row whose text or conversation is empty;
    it gives no document. Pieces of a .txt file are all given, empty ones too.
    """
    if batch.form == "pieces":
        for piece in batch.content:
            yield Where(file, "line", batch.first), piece
        return
    for number, where, value in _values(batch, file, key):
        checked = _conversation(value, where, key) if chat else _text(value, where, key)
        if checked:
            yield where, checked
        else:
            on_empty(number)


def _values(batch: Batch, file: str, key: str) -> Iterator[tuple[int, Where, Any]]:
    """Yield (number, file and line or row, value under `key`) of each record."""
    if batch.form == "lines":
        # the last line has no end, or gives an empty one here
        lines = batch.content.split(b"\n")
        for number, content in enumerate(lines, start=batch.first):
            where = Where(file, "line", number)
            line = decoded(where, number, content)
            if line.strip():
                yield number, where, _member(line, where, key)
        return
    for number, value in enumerate(batch.content, start=batch.first):
        where = Where(file, "row", number)
        # members of a list come as JSON text, values of a table as they are
        is_table = file.endswith((".parquet", ".arrow"))
        yield number, where, value if is_table else _member(value, where, key)


def _member(line: str, where: Where, key: str) -> Any:
    """Return the value under `key` of the JSON object in `line`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(name == key for name, _ in pairs) > 1:
            raise ValueError(f"the key '{key}' is written twice")
        return found

    try:
        record = json.loads(line, object_pairs_hook=once)
    # ValueError also covers a number of thousands of digits
    except (ValueError, RecursionError) as error:
        # Python tells programmers how to lift its limit of digits
        reason = shown(reason_of(error).partition("; use sys.")[0])
        raise RecordError(
            where, f"not JSON: {reason}; a .jsonl file has one object a line."
        ) from None
    if not isinstance(record, dict) or key not in record:
        known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise RecordError(
            where, f"no text under '{key}' (found: {shown(known)}); name the field that holds it."
        )
    return record[key]


def _text(value: Any, where: Where, key: str) -> str:
    if not isinstance(value, str):
        raise RecordError(
            where, f"{type(value).__name__}, not text, under '{key}'; name the field that holds it."
        )
    _refuse_surrogates(value, where)
    return value


def _refuse_surrogates(text: str, where: Where) -> None:
    if (half := _SURROGATE.search(text)) is not None:
        raise RecordError(
            where,
            f"the text holds \\u{ord(half.group()):04x}, half of a surrogate pair and no "
            f"character (at character {half.start()}); "
            "the text was cut inside a character such as an emoji: correct or remove the line.",
        )


def _conversation(value: Any, where: Where, key: str) -> list[dict[str, Any]]:
    """Return a list of messages; keys without a value, as tables fill them in, are dropped."""
    if not isinstance(value, list):
        raise RecordError(
            where,
            f"{type(value).__name__}, not a list of messages, under '{key}'; name the "
            "field that holds the conversation.",
        )
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(
                where,
                f"message {number} under '{key}' has no role; a message is an object with "
                "role and content",
            )
        content = message.get("content")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise RecordError(
                where,
                f"message {number} under '{key}' has "
                f"{'no content' if content is None else f'a content of {type(content).__name__}'}; "
                "give it as text",
            )
        _refuse_surrogates(content or "", where)
        messages.append({name: entry for name, entry in message.items() if entry is not None})
    return messages
