"""Tokenizers of Hugging Face folders, read offline, and the words of a tokenizer from which recall
documents are made."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.data.recall import RecallVocabulary
from megatron_hypenet.errors import DataError, HypenetError
from megatron_hypenet.untrusted.files import FileKind, has_entry, reason_of, shown
from megatron_hypenet.untrusted.json_text import read_object
from megatron_hypenet.untrusted.tokenizer_files import check_settings

WORD_PIECE = re.compile(r"^[\u0120\u2581][a-z]{3,8}$")
"""A word with its leading space, as byte-level BPE (U+0120) and SentencePiece (U+2581) vocabularies
spell it."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_MODEL_FILES = FileKind(error=DataError, advice="fetch the folder again")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder (or of a checkpoint's tokenizer/ folder); reads
    local files and runs no code from them.

    Raises DataError when the folder has no tokenizer files or they cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"{folder}: no tokenizer files ({', '.join(TOKENIZER_FILES)}); point to the folder of "
            f"a Hugging Face model{download_hint(folder)}"
        )
    check_settings(_MODEL_FILES, folder)
    if has_entry(folder / "config.json"):
        read_object(_MODEL_FILES, folder / "config.json")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    # it reads config.json too, and warns about a model that it does not know
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    # whatever it does not expect in a file ends in some exception; a panic of the tokenizers
    # library derives from BaseException
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | HypenetError):
            raise
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded "
            f"({type(error).__name__}: {shown(reason_of(error))}); its files are damaged or belong "
            "to another version of transformers: copy them again from the model's original folder"
        ) from error
    finally:
        logging.set_verbosity(level)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text`, without begin, end or template tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True, slots=True)
class EndOfText:
    """The token that closes every document."""

    id: int
    note: str = ""
    """What to tell the user where model and tokenizer name different tokens; else empty."""


def end_of_text(tokenizer: Any, model_end: int | Sequence[int] | None) -> EndOfText:
    """Return the token that closes documents: the one that the model's configuration names, else
    the tokenizer's.

    The model's token takes precedence because the model was trained with it; tokenizers of base
    models often name a chat token. `model_end` may be a list, as in config.json: then the
    tokenizer's token counts if the list has it, else the first entry. Raises DataError when neither
    names a token, or the tokenizer lacks the model's.
    """
    given = tokenizer.eos_token_id
    known = (
        [] if model_end is None else [model_end] if isinstance(model_end, int) else list(model_end)
    )
    if not known:
        if given is None:
            raise DataError(
                "the tokenizer names no eos_token; set it in tokenizer_config.json: "
                "documents are separated by it."
            )
        return EndOfText(int(given))
    if given in known:
        return EndOfText(int(given))
    if not 0 <= known[0] < len(tokenizer):
        raise DataError(
            f"the model's configuration names the end token eos_token_id={known[0]}, "
            f"but the tokenizer has {len(tokenizer)} tokens; "
            "they do not belong together: take the tokenizer from the model's original folder"
        )
    theirs = (
        "none" if given is None else f"{tokenizer.convert_ids_to_tokens(int(given))} ({int(given)})"
    )
    ours = f"{tokenizer.convert_ids_to_tokens(known[0])} ({known[0]})"
    return EndOfText(
        known[0],
        f"documents end with {ours}, the end token in the model's configuration; "
        f"the tokenizer names {theirs} as its eos_token",
    )


def model_end_of(folder: Path) -> list[int] | None:
    """Return eos_token_id of the model that the tokenizer folder `folder` belongs to; None where no
    file names one. Looks into config.json and generation_config.json beside the tokenizer, and for
    a checkpoint's tokenizer/ into its model.json. Raises DataError when such a file is damaged.
    """
    for path, settings in _model_files(folder):
        end = settings.get("eos_token_id")
        entries = end if isinstance(end, list) else [end]
        if not all(type(entry) is int for entry in entries if entry is not None):
            raise DataError(f"{path}: eos_token_id is {end!r}; expected a token id")
        if found := [int(entry) for entry in entries if entry is not None]:
            return found
    return None


def model_vocabulary(folder: Path) -> int | None:
    """Return vocab_size of the model that the tokenizer folder `folder` belongs to, found as in
    `model_end_of`; None where no file has it."""
    sizes = (settings.get("vocab_size") for _, settings in _model_files(folder))
    return next((size for size in sizes if type(size) is int and size > 0), None)


def _model_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the model's configuration files beside a tokenizer, with their content."""
    beside = [folder / "config.json", folder / "generation_config.json"]
    for path in [*beside, *([folder.parent / "model.json"] if folder.name == "tokenizer" else [])]:
        if has_entry(path):
            yield path, read_object(_MODEL_FILES, path)


def recall_vocabulary(tokenizer: Any) -> RecallVocabulary:
    """Return words and markers for recall documents.

    Words are the vocabulary entries that spell a space and 3 to 8 lower-case letters and decode to
    just that, ordered by id.
    """
    candidates = sorted(
        index for piece, index in tokenizer.get_vocab().items() if WORD_PIECE.match(piece)
    )
    spelled = tokenizer.batch_decode([[index] for index in candidates])
    words = tuple(
        index
        for index, text in zip(candidates, spelled, strict=True)
        if re.fullmatch(r" ?[a-z]{3,8}", text)
    )
    return RecallVocabulary(
        words=words,
        opening=tuple(encode(tokenizer, "\n[")),
        separator=(),
        closing=tuple(encode(tokenizer, " ]\n")),
    )
