"""Writing pairs: the bytes are Megatron's, and what is not finished leaves nothing."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

from megatron_hypenet.data import token_writer
from megatron_hypenet.data.indexed import open_tokens
from megatron_hypenet.data.pairs import is_token_file, mask_path, token_paths
from megatron_hypenet.data.token_writer import (
    TokenFileWriter,
    TokenFolder,
    id_type,
    move_into_place,
)
from megatron_hypenet.errors import DataError, SetupError

DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def write(prefix, documents=DOCUMENTS, vocab_size=100, **more):
    with TokenFileWriter(prefix, vocab_size=vocab_size, **more) as writer:
        for ids in documents:
            writer.add(ids)
    return prefix


@pytest.mark.parametrize("size", [100, 65_499, 65_500, 151_936])
def test_the_bytes_are_those_that_megatron_writes(tmp_path, size):
    assert id_type(size) == np.dtype(DType.optimal_dtype(size))
    prefix = write(tmp_path / "ours", vocab_size=size)
    theirs = tmp_path / "theirs"
    builder = IndexedDatasetBuilder(f"{theirs}.bin", DType.optimal_dtype(size))
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{theirs}.idx")
    for one, other in zip(token_paths(prefix), token_paths(theirs), strict=True):
        assert one.read_bytes() == other.read_bytes()
    dataset = IndexedDataset(str(prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS


def test_a_long_index_is_written_in_parts(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")
    monkeypatch.setattr(token_writer, "_CHUNK", 2)
    parts = write(tmp_path / "parts")
    with TokenFileWriter(tmp_path / "copy", dtype=np.uint16) as writer:
        writer.add_file(open_tokens(whole))
    for name in (parts, tmp_path / "copy"):
        for one, other in zip(token_paths(whole), token_paths(name), strict=True):
            assert one.read_bytes() == other.read_bytes()
    assert writer.num_documents == 3 and writer.num_tokens == 9


def test_a_mask_lies_beside_and_goes_with_its_text(tmp_path):
    prefix = tmp_path / "text"
    with TokenFileWriter(prefix, vocab_size=100, masked=True) as writer:
        writer.add_documents(np.arange(3), np.array([1, 2]), np.array([0, 1, 0], np.uint8))
        writer.add([5])
    assert mask_path(prefix).read_bytes() == bytes([0, 1, 0, 1])
    with TokenFileWriter(tmp_path / "both", vocab_size=100, masked=True) as writer:
        writer.add_file(open_tokens(prefix))
        writer.add_file(open_tokens(write(tmp_path / "plain")))
    assert open_tokens(tmp_path / "both").mask.tolist() == [0, 1, 0, 1] + [1] * 9
    write(prefix)
    assert not mask_path(prefix).exists() and open_tokens(prefix).mask is None


def test_a_damaged_mask_is_not_copied(tmp_path):
    with TokenFileWriter(tmp_path / "text", vocab_size=100, masked=True) as writer:
        writer.add_documents(np.arange(3), np.array([3]), np.array([0, 1, 7], np.uint8))
    with (
        pytest.raises(DataError, match="byte 2 is 7; a mask holds 0 and 1"),
        TokenFileWriter(tmp_path / "both", vocab_size=100, masked=True) as writer,
    ):
        writer.add_file(open_tokens(tmp_path / "text"))
    assert not list(tmp_path.glob("both*"))


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with TokenFileWriter(tmp_path / "text", vocab_size=100) as writer:
            writer.add([1])
            raise RuntimeError
    assert list(tmp_path.iterdir()) == [] and not is_token_file(tmp_path / "text")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_writer, "_write_index", full)
    with pytest.raises(
        SetupError, match="no space left on the disk; nothing was left there"
    ) as caught:
        write(tmp_path / "text")
    assert caught.value.exit_code == 4 and list(tmp_path.iterdir()) == []


def test_unfinished_files_are_cut_back(tmp_path):
    folder = tmp_path / "work"
    files = TokenFolder(folder, np.uint16, masked=True)
    files.add(np.arange(4), np.array([4]))
    sizes = files.sizes()
    assert sizes == {"tokens": 8, "lengths": 4, "mask": 4}
    files.add(np.arange(9), np.array([9]))
    files.close()
    files = TokenFolder(folder, np.uint16, masked=True)
    assert not files.cut_back({**sizes, "mask": 99}) and not files.cut_back({"tokens": 8})
    assert files.cut_back(sizes)
    files.add(np.array([7]), np.array([1]))
    files.write_index()
    files.close()
    # stopped between two moves: the second call does the rest
    (folder / "tokens").rename(tmp_path / "text.bin")
    move_into_place(folder, tmp_path / "text", masked=True)
    opened = open_tokens(tmp_path / "text")
    assert opened.tokens.tolist() == [0, 1, 2, 3, 7] and opened.document_ends.tolist() == [4, 5]
    assert not folder.exists() and len(opened.mask) == 5


def test_lengths_that_the_index_cannot_hold_are_refused(tmp_path):
    files = TokenFolder(tmp_path / "work", np.uint16, masked=False)
    with pytest.raises(DataError, match="a document of 3,000,000,000 tokens"):
        files.add(np.zeros(0, np.uint16), np.array([3_000_000_000]))
