"""Read the scalars of a configuration by the type of their setting, not by how they look.

`12.10` is the number 12.1 for a learning rate and the text 12.10 for an environment variable; `yes`
is true for a switch and a name for an account. A value that does not fit its setting stays as it
was written (`Plain`), and pydantic refuses it: no type takes text for something else. Words of the
command line (KEY=VALUE) follow the same rules, without YAML's syntax: `#`, `: ` or `*` in a path
are letters.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel

from megatron_hypenet.errors import ConfigError
from megatron_hypenet.untrusted.files import FileKind, shown
from megatron_hypenet.untrusted.yaml_text import Plain, parse_yaml, value_of

YAML = FileKind(
    error=ConfigError,
    advice="see docs/config.md for how settings are written",
    max_bytes=2 << 20,
    max_values=100_000,
)
"""Limits and error class for a configuration, and for a value on the command line."""

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'', re.DOTALL)


def as_meant(value: Any, annotation: Any) -> Any:
    """Return `value`, as `parse_yaml` built it, with its scalars read as the type `annotation`; the
    containers are copies."""
    if isinstance(value, dict):
        return {key: as_meant(inner, member(annotation, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_meant(inner, item(annotation, index)) for index, inner in enumerate(value)]
    if isinstance(value, Plain):
        return _plain(value, scalar_kinds(annotation))
    if isinstance(value, str) and scalar_kinds(annotation) - {"null"} == {"float"}:
        number = value_of(Plain(value))  # "3e-4" in quotes
        return number if type(number) in (int, float) else value
    return value


def from_word(text: str, annotation: Any, where: str = "the value") -> Any:
    """Return the VALUE of a word KEY=VALUE for a setting of type `annotation`, as `parse_yaml`
    would have built it.

    `where` names the setting in errors. Raises ValueError that says how to write it where it can be
    read in two ways, ConfigError where it is a broken list or mapping.
    """
    kinds = scalar_kinds(annotation)
    bare = text.strip()
    if not bare:
        raise ValueError(
            "the value is empty; write null for none"
            + (", '\"\"' for an empty text" if "text" in kinds else "")
        )
    if text.startswith("="):
        raise ValueError("two equals signs; write key=value")
    if not text.isprintable():
        raise ValueError(
            f"the value {shown(repr(text), 60)} holds a character that cannot be printed, "
            "such as a line break"
        )
    # a path may begin with a brace, but hardly end with one too
    settings = holds_settings(annotation) and (
        "path" not in kinds or (bare.startswith("{") and bare.endswith("}"))
    )
    if settings or (holds_items(annotation) and bare.startswith("[") and bare.endswith("]")):
        if re.search(r"\s#", _QUOTED.sub("", text)):
            raise ValueError(
                "YAML takes what follows ' #' for a comment; put the text that holds it in quotes"
            )
        return parse_yaml(YAML, where, text)
    if _QUOTED.fullmatch(bare):
        if "path" in kinds:
            raise ValueError(f"the path {bare} would have quotes in its name; leave them out")
        return parse_yaml(YAML, where, bare)
    if "text" in kinds and bare != text:
        raise ValueError(f"the value {text!r} begins or ends with a space; leave it out")
    if "path" in kinds and bare == "~":
        return bare  # the home folder; YAML's ~ is nothing
    return Plain(bare)


def member(annotation: Any, key: str) -> Any:
    """Return the type of the setting `key` of a section or mapping; Any where there is none."""
    for part in _alternatives(annotation):
        if _is_section(part):
            return part.model_fields[key].annotation if key in part.model_fields else Any
        if typing.get_origin(part) is dict:
            return typing.get_args(part)[1]
    return Any


def item(annotation: Any, index: int) -> Any:
    """Return the type of an entry of a list; Any where there is none."""
    for part in _alternatives(annotation):
        if typing.get_origin(part) in (tuple, list):
            entries = typing.get_args(part)
            if len(entries) == 2 and entries[1] is Ellipsis:
                return entries[0]
            return entries[index] if index < len(entries) else Any
    return Any


def holds_settings(annotation: Any) -> bool:
    """Return whether the type is a section or a mapping."""
    return any(
        _is_section(part) or typing.get_origin(part) is dict for part in _alternatives(annotation)
    )


def holds_items(annotation: Any) -> bool:
    """Return whether the type is a list."""
    return any(typing.get_origin(part) in (tuple, list) for part in _alternatives(annotation))


def scalar_kinds(annotation: Any) -> frozenset[str]:
    """Return the kinds of scalars that a type accepts: null, bool, int, float, text and path (which
    is text too); all but path for Any."""
    kinds: set[str] = set()
    for part in _alternatives(annotation):
        if typing.get_origin(part) is typing.Literal:
            kinds.update(
                kind for choice in typing.get_args(part) for kind in scalar_kinds(type(choice))
            )
        elif part is Any:
            kinds.update(("null", "bool", "int", "float", "text"))
        elif part in _KINDS:
            kinds.update(_KINDS[part])
    return frozenset(kinds)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


_KINDS: dict[Any, tuple[str, ...]] = {
    type(None): ("null",),
    bool: ("bool",),
    int: ("int",),
    float: ("float",),
    str: ("text",),
    Path: ("text", "path"),
}


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types that a type consists of: `Annotated[X | None, ...]` has X and None."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _alternatives(part)
    else:
        yield type(None) if annotation is None else annotation


def _plain(plain: Plain, kinds: frozenset[str]) -> Any:
    looks = value_of(plain)
    if looks is None:
        return None
    fits = {bool: ("bool",), int: ("int", "float"), float: ("float",), str: ()}[type(looks)]
    if kinds.intersection(fits):
        return looks
    return str(plain) if "text" in kinds else plain


def hint(plain: str, *, wanted: str) -> str:
    """Return advice on a scalar that does not fit where `wanted`, an "integer" or a "number", is
    expected. It begins with a semicolon, and is empty where there is no advice.
    """
    if re.fullmatch(r"[-+]?\d+(:[0-5]?\d)+(\.\d*)?", plain):
        return "; YAML 1.1 reads such times as numbers to the base 60: write the number itself"
    if re.fullmatch(r"[-+]?0\d[\d_]*", plain):
        return "; YAML 1.1 reads a leading zero as octal: leave it out"
    looks = value_of(Plain(plain))
    if (
        wanted == "integer"
        and isinstance(looks, float)
        and looks.is_integer()
        and abs(looks) < 2**53
    ):
        return f"; write {int(looks)} if that is meant"
    return ""
