"""The tokenizer's files of a model folder: checked when they are imported, exported so that
transformers 4.57 and 5.x read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import temporary_folder
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.untrusted.files import MIB, FileKind, has_entry, shown
from megatron_hypenet.untrusted.tokenizer_files import (
    CONFIG,
    FILES,
    MODEL,
    read_table,
    read_tokenizer,
)

# Gemma's tokenizer.json, one of the largest, has 35 MB and about 2.5 million values
_KIND = FileKind(
    error=ConversionError,
    advice="fetch the tokenizer's files again",
    max_bytes=128 * MIB,
    max_values=10_000_000,
)


def read(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files of a model folder by name; ConversionError as `read_tokenizer`
    describes."""
    return read_tokenizer(_KIND, folder)


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
            old = read_table(_KIND, source / name, content)
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
