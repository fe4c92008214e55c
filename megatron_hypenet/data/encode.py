"""Batches of documents to arrays of token ids: what one worker of a preparation does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hypenet.data.chat import ChatEncoder
from megatron_hypenet.data.places import Fields
from megatron_hypenet.data.readers import Batch
from megatron_hypenet.data.records import documents_of
from megatron_hypenet.data.token_writer import id_type
from megatron_hypenet.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of a batch as ids."""

    ids: npt.NDArray[np.integer]
    """[tokens], in the type in which they are stored."""
    lengths: npt.NDArray[np.int32]
    """Ids of each document."""
    mask: npt.NDArray[np.uint8] | None
    """[tokens], 1 where an id is to be predicted; None for text."""
    empty: tuple[int, ...]
    """Lines or rows without a text."""


def token_lists(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without begin, end or template tokens.

    A fast tokenizer is asked directly: its wrapper in transformers gives the same ids and spends a
    quarter of the time on things that are not needed here.
    """
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    found: list[list[int]] = encoded["input_ids"]
    return found


class Encoder:
    """Turns batches into ids with one tokenizer; documents end with the id `end`."""

    def __init__(self, tokenizer: Any, fields: Fields, *, end: int, vocab_size: int) -> None:
        """`vocab_size` is the model's. Raises DataError as ChatEncoder does."""
        self.fields = fields
        self.end = end
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._chat = ChatEncoder(tokenizer) if fields.chat else None

    def encode(self, batch: Batch, file: str) -> Encoded:
        """Return the documents of a batch of `file`. Raises DataError that names the line or
        row."""
        empty: list[int] = []
        documents = list(
            documents_of(batch, file, self.fields.key, chat=self.fields.chat, on_empty=empty.append)
        )
        pieces = batch.form == "pieces"
        if self._chat is not None and pieces:
            raise DataError(
                f"{file}: a .txt file holds no conversations; give .jsonl, .json or a table"
            )
        masks: list[npt.NDArray[np.uint8]] = []
        if self._chat is None:
            lists = token_lists(self._tokenizer, [text for _, text in documents])
        else:
            lists = []
            for where, messages in documents:
                conversation, mask = self._chat.encode(messages, where)
                lists.append(conversation.tolist())
                masks += [mask, np.zeros(1, np.uint8)]  # what closes a document is no answer
        # of a .txt file only the last piece ends a document
        for ids in lists if not pieces else lists[-1:] if batch.ends else ():
            ids.append(self.end)
        lists = [ids for ids in lists if ids]
        lengths = np.array([len(ids) for ids in lists], dtype=np.int32)
        flat = np.fromiter(chain.from_iterable(lists), np.int64, count=int(lengths.sum()))
        if len(flat) and int(flat.max()) >= self.vocab_size:
            raise DataError(
                f"{file}: the tokenizer makes id {int(flat.max())}, the model's vocabulary has "
                f"{self.vocab_size} entries; use the tokenizer that belongs to the teacher."
            )
        return Encoded(
            flat.astype(id_type(self.vocab_size)),
            lengths,
            np.concatenate([np.zeros(0, np.uint8), *masks]) if self._chat is not None else None,
            tuple(empty),
        )
