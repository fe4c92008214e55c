import time

import numpy as np
import pytest

from megatron_hypenet.data.indexed import TokenFile, open_tokens
from megatron_hypenet.data.pairs import mask_path
from megatron_hypenet.data.token_ids import IdRange, scan_ids
from megatron_hypenet.data.token_writer import TokenFileWriter
from megatron_hypenet.errors import DataError


def pair(tmp_path, documents, dtype=np.int32):
    with TokenFileWriter(tmp_path / "x", dtype=dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return open_tokens(tmp_path / "x")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_inside_the_vocabulary_are_described(tmp_path, dtype):
    file = pair(tmp_path, [[5, 9, 0], [2047, 0]], dtype)
    assert scan_ids(file, 2048, end_of_document=0) == IdRange(lowest=0, highest=2047, ends=2)
    assert scan_ids(file, None) == IdRange(lowest=0, highest=2047, ends=0)
    assert scan_ids(file, 2048, end_of_document=70_000).ends == 0


@pytest.mark.parametrize(
    ("documents", "vocab", "says"),
    [
        (
            [[1, 2], [3, 5000, 5001]],
            2048,
            "x.bin: token 3 (in document 1) is 5000, but the model's vocabulary has 2048 entries, "
            "0 to 2047",
        ),
        ([[1, 2], [2048]], 2048, "token 2 (in document 1) is 2048"),
        ([[1, -1], [3]], 2048, "token 1 (in document 0) is -1"),
        ([[1], [3, -7]], None, "token 2 (in document 1) is -7, but ids are not negative"),
    ],
)
def test_foreign_ids_are_named_with_their_place(tmp_path, documents, vocab, says):
    with pytest.raises(DataError) as caught:
        scan_ids(pair(tmp_path, documents), vocab)
    assert says in str(caught.value)


def test_the_end_of_a_large_file_is_looked_at_fast(tmp_path):
    tokens = np.ones(50_000_000, dtype=np.int32)
    file = TokenFile(tmp_path / "x", tokens, np.array([25_000_000, 50_000_000]))
    started = time.monotonic()
    assert scan_ids(file, 2048, end_of_document=0).highest == 1
    assert time.monotonic() - started < 20  # 0.1 s on an idle machine
    tokens[-1] = 2048
    with pytest.raises(DataError, match=r"token 49,999,999 \(in document 1\) is 2048"):
        scan_ids(file, 2048)


def test_masks_are_counted_and_checked(tmp_path):
    file = pair(tmp_path, [[5, 9, 0], [7, 0]])
    assert scan_ids(file, None).answers is None
    mask_path(file.prefix).write_bytes(bytes([0, 1, 1, 0, 1]))
    assert scan_ids(open_tokens(file.prefix), None).answers == 3
    mask_path(file.prefix).write_bytes(bytes([0, 1, 1, 7, 1]))
    with pytest.raises(DataError, match="x.mask: byte 3 is 7; a mask holds 0 and 1"):
        scan_ids(open_tokens(file.prefix), None)
