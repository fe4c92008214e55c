"""The index of a sharded folder is believed only as far as its files bear it out."""

import dataclasses
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

from megatron_hypenet.checkpoint.shard_index import (
    METADATA,
    StoredObject,
    intersection,
    overlaps,
    read_contents,
    read_index,
)
from megatron_hypenet.checkpoint.shard_writer import ShardWrite, write_shards
from megatron_hypenet.checkpoint.shards import Shard
from megatron_hypenet.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """Provide the "w" [6, 4] in three pieces and "b", a scalar."""
    full = torch.arange(24.0).view(6, 4)
    pieces = [
        Shard("w", full[:2], (6, 4), (0, 0)),
        Shard("w", full[2:, :1], (6, 4), (2, 0)),
        Shard("w", full[2:, 1:], (6, 4), (2, 1)),
    ]
    write_shards(tmp_path, [*pieces, Shard.whole("b", torch.tensor(2.0))])
    return tmp_path


def changed(folder, change):
    """Read, change with `change(metadata)`, and write the index; it is ours."""
    metadata = pickle.loads((folder / METADATA).read_bytes())  # noqa: S301
    metadata = change(metadata) or metadata
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_tensors_pieces_and_places_are_read(folder):
    found = read_index(folder)
    assert (
        set(found) == {"w", "b"}
        and found["w"].shape == (6, 4)
        and found["b"].shape == ()
        and found["w"].dtype == torch.float32
    )
    assert sorted((piece.offset, piece.shape) for piece in found["w"].pieces) == [
        ((0, 0), (2, 4)),
        ((2, 0), (4, 1)),
        ((2, 1), (4, 3)),
    ]
    assert {piece.file.name for piece in found["w"].pieces} == {"__0_0.distcp"}
    assert [common[1:] for common in overlaps(found["w"], (1, 1), (2, 2))] == [
        ((1, 1), (1, 2)),
        ((2, 1), (1, 2)),
    ]


def test_objects_that_are_no_tensors_are_left_alone(folder):
    changed(
        folder, lambda metadata: metadata.state_dict_metadata.update(extra=BytesStorageMetadata())
    )
    assert set(read_index(folder)) == {"w", "b"}


def test_boxes_meet_or_do_not():
    assert intersection((0, 0), (2, 2), (1, 1), (3, 3)) == ((1, 1), (1, 1))
    assert intersection((0,), (2,), (2,), (2,)) is None and intersection((), (), (), ()) == ((), ())


def info_of(metadata, offset=(0, 0)):
    return metadata.storage_data[MetadataIndex("w", torch.Size(offset))]


def chunk_of(metadata, number=0):
    return metadata.state_dict_metadata["w"].chunks[number]


