"""Turn pydantic's findings into lines that a user can act on: origin, key, what is wrong, and the
nearest known key."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_hypenet.config.meaning import hint
from megatron_hypenet.config.schema import SOURCE_TAG, RunConfig, SourceConfig
from megatron_hypenet.untrusted.files import shown
from megatron_hypenet.untrusted.yaml_text import Plain, value_of

Origins = dict[tuple[str, ...], str]
"""Where each key was last set: path of keys -> file name or "CLI"."""
_TAGS = (SOURCE_TAG, "path")
"""Parts of a place that say which form of a source was meant."""
_LONGEST = 2000
"""Largest number of characters in the message of one rule."""


def describe(
    error: ValidationError,
    origins: Origins,
    *,
    default_origin: str,
    root: type[BaseModel] = RunConfig,
) -> list[str]:
    """Return one line per finding, e.g. `run.yaml: align.lr: should be greater than 0, got int -1`,
    for a configuration of class `root`."""
    lines = []
    for item in error.errors():
        if item["type"] == "too_short" and item.get("input"):
            continue  # a list whose entries are wrong, each of which is reported
        place = tuple(str(part) for part in item["loc"])
        origin = _origin(place, origins, default_origin)
        key = shown(".".join(_named(place)), 200) or "configuration"
        lines.append(
            f"{origin}: {key}: {_what(item['type'], item['msg'], item.get('input'), place, root)}"
        )
    return list(dict.fromkeys(lines))


def _origin(place: tuple[str, ...], origins: Origins, default: str) -> str:
    """Return the file or CLI that set the key, or the nearest section above it."""
    for length in range(len(place), 0, -1):
        if place[:length] in origins:
            return origins[place[:length]]
    return default


def _named(place: tuple[str, ...]) -> list[str]:
    """Return the place without the part that says which form of a source was meant."""
    tags = [index for index, part in enumerate(place) if index > 1 and part in _TAGS]
    return [part for index, part in enumerate(place) if index not in tags[:1]]


def _what(
    kind: str, message: str, value: Any, place: tuple[str, ...], root: type[BaseModel]
) -> str:
    if kind == "extra_forbidden":
        return f"unknown key{_near_miss(place, root)}"
    if kind == "missing":
        return f"missing; set it in the file or as {shown('.'.join(_named(place)), 200)}=..."
    if kind == "value_error":
        return _bounded(message.removeprefix("Value error, "))
    text = (message[:1].lower() + message[1:]).removeprefix("input ")
    if kind == "path_type":
        text = "should be a path"
    if value is None:
        return f"{text}, got null"
    if isinstance(value, Plain):
        integer = "integer" if kind.startswith("int") or kind == "literal_error" else "number"
        looks = type(value_of(value)).__name__
        written = shown(repr(str(value)) if looks == "str" else value, 60)
        return f"{text}, got {looks} {written}{hint(value, wanted=integer)}"
    return f"{text}, got {type(value).__name__} {shown(repr(value), 100)}"


def _bounded(message: str) -> str:
    """Return the message of a rule, shortened: it may repeat a value of any length."""
    return (
        message
        if len(message) <= _LONGEST
        else f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    )


def _near_miss(place: tuple[str, ...], root: type[BaseModel]) -> str:
    known = section_keys(place[:-1], root)
    near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    elsewhere = [".".join(path) for path in _all_keys(root) if path[-1] == place[-1]]
    if elsewhere:
        return f"; it exists as {', '.join(elsewhere[:3])}"
    return f"; keys here are {', '.join(known)}" if known else ""


def section_keys(place: tuple[str, ...], root: type[BaseModel] = RunConfig) -> list[str]:
    """Return the keys of the section at `place` under `root`, empty when there is no such
    section."""
    section: type[BaseModel] | None = root
    if place[-1:] == (SOURCE_TAG,):
        return list(SourceConfig.model_fields)
    for part in place:
        field = section.model_fields.get(part) if section else None
        section = section_type(field.annotation) if field else None
    return list(section.model_fields) if section else []


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section class behind an annotation, looking through `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [section_type(part) for part in typing.get_args(annotation)]
        return next((part for part in found if part is not None), None)
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _all_keys(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append((*prefix, name))
        below = section_type(field.annotation)
        if below is not None:
            keys += _all_keys(below, (*prefix, name))
    return keys
