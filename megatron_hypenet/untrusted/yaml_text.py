"""Parse foreign YAML: bounded while it is parsed, without objects, and with every scalar kept as it
is written.

PyYAML scans the text; the values are built here, from its events, in one pass without recursion.
The meaning of a scalar without quotes depends on the setting that it is for (`config/meaning.py`):
`12.10` is a number for one setting and a version for another. Where the setting is not known,
`value_of` converts it by its form. Scalars that YAML 1.1 reads in an unexpected way stay text:
`1:30` is not 90, `0755` is not 493, and a date is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_hypenet.untrusted.files import FileKind, reason_of, shown

MERGE = "<<"
"""Key whose value is a mapping, or a list of mappings, that this mapping begins with; keys that are
written beside it take precedence."""

MAX_DIGITS = 100
"""Longest number that `value_of` converts, in characters; Python's conversion of integers takes
quadratic time."""

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_SWITCH = {
    form(word): meaning
    for word, meaning in {
        "true": True,
        "yes": True,
        "on": True,
        "false": False,
        "no": False,
        "off": False,
    }.items()
    for form in (str.lower, str.capitalize, str.upper)
}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_OTHER_BASE = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0b[01]+)")
_FLOAT = re.compile(
    rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+)"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = frozenset({"!", f"{_TAG}str"})
_PLAIN_TAGS = frozenset({f"{_TAG}{name}" for name in ("int", "float", "bool", "null")})


class Plain(str):
    """A scalar that was written without quotes: its text, which may mean a number, a switch, null,
    or itself."""

    __slots__ = ()


def read_yaml(kind: FileKind, path: Path) -> Any:
    """Return the YAML value in the file `path`, None for an empty file; see `parse_yaml`."""
    return parse_yaml(kind, path, kind.read_text(path))


def parse_yaml(kind: FileKind, path: Path | str, text: str) -> Any:
    """Return the YAML value in `text`, which came from `path`: dicts with text as keys, lists,
    text, and `Plain` for unquoted scalars.

    Aliases and merge keys are resolved; one object may then occur in several places, so copy it
    before changing it. Raises `kind`'s error for anything but one document of plain YAML, a key
    written twice, an alias inside its own anchor, other tags than YAML's scalars, lists and
    mappings, text that UTF-8 cannot hold, and beyond the kind's limits, where aliases count as the
    value that they refer to.
    """
    return _Builder(kind, path).build(text)


def value_of(value: Any) -> Any:
    """Return `value` with every `Plain` in it converted by its form: to None, a bool, an int, a
    float, or text."""
    if isinstance(value, dict):
        return {key: value_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [value_of(inner) for inner in value]
    return _scalar(value) if isinstance(value, Plain) else value


def _scalar(plain: Plain) -> None | bool | int | float | str:
    text = str(plain)
    if text in _NULL:
        return None
    if text in _SWITCH:
        return _SWITCH[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _NOT_FINITE.fullmatch(text) else text


@dataclass(slots=True)
class _Built:
    """A finished value, with the number of values in it and the levels of nesting below it, aliases
    counted in full."""

    value: Any
    size: int = 1
    height: int = 0


@dataclass(slots=True)
class _Open(_Built):
    """A list or mapping whose end has not been reached."""

    anchor: str | None = None
    key: str | None = None
    """Key of a mapping whose value comes next."""
    merged: list[dict[str, Any]] | None = None
    """Mappings under a merge key, strongest first; None where there is no merge key."""
    keys: set[str] = field(default_factory=set)


class _Builder:
    def __init__(self, kind: FileKind, path: Path | str) -> None:
        self.kind = kind
        self.path = path
        self.line = 0
        self.total = 0
        self.anchors: dict[str, _Built] = {}
        self.open: list[_Open] = []
        self.result: Any = None

    def build(self, text: str) -> Any:
        documents = 0
        for event in self._events(text):
            self.line = event.start_mark.line if event.start_mark else self.line
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._refuse("a second document; one is allowed")
            elif isinstance(event, yaml.ScalarEvent):
                self._take(self._leaf(event), event.anchor)
            elif isinstance(event, yaml.AliasEvent):
                self._take(self._aliased(event.anchor), None)
            elif isinstance(event, yaml.CollectionStartEvent):
                self._begin(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end()
        return self.result

    def _events(self, text: str) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.line = mark.line if mark else self.line
            self._refuse(
                f"{error.problem or error.context}, column {mark.column + 1 if mark else 1}"
            )
        # ValueError: an escape beyond the last character
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self._refuse(shown(reason_of(error)))

    def _leaf(self, event: yaml.ScalarEvent) -> _Built:
        text = event.value
        tag = event.tag
        if tag is not None and tag not in _TEXT_TAGS | _PLAIN_TAGS:
            self._refuse(f"the tag {_short(tag)}; only plain values are allowed")
        broken = next(
            (
                character
                for character in text
                if character == "\0" or "\ud800" <= character <= "\udfff"
            ),
            None,
        )
        if broken is not None:
            self._refuse(f"a text with {ascii(broken)}, which no file name and no message can hold")
        plain = tag in _PLAIN_TAGS or (tag is None and event.implicit[0])
        return _Built(Plain(text) if plain else text)

    def _aliased(self, anchor: str | None) -> _Built:
        if anchor is None or anchor not in self.anchors:
            self._refuse(
                f"the alias *{shown(anchor, 40)} stands for an anchor that is not defined before it"
            )
        built = self.anchors[anchor]
        if isinstance(built, _Open):
            self._refuse(f"the alias *{shown(anchor, 40)} stands inside its own anchor")
        return built

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{_TAG}{'map' if mapping else 'seq'}"):
            self._refuse(f"the tag {_short(event.tag)}; only plain values are allowed")
        if self.open and isinstance(self.open[-1].value, dict) and self.open[-1].key is None:
            self._refuse("a list or a mapping as a key; keys are text")
        started = _Open({} if mapping else [], anchor=event.anchor)
        self._name(event.anchor, started)
        self.open.append(started)
        self._bound(1, len(self.open))

    def _end(self) -> None:
        ended = self.open.pop()
        value = ended.value
        if ended.merged is not None:
            value = {}
            for source in reversed(ended.merged):
                value |= source
            value |= ended.value
        built = _Built(value, ended.size, ended.height)
        if ended.anchor is not None:
            self.anchors[ended.anchor] = built
        self._place(built)

    def _take(self, built: _Built, anchor: str | None) -> None:
        """Place a scalar, or the value of an alias."""
        self._name(anchor, built)
        self._bound(built.size, len(self.open) + built.height)
        self._place(built)

    def _place(self, built: _Built) -> None:
        """Put a finished value into its container; `total` already has its size."""
        if not self.open:
            self.result = built.value
            return
        into = self.open[-1]
        into.size += built.size
        into.height = max(into.height, built.height + 1)
        if isinstance(into.value, list):
            into.value.append(built.value)
        elif into.key is None:
            into.key = self._key(into, built.value)
        elif into.key == MERGE and into.merged == []:
            into.merged += self._sources(built.value)
            into.key = None
        else:
            into.value[into.key] = built.value
            into.key = None

    def _key(self, into: _Open, value: Any) -> str:
        if not isinstance(value, str):
            self._refuse("a list or a mapping as a key; keys are text")
        key = str(value)
        merge = key == MERGE and isinstance(value, Plain)
        if (into.merged is not None) if merge else (key in into.keys):
            self._refuse(f"the key {shown(repr(key), 60)} is written twice")
        if merge:
            into.merged = []
        else:
            into.keys.add(key)
        return key

    def _sources(self, value: Any) -> list[dict[str, Any]]:
        sources = value if isinstance(value, list) else [value]
        if not sources or not all(isinstance(source, dict) for source in sources):
            self._refuse(
                f"the merge key {MERGE} takes a mapping or a list of mappings, such as *name"
            )
        return sources

    def _name(self, anchor: str | None, built: _Built) -> None:
        if anchor is None:
            return
        if anchor in self.anchors:
            self._refuse(f"the anchor &{shown(anchor, 40)} is defined twice")
        self.anchors[anchor] = built

    def _bound(self, size: int, depth: int) -> None:
        self.total += size
        if self.total > self.kind.max_values:
            self.kind.refuse(
                self.path,
                f"line {self.line + 1}: holds more than {self.kind.max_values:,} values, "
                "aliases counted in full",
            )
        if depth > self.kind.max_depth:
            self.kind.refuse(
                self.path,
                f"line {self.line + 1}: nested more than {self.kind.max_depth} levels deep",
            )

    def _refuse(self, what: str) -> NoReturn:
        self.kind.refuse(self.path, f"not valid YAML (line {self.line + 1}: {what})")


def _short(tag: str) -> str:
    return shown(tag.replace(_TAG, "!!"), 60)
