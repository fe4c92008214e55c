import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_hypenet.data.indexed import TokenFileWriter, TokenStream, is_token_file, open_tokens, token_paths
from megatron_hypenet.errors import DataError, SetupError

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


def test_megatron_reads_it(tmp_path):
    dataset = IndexedDataset(str(write(tmp_path / "text")))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_large_vocabularies_need_wide_ids(tmp_path):
    opened = open_tokens(write(tmp_path / "text", [[151_000]], vocab_size=151_936))
    assert opened.tokens.dtype == np.int32 and opened.tokens.tolist() == [151_000]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with TokenFileWriter(tmp_path / "text", vocab_size=100) as writer:
            writer.add([1])
            raise RuntimeError
    assert list(tmp_path.iterdir()) == [] and not is_token_file(tmp_path / "text")


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, 9), (0.01, 5), (0.44, 5), (0.5, 3), (0.99, 3)])
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


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match="no space left on the disk; nothing was left there") as caught:
        with TokenFileWriter(tmp_path / "text", vocab_size=100) as writer:
            writer.add([1])

            def full(path):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(writer._builder, "finalize", full)
    assert caught.value.exit_code == 4 and list(tmp_path.iterdir()) == []
