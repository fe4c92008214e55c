import struct

import numpy as np
import pytest

from megatron_hypenet.data.indexed import TokenStream, open_tokens
from megatron_hypenet.data.pairs import mask_path, token_paths
from megatron_hypenet.data.token_writer import TokenFileWriter
from megatron_hypenet.errors import DataError

DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def write(prefix, documents=DOCUMENTS, vocab_size=100):
    with TokenFileWriter(prefix, vocab_size=vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
    return prefix


def test_round_trip(tmp_path):
    opened = open_tokens(write(tmp_path / "new" / "text"))
    assert opened.tokens.tolist() == list(range(1, 10)) and opened.tokens.dtype == np.uint16
    assert opened.document_ends.tolist() == [3, 5, 9]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["text.bin", "text.idx"]


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.0, 9), (0.01, 5), (0.44, 5), (0.5, 3), (0.99, 3)]
)
def test_heldout_documents_are_whole_and_last(tmp_path, fraction, kept):
    assert open_tokens(write(tmp_path / "text")).documents_before(fraction) == kept


def test_one_document_is_never_split(tmp_path):
    assert open_tokens(write(tmp_path / "text", [[1, 2]])).documents_before(0.5) == 2


def test_damage_is_named(tmp_path):
    prefix = write(tmp_path / "text")
    bin_path, idx_path = token_paths(prefix)
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    with pytest.raises(DataError, match="16 bytes, but the index counts 9 tokens"):
        open_tokens(prefix)
    idx_path.write_bytes(b"not an index")
    with pytest.raises(DataError, match="not a Megatron index"):
        open_tokens(prefix)
    idx_path.unlink()
    with pytest.raises(DataError, match="no such file"):
        open_tokens(prefix)


def changed(
    prefix,
    version=1,
    code=8,
    sequences=None,
    bounds=None,
    lengths=(3, 2, 4),
    pointers=(0, 6, 10),
    documents=(0, 1, 2, 3),
    rest=b"",
):
    """Write the index of DOCUMENTS anew, with something changed."""
    head = struct.pack(
        "<9sQBQQ",
        b"MMIDIDX\0\0",
        version,
        code,
        sequences or len(lengths),
        len(documents) if bounds is None else bounds,
    )
    body = struct.pack(
        f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents
    )
    token_paths(prefix)[1].write_bytes(head + body + rest)
    return prefix


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 2}, "version 2"), ({"code": 99}, "unknown type 99"),
        ({"code": 7}, "its ids are float32"),
        ({"sequences": 1 << 40}, "damaged: 1099511627776 sequences"),
        ({"bounds": 1 << 63}, "document bounds take"),
        ({"bounds": 0}, "document bounds take"), ({"bounds": 0, "documents": ()}, "no document "
            "bounds"), ({"rest": b"x"}, "it has 103"),
        ({"lengths": (3, -2, 8)}, "sequence 1 has the length -2"),
        ({"lengths": (2, 3, 4)}, "do not follow each other"),
        ({"pointers": (0, 6, -10)}, "do not follow each other"),
        ({"pointers": (2, 8, 12)}, "do not follow each other"),
        ({"documents": (0, 1, 2, 4)}, "do not ascend from 0 to its 3"),
        ({"documents": (0, 2, 1, 3)}, "do not ascend"),
        ({"documents": (0, -5, 2, 3)}, "do not ascend"),
        ({"documents": (1, 1, 2, 3)}, "do not ascend"),
        ({"documents": (0, 1, 2, 2)}, "do not ascend"), ({"code": 1}, "do not follow each other"),
        ({"lengths": (), "pointers": (), "documents": (0,)}, "0 tokens"),
    ],
)  # fmt: skip
def test_every_number_of_the_index_is_checked(tmp_path, change, word):
    prefix = write(tmp_path / "text")
    assert open_tokens(changed(prefix)).document_ends.tolist() == [3, 5, 9]
    with pytest.raises(DataError, match=word) as caught:
        open_tokens(changed(prefix, **change))
    assert "text." in str(caught.value)


@pytest.mark.parametrize("size", [0, 8, 9, 20, 33, 34, 50, 89])
def test_an_index_cut_off_anywhere_is_refused(tmp_path, size):
    idx_path = token_paths(write(tmp_path / "text"))[1]
    idx_path.write_bytes(idx_path.read_bytes()[:size])
    with pytest.raises(DataError, match="text.idx: (not a Megatron index|cut off|damaged)"):
        open_tokens(tmp_path / "text")


def test_documents_of_several_sequences_and_empty_ones_are_read(tmp_path):
    assert open_tokens(
        changed(write(tmp_path / "text"), documents=(0, 2, 2, 3))
    ).document_ends.tolist() == [5, 5, 9]


def test_an_empty_pair_is_named(tmp_path):
    prefix = changed(write(tmp_path / "text"), lengths=(), pointers=(), documents=(0,))
    token_paths(prefix)[0].write_bytes(b"")
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(prefix)


def test_stream_slices_across_parts():
    values = np.arange(20, dtype=np.uint16)
    stream = TokenStream([values[:7], values[7:7], values[7:8], values[8:]])
    assert len(stream) == 20
    for start in range(21):
        for stop in range(21):
            assert stream[start:stop].tolist() == values[start:stop].tolist()
    assert stream[-3:].tolist() == [17, 18, 19] and stream[5:9].dtype == np.int64
    assert len(TokenStream([])[0:5]) == 0
    with pytest.raises(ValueError, match="stepped"):
        stream[::2]


def test_masks_and_boundaries_of_parts(tmp_path):
    values = np.arange(20, dtype=np.uint16)
    mask = np.array([0, 1, 1, 0, 0, 2, 1], np.uint8)
    ends = np.array([3, 7])
    stream = TokenStream([values[:5], values[5:12], values[12:]], [None, ends], [None, mask])
    assert stream.has_masks and stream.has_document_ends
    whole = np.array([1] * 5 + [0, 1, 1, 0, 0, 1, 1] + [1] * 8, bool)
    lasts = np.isin(values, [7, 11])
    known = (values >= 5) & (values < 12)
    for start in range(21):
        for stop in range(start, 21):
            assert (stream.answers(start, stop) == whole[start:stop]).all()
            last, inside = stream.last_tokens(start, stop)
            assert (last == lasts[start:stop]).all() and (inside == known[start:stop]).all()
    assert not TokenStream([values]).has_masks


def test_a_mask_belongs_to_its_pair(tmp_path):
    prefix = write(tmp_path / "text")
    assert open_tokens(prefix).mask is None and open_tokens(prefix).mask_of(0, 3) is None
    mask_path(prefix).write_bytes(bytes([0, 1, 1, 0, 1, 0, 0, 0, 1]))
    assert open_tokens(prefix).mask_of(1, 5).tolist() == [1, 1, 0, 1]
    mask_path(prefix).write_bytes(bytes(8))
    with pytest.raises(DataError, match="text.mask: 8 bytes, but the pair has 9 tokens"):
        open_tokens(prefix)