CHANGES = {
    "no dictionary": lambda m: setattr(m, "state_dict_metadata", [1]),
    "expected an object of the class Metadata": lambda m: {"a": 1},
    "has no storage_data": lambda m: delattr(m, "storage_data"),
    "expected an object of the class TensorStorageMetadata": lambda m: m.state_dict_metadata.update(
        w=3
    ),
    "has no list of pieces": lambda m: setattr(m.state_dict_metadata["w"], "chunks", {}),
    "expected an object of the class ChunkStorageMetadata": lambda m: m.state_dict_metadata[
        "w"
    ].chunks.append(None),
    "the dtype of w is missing": lambda m: setattr(m.state_dict_metadata["w"], "properties", None),
    "is not inside its shape": lambda m: setattr(chunk_of(m), "sizes", torch.Size((7, 4))),
    "is negative, too large or no whole number": lambda m: setattr(
        m.state_dict_metadata["w"], "size", (6.0, 4)
    ),
    "negative, too large": lambda m: setattr(
        m.state_dict_metadata["w"], "size", (1 << 40, 1 << 40)
    ),
    "is negative": lambda m: setattr(chunk_of(m), "sizes", (-2, -4)),
    "at most 16 dimensions": lambda m: setattr(m.state_dict_metadata["w"], "size", (1,) * 40),
    "do not cover its shape [6, 4] exactly once": lambda m: (
        m.state_dict_metadata["w"].chunks.pop() and None
    ),
    "does not say where the piece of w": lambda m: (
        m.storage_data.pop(MetadataIndex("w", torch.Size((0, 0)))) and None
    ),
    "belongs to no tensor": lambda m: m.storage_data.update({MetadataIndex(7): info_of(m)}),
    "points outside its folder": lambda m: setattr(info_of(m), "relative_path", "../__0_0.distcp"),
    "files with tensors end in .distcp": lambda m: setattr(
        info_of(m), "relative_path", "metadata.json"
    ),
    "points outside its folder (no text)": lambda m: setattr(info_of(m), "relative_path", 7),
    "no such file": lambda m: setattr(info_of(m), "relative_path", "other.distcp"),
    "does not have": lambda m: setattr(info_of(m), "length", 1 << 40),
    "bytes that __0_0.distcp": lambda m: setattr(info_of(m), "offset", -1),
    "has only 10 bytes": lambda m: setattr(info_of(m), "length", 10),
    "two pieces share byte": lambda m: setattr(info_of(m), "offset", info_of(m).offset + 1),
    "compressed or transformed": lambda m: setattr(info_of(m), "transform_descriptors", ["zstd"]),
}


@pytest.mark.parametrize("word", CHANGES)
def test_what_the_files_do_not_bear_out_is_refused(folder, word):
    changed(folder, CHANGES[word])
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_pieces_that_overlap_are_refused_though_their_sizes_add_up(folder):
    def change(metadata):
        chunks = metadata.state_dict_metadata["w"].chunks
        places = metadata.storage_data
        moved = next(chunk for chunk in chunks if chunk.offsets == (2, 1))
        places[MetadataIndex("w", torch.Size((2, 0)))] = info_of(metadata, (2, 0))
        places[MetadataIndex("w", torch.Size((1, 1)))] = info_of(metadata, (2, 1))
        chunks[chunks.index(moved)] = dataclasses.replace(moved, offsets=torch.Size((1, 1)))

    changed(folder, change)
    with pytest.raises(CheckpointError, match="exactly once"):
        read_index(folder)


def test_a_tensor_of_no_values_needs_no_pieces_and_a_grid_is_fine(tmp_path):
    full = torch.arange(400.0).view(20, 20)
    grid = [
        Shard("w", full[i : i + 2, j : j + 5], (20, 20), (i, j))
        for i in range(0, 20, 2)
        for j in range(0, 20, 5)
    ]
    write_shards(tmp_path, [*grid, Shard.whole("empty", torch.zeros(0, 3))])
    found = read_index(tmp_path)
    assert len(found["w"].pieces) == 40 and found["empty"].shape == (0, 3)


def test_used_classes_are_torchs(folder):
    found = pickle.loads((folder / METADATA).read_bytes())  # noqa: S301
    assert (
        isinstance(found, Metadata)
        and isinstance(chunk_of(found), ChunkStorageMetadata)
        and isinstance(info_of(found), _StorageInfo)
    )


def test_what_is_not_wanted_is_not_checked_and_objects_have_places(tmp_path):
    shards = [Shard.whole("w", torch.ones(3)), Shard.whole("other.w", torch.ones(3))]
    plan = ShardWrite(tmp_path, shards, alone=True, objects={"state/shard_0_1": b"content"})
    plan.finish([plan.write()])

    def with_a_hole(metadata):
        del metadata.state_dict_metadata["other.w"].chunks[:]

    changed(tmp_path, with_a_hole)
    tensors, objects = read_contents(tmp_path, lambda name: not name.startswith("other."))
    file = tmp_path / "__0_0.distcp"
    assert set(tensors) == {"w"}
    assert objects == {"state/shard_0_1": StoredObject(file, file.stat().st_size - 7, 7)}
    with pytest.raises(CheckpointError, match="other.w do not cover"):
        read_index(tmp_path)
