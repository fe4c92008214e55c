"""Conversations as tokens: the tokenizer's chat template, and a mask of the tokens that the
assistant says.

Only the answers are trained on: what the template writes for a message of the assistant, from the
first token behind its heading to the token that ends its turn, which a model must learn to say.
Templates that mark the answers themselves (`{% generation %}`) decide it; of others the beginning
of an answer is where the template, given the messages before it, would let the model go on.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hypenet.data.places import RecordError, Where
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import reason_of, shown

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]


class ChatEncoder:
    """Turns conversations into ids and masks with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Prepare the template; DataError when the tokenizer has no chat template, or none that can
        be followed to the characters of its tokens."""
        name = getattr(tokenizer, "name_or_path", "the tokenizer")
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{name}: the tokenizer has no chat template, and conversations are written with "
                "one; put the model's chat_template.jinja or tokenizer_config.json beside it"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{name}: the tokenizer cannot say which characters a token has, and the answers "
                "of a conversation are found by them; add the model's tokenizer.json"
            )
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self._marked = isinstance(template, str) and _MARKS.search(template) is not None

    def encode(
        self, messages: list[Message], where: Where
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Return (ids [t], mask [t]) of a conversation: 1 for tokens of the assistant.

        Raises DataError that begins with `where` when the template refuses the conversation, or an
        answer cannot be found in what it writes.
        """
        if not any(message["role"] == "assistant" for message in messages):
            raise RecordError(
                where, "no message of the role assistant, so nothing to train on; remove it"
            )
        if self._marked:
            return self._by_marks(messages, where)
        text = self._written(messages, where)
        encoding = self._encoding(text)
        ids = np.array(encoding.ids, dtype=np.int64)
        stops = np.array([stop for _, stop in encoding.offsets], dtype=np.int64)
        mask = np.zeros(len(ids), np.uint8)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                first = self._first_token(messages, number, text, stops, where)
                mask[first : self._behind_turn(messages, number, ids, first, where)] = 1
        return ids, mask

    def _written(self, messages: list[Message], where: Where, *, prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        # templates are programs of their own: they raise what they like
        except Exception as error:
            raise RecordError(
                where, f"the chat template refuses the conversation: {shown(reason_of(error))}"
            ) from None
        return text

    def _encoding(self, text: str) -> Any:
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)

    def _first_token(
        self, messages: list[Message], number: int, text: str,
        stops: npt.NDArray[np.int64], where: Where,
    ) -> int:  # fmt: skip
        """Return the index of the first token that has a character of an answer."""
        if number == 0:
            raise RecordError(
                where,
                "the conversation begins with the assistant; put the message that it answers "
                "before it",
            )
        before = self._written(messages[:number], where, prompt=True)
        if not text.startswith(before):
            raise RecordError(
                where,
                f"message {number + 1}: the chat template writes what comes before it "
                "differently once the conversation goes on, so the answer cannot be found; split "
                "the conversation, or use a template with {% generation %} marks",
            )
        return int(np.searchsorted(stops, len(before), side="right"))

    def _behind_turn(
        self, messages: list[Message], number: int, ids: npt.NDArray[np.int64], first: int,
        where: Where,
    ) -> int:  # fmt: skip
        """Index behind the token that ends an answer: the last special token that the template
        writes for it when nothing follows."""
        alone = self._encoding(self._written(messages[: number + 1], where)).ids
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        last = next((one for one in reversed(alone) if one in special), None)
        found = np.flatnonzero(ids[first:] == (-1 if last is None else last))
        if not len(found):
            raise RecordError(
                where,
                f"message {number + 1}: the chat template ends an answer with no special "
                "token, so its end cannot be found; use a template with {% generation %} marks",
            )
        return first + int(found[0]) + 1

    def _by_marks(
        self, messages: list[Message], where: Where
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        try:
            written = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise RecordError(
                where, f"the chat template refuses the conversation: {shown(reason_of(error))}"
            ) from None
        mask = np.array(written["assistant_masks"], dtype=np.uint8)
        if not mask.any():
            raise RecordError(
                where,
                "the chat template marks no token of the assistant; remove the "
                "conversation, or correct the template",
            )
        return np.array(written["input_ids"], dtype=np.int64), mask
