"""Tokenizers of Hugging Face folders, read offline, and the words of one that recall documents are made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_hypenet.data.recall import RecallVocabulary
from megatron_hypenet.errors import DataError

WORD_PIECE = re.compile(r"^[\u0120\u2581][a-z]{3,8}$")
"""A word with its leading space, as byte-level BPE (U+0120) and SentencePiece (U+2581) vocabularies spell it."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder (or of a checkpoint's tokenizer/ folder); reads local files and runs no code from them.

    Raises DataError when the folder has no tokenizer files or they cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{folder}: no tokenizer files ({', '.join(TOKENIZER_FILES)}); point to the folder of a Hugging Face model.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); its files are damaged or belong to another "
            "version of transformers: copy them again from the model's original folder"
        ) from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: no begin, end or template tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def end_of_text_id(tokenizer: Any) -> int:
    """Id that separates documents in a token stream. Raises DataError when the tokenizer names no end token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no eos_token; set it in tokenizer_config.json: documents are separated by it.")
    return int(tokenizer.eos_token_id)


def recall_vocabulary(tokenizer: Any) -> RecallVocabulary:
    """Words and markers for recall documents.

    Words are the vocabulary entries that spell a space and 3 to 8 lower-case letters and decode to just that, ordered by id.
    """
    candidates = sorted(index for piece, index in tokenizer.get_vocab().items() if WORD_PIECE.match(piece))
    spelled = tokenizer.batch_decode([[index] for index in candidates])
    words = tuple(index for index, text in zip(candidates, spelled, strict=True) if re.fullmatch(r" ?[a-z]{3,8}", text))
    return RecallVocabulary(
        words=words,
        opening=tuple(encode(tokenizer, "\n[")),
        separator=(),
        closing=tuple(encode(tokenizer, " ]\n")),
    )
