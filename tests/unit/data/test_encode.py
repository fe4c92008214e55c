"""Batches to ids; the short way through a fast tokenizer gives the same ids as the long one."""

import numpy as np
import pytest

from megatron_hypenet.data.encode import Encoder, Fields, token_lists
from megatron_hypenet.data.readers import Batch, Place
from megatron_hypenet.data.tokenizer import load_tokenizer
from megatron_hypenet.errors import DataError

TEXTS = ["One sentence.", "", "  two\n\nlines\t", "<|endoftext|>", "caf\u00e9 \U0001f600" * 30]


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    return load_tokenizer(repo_root / "assets" / "tiny-qwen3")


def batch(form, content, **more):
    return Batch(0, 1, form, content, Place(), 0, **more)


def test_the_short_way_gives_the_same_ids(tokenizer):
    wanted = tokenizer(TEXTS, add_special_tokens=False, verbose=False)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=900)
    assert token_lists(tokenizer, TEXTS) == wanted

    class Slow:
        def __call__(self, texts, **options):
            assert options["add_special_tokens"] is False
            return {"input_ids": [[len(text)] for text in texts]}

    assert token_lists(Slow(), TEXTS[:2]) == [[13], [0]]


def test_where_documents_end(tokenizer):
    encoder = Encoder(tokenizer, Fields(), end=9, vocab_size=2048)
    lists = token_lists(tokenizer, ["a b", "c"])
    made = encoder.encode(batch("rows", ["a b", "", "c"]), "x.parquet")
    assert made.ids.tolist() == [*lists[0], 9, *lists[1], 9] and made.ids.dtype == np.uint16
    assert made.lengths.tolist() == [len(lists[0]) + 1, len(lists[1]) + 1]
    assert made.empty == (2,) and made.mask is None
    made = encoder.encode(batch("pieces", ["a b", "c"]), "x.txt")
    assert made.ids.tolist() == [*lists[0], *lists[1], 9]
    made = encoder.encode(batch("pieces", ["a b", ""], ends=False), "x.txt")
    assert made.ids.tolist() == lists[0] and made.lengths.tolist() == [len(lists[0])]
    assert encoder.encode(batch("pieces", [""]), "x.txt").ids.tolist() == [9]
    assert len(encoder.encode(batch("lines", b"\n"), "x.jsonl").ids) == 0


def test_what_does_not_fit(tokenizer):
    with pytest.raises(DataError, match="x.txt: the tokenizer makes id .* has 300 entries"):
        Encoder(tokenizer, Fields(), end=0, vocab_size=300).encode(
            batch("pieces", ["the function returned"]), "x.txt"
        )
    with pytest.raises(DataError, match="has no chat template"):
        Encoder(tokenizer, Fields(messages_key="m"), end=0, vocab_size=2048)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = Encoder(tokenizer, Fields(messages_key="m"), end=0, vocab_size=2048)
    with pytest.raises(DataError, match="x.txt: a .txt file holds no conversations"):
        chat.encode(batch("pieces", ["a"]), "x.txt")
    tokenizer.chat_template = None
