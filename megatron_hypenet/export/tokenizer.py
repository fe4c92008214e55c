"""The tokenizer's files of a model folder: checked when they are imported, exported so that
transformers 4.57 and 5.x read them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import MIB, FileKind, has_entry, inside, reason_of, shown
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

# Gemma's tokenizer.json, one of the largest, has 35 MB and about 2.5 million values
_KIND = FileKind(
    error=ConversionError,
    advice="fetch the tokenizer's files again",
    max_bytes=128 * MIB,
    max_values=10_000_000,
)


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


def read(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files of `folder` by name, each of them checked; empty when there are
    none.

    Raise ConversionError, which names the file, for a file that leads out of the folder, is
    truncated, or is not a tokenizer's.
    """
    found = {name: inside(folder, name, _KIND) for name in FILES if os.path.lexists(folder / name)}
    contents = {name: _KIND.read_bytes(path) for name, path in found.items()}
    for name, content in contents.items():
        path = found[name]
        if name in _TEXTS:
            _KIND.decode(path, content)
        elif name in _TABLES:
            typed(_KIND, path, _table(path, content), _FORMS.get(name, dict[str, Any]))
        elif name == MODEL:
            _check_model(path, content)
        elif not content:
            _KIND.refuse(path, "an empty file")
    return contents


@contextmanager
def in_a_folder(files: Mapping[str, bytes]) -> Iterator[Path | None]:
    """Yield a folder with these files that exists as long as the block runs; None when there are
    none."""
    if not files:
        yield None
        return
    with temporary_folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield folder


def export(source: Path, target: Path, say: Callable[[str], None] | None = None) -> None:
    """Copy the tokenizer's files of a checkpoint from `source` to `target`, in the spelling that
    transformers 4.57 and 5.x both read.

    `say` is called with a line when one of them cannot read it. Raises ConversionError for a
    damaged file.
    """
    for name in (name for name in FILES if has_entry(source / name)):
        content = _KIND.read_bytes(source / name)
        if name in (CONFIG, "special_tokens_map.json"):
            old = _table(source / name, content)
            new = (
                _for_both(old, (source / MODEL).is_file())
                if name == CONFIG
                else _with_older_tokens(old)
            )
            if new != old:
                content = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
            if (kind := str(new.get("tokenizer_class"))).endswith("Backend") and say is not None:
                say(
                    f"{name}: this tokenizer needs transformers 5; transformers 4.57 has no "
                    f"{shown(kind, 80)}"
                )
        (target / name).write_bytes(content)


def _for_both(config: dict[str, Any], has_model: bool) -> dict[str, Any]:
    """Return the tokenizer_config.json in transformers 4's spelling, which 5.x reads too."""
    config = _with_older_tokens(config)
    if has_model and config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # the older class would also make token_type_ids, which the model does not accept
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return config


def _with_older_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with a list of extra_special_tokens under its older name; there 4.57
    takes named tokens only."""
    extra = config.get("extra_special_tokens")
    older = config.get("additional_special_tokens") or []
    if not isinstance(extra, list) or not isinstance(older, list):
        return dict(config)
    tokens = older + [token for token in extra if token not in older]
    config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
    return {**config, "additional_special_tokens": tokens} if tokens else config


def _table(path: Path, content: bytes) -> dict[str, Any]:
    value = parse_json(_KIND, path, _KIND.decode(path, content))
    if not isinstance(value, dict):
        _KIND.refuse(path, f"expected a JSON object at the top, got {type(value).__name__}")
    return value


def _check_model(path: Path, content: bytes) -> None:
    """Raise ConversionError unless the tokenizers library accepts tokenizer.json."""
    if not isinstance(_table(path, content).get("model"), dict):
        _KIND.refuse(path, "not a tokenizer: it has no 'model'")
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(content.decode())
    except BaseException as error:  # a panic of the library derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        _KIND.refuse(path, f"not a tokenizer ({shown(reason_of(error))})")
