"""Parse foreign JSON: bounded before it is parsed, strict where JSON is ambiguous, and typed by
pydantic.

Python's parser accepts NaN, Infinity, numbers that overflow to infinity, keys written twice and
escapes of half a surrogate pair. None of these is intended in a valid file, so each is refused
here.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_hypenet.untrusted.files import FileKind, findings, reason_of, shown

T = TypeVar("T")

_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")
# whole strings, so that brackets inside of them do not count; an unfinished string at the end
# matches too
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def read_json(kind: FileKind, path: Path) -> Any:
    """Return the JSON value in the file `path`; raise `kind`'s error when it is not JSON or beyond
    the kind's limits."""
    return parse_json(kind, path, kind.read_text(path))


def read_object(kind: FileKind, path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`, as `read_json` does; another value at the top is
    refused."""
    value = read_json(kind, path)
    if not isinstance(value, dict):
        kind.refuse(path, f"expected an object at the top, got {shown(type(value).__name__)}")
    return value


def read_typed(kind: FileKind, path: Path, form: type[T]) -> T:
    """Return the JSON value in the file `path` as a `form`, which is any type that pydantic knows
    (dataclasses among them).

    Types are strict: a number is not accepted as text, nor 3.0 as an integer. The error names every
    entry that does not fit, up to three. Entries that a dataclass does not have are ignored unless
    it says `__pydantic_config__ = ConfigDict(extra="forbid")`.
    """
    return typed(kind, path, read_json(kind, path), form)


def typed(kind: FileKind, path: Path | str, value: Any, form: type[T]) -> T:
    """Return the parsed JSON `value`, which came from `path`, as a `form`; see `read_typed`."""
    adapter: TypeAdapter[T] = _adapter(form)  # type: ignore[arg-type]  # mypy takes a type variable for unhashable
    try:
        # through JSON text: pydantic's strict mode accepts a list for a tuple from JSON only
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        lines = findings(error, whole="the top")
        kind.refuse(
            path, "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
        )


def parse_json(kind: FileKind, path: Path | str, text: str) -> Any:
    """Return the JSON value in `text`, which came from `path`; raise `kind`'s error when it is not
    JSON or beyond the kind's limits."""
    if (
        text.count(",") + text.count("[") + text.count("{") + text.count(":") > kind.max_values
        and _values(text) > kind.max_values
    ):
        kind.refuse(path, f"holds more than {kind.max_values:,} values")
    if _depth(text, kind.max_depth) > kind.max_depth:
        kind.refuse(path, f"nested more than {kind.max_depth} levels deep")
    parse_int = functools.partial(_integer, max_digits=kind.max_digits)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=parse_int,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        kind.refuse(path, f"not valid JSON ({shown(reason_of(error))})")
    if _SURROGATE.search(text) and (broken := next(_unencodable(value), None)) is not None:
        kind.refuse(
            path,
            "holds text with half a surrogate pair, which is no character: "
            f"{shown(ascii(broken), 60)}",
        )
    return value


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def _values(text: str) -> int:
    """Return the number of separators and brackets outside of strings: an upper bound of the
    values."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"?', "", text, flags=re.DOTALL)
    return sum(bare.count(mark) for mark in ",[{:")


def _depth(text: str, limit: int) -> int:
    """Return the nesting of brackets outside of strings; counting ends one above `limit`."""
    if text.count("[") + text.count("{") <= limit:
        return 0
    depth = deepest = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        mark = match.group()
        if mark in ("[", "{"):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limit:
                break
        elif mark in ("]", "}"):
            depth -= 1
    return deepest


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {shown(ascii(name), 60)} is written twice")
        found[name] = value
    return found


def _integer(text: str, *, max_digits: int) -> int:
    if len(text) > max_digits:
        raise ValueError(f"a number of {len(text)} digits, the limit is {max_digits}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text, 40)} is beyond what a float holds")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _unencodable(value: Any) -> Iterator[str]:
    """Yield every text in `value`, keys included, that UTF-8 cannot hold."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                yield item
