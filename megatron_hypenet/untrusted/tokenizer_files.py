"""Read the foreign files of a tokenizer: bounded, typed where transformers reads a setting, and
accepted by the tokenizers library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_hypenet.untrusted.files import FileKind, inside, reason_of, shown
from megatron_hypenet.untrusted.json_text import parse_json, typed

MODEL = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_TABLES = (
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    CONFIG,
)
_TEXTS = ("merges.txt", "vocab.txt", "chat_template.jinja")
FILES = (MODEL, "tokenizer.model", *_TABLES, *_TEXTS)
"""Files that a tokenizer may consist of; those present are kept, in both directions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _AddedToken:
    """A special token with its options."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = False


_Token = str | _AddedToken


@dataclass(frozen=True, kw_only=True, slots=True)
class _Config:
    """The keys of tokenizer_config.json and special_tokens_map.json that transformers reads; other
    keys belong to the tokenizer class."""

    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    sep_token: _Token | None = None
    pad_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    additional_special_tokens: list[_Token] | None = None
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None
    added_tokens_decoder: (
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], _AddedToken] | None
    ) = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    chat_template: str | dict[str, str] | list[dict[str, str]] | None = None
    model_input_names: list[str] | None = None
    model_max_length: int | float | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    tokenizer_class: str | None = None


_FORMS: dict[str, Any] = {
    CONFIG: _Config,
    "special_tokens_map.json": _Config,
    "vocab.json": dict[str, int],
    "added_tokens.json": dict[str, int],
}
_SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def read_tokenizer(kind: FileKind, folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files of `folder` by name, each of them checked; empty when there are
    none.

    Raise `kind`'s error, which names the file, for a file that leads out of the folder, is
    truncated, or is not a tokenizer's.
    """
    found = {name: inside(folder, name, kind) for name in FILES if os.path.lexists(folder / name)}
    contents = {name: kind.read_bytes(path) for name, path in found.items()}
    for name, content in contents.items():
        path = found[name]
        if name in _TEXTS:
            kind.decode(path, content)
        elif name in _TABLES:
            _check_table(kind, path, content)
        elif name == MODEL:
            _check_model(kind, path, content)
        elif not content:
            kind.refuse(path, "an empty file")
    return contents


def check_settings(kind: FileKind, folder: Path) -> None:
    """Raise `kind`'s error unless the small files of a tokenizer have the types that transformers
    takes for granted; for a folder whose files are about to be loaded, wherever they lie."""
    for path in (folder / name for name in _SETTINGS):
        if os.path.lexists(path):
            _check_table(kind, path, kind.read_bytes(path))


def read_table(kind: FileKind, path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`, which came from `path`."""
    value = parse_json(kind, path, kind.decode(path, content))
    if not isinstance(value, dict):
        kind.refuse(path, f"expected a JSON object at the top, got {type(value).__name__}")
    return value


def _check_table(kind: FileKind, path: Path, content: bytes) -> None:
    typed(kind, path, read_table(kind, path, content), _FORMS.get(path.name, dict[str, Any]))


def _check_model(kind: FileKind, path: Path, content: bytes) -> None:
    """Raise the error unless the tokenizers library accepts tokenizer.json."""
    if not isinstance(read_table(kind, path, content).get("model"), dict):
        kind.refuse(path, "not a tokenizer: it has no 'model'")
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(content.decode())
    except BaseException as error:  # a panic of the library derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        kind.refuse(path, f"not a tokenizer ({shown(reason_of(error))})")
