"""Pieces must tile, each is written once, and nothing but the piece in hand is kept alive."""

import weakref

import pytest
import torch

from megatron_hypenet.checkpoint import shard_writer, stream
from megatron_hypenet.checkpoint.manifest import hash_file
from megatron_hypenet.checkpoint.shard_writer import (
    ShardWrite,
    stream_pieces,
    stream_shards,
    write_shards,
)
from megatron_hypenet.checkpoint.shards import LazyTensor, Shard, ShardReader, StreamedTensor
from megatron_hypenet.errors import CheckpointError


def test_pieces_that_do_not_tile_are_refused(tmp_path):
    full = torch.zeros(6, 4)
    with pytest.raises(CheckpointError, match="do not tile"):
        write_shards(tmp_path, [Shard("w", full[:2], (6, 4), (0, 0))])


def test_lazy_tensors_are_produced_when_written_and_checked(tmp_path):
    alive = []
    lazy = LazyTensor((2, 2), torch.float32, lambda: alive.append(1) or torch.ones(2, 2))
    write_shards(tmp_path, [Shard.whole("w", lazy)])
    assert alive == [1] and torch.equal(ShardReader(tmp_path)["w"], torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="announced"):
        write_shards(
            tmp_path, [Shard.whole("w", LazyTensor((2, 2), torch.float32, lambda: torch.ones(3)))]
        )


def test_only_one_lazy_tensor_is_alive_while_writing(tmp_path):
    alive = []

    def produce():
        tensor = torch.zeros(64)
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) <= 2  # this one, and the one just written
        return tensor

    write_shards(
        tmp_path,
        [Shard.whole(f"w{at}", LazyTensor((64,), torch.float32, produce)) for at in range(8)],
    )
    assert len(alive) == 8


def test_views_are_written_without_the_storage_behind_them(tmp_path):
    big = torch.arange(1000.0).view(100, 10)
    write_shards(tmp_path, [Shard.whole("w", big[3:5])])
    assert torch.equal(ShardReader(tmp_path)["w"], big[3:5])
    assert next(tmp_path.glob("*.distcp")).stat().st_size < 3000


def test_a_piece_has_one_writer():
    """Two processes that both claim a tensor: torch's planner would keep either of them without a
    word."""
    plans = [
        shard_writer._plan([Shard.whole("w", torch.full((4,), float(writer)))])
        for writer in range(2)
    ]
    with pytest.raises(ValueError, match="processes 0 and 1 both write w"):
        shard_writer._global_metadata(plans)


def test_writing_can_be_cancelled_between_pieces(tmp_path):
    calls = iter([False, True])
    plan = ShardWrite(tmp_path, [Shard.whole(key, torch.ones(3)) for key in "abc"], alone=True)
    with pytest.raises(InterruptedError, match="given up"):
        plan.write(cancelled=lambda: next(calls))


def test_a_process_without_pieces_writes_no_file(tmp_path):
    written = ShardWrite(tmp_path, [], alone=True).write()
    assert written.file is None and list(tmp_path.iterdir()) == []


def test_pieces_that_overlap_are_refused_even_when_their_sizes_add_up():
    pieces = [Shard("w", torch.zeros(2), (4,), (start,)) for start in (0, 1)]
    with pytest.raises(ValueError):
        shard_writer._global_metadata([shard_writer._plan([piece]) for piece in pieces])


def test_the_hash_of_a_written_file_is_right(tmp_path):
    written = ShardWrite(
        tmp_path, [Shard.whole(key, torch.randn(300, 70)) for key in "abc"], alone=True
    ).write()
    assert written.file == hash_file(tmp_path / ShardWrite.name_of(0))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("piece", [64, 1000])
def test_streamed_tensors_give_the_same_bytes(tmp_path, monkeypatch, workers, piece):
    monkeypatch.setattr(stream, "PIECE_BYTES", piece)
    tensors = {
        "a": torch.randn(7, 5, 3),
        "b": torch.randn(40, 9).bfloat16(),
        "c": torch.randn(3, dtype=torch.float64),
    }
    streamed = {key: streamed_tensor(tensor) for key, tensor in tensors.items()}
    write_shards(tmp_path / "whole", [Shard.whole(*item) for item in tensors.items()])
    entries = stream_shards(tmp_path / "streamed", streamed, workers=workers)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert entries == {"__0_0.distcp": hash_file(tmp_path / "whole/__0_0.distcp")}


def test_a_tensor_whose_archive_is_not_known_is_written_whole(tmp_path):
    tensors = {"a": torch.zeros(0, 4), "b": torch.randn(3, 4)}
    streamed = {key: streamed_tensor(tensor) for key, tensor in tensors.items()}
    stream_shards(tmp_path, streamed)
    reader = ShardReader(tmp_path)
    assert all(torch.equal(reader[key], tensor) for key, tensor in tensors.items())


def test_streamed_pieces_and_objects_give_the_bytes_of_write(tmp_path):
    full = torch.randn(2, 6, 4)
    objects = {"state/shard_0_1": b"some bytes"}
    shards = [Shard("w", full[at : at + 1], full.shape, (at, 0, 0)) for at in range(2)]
    (tmp_path / "whole").mkdir()
    plan = ShardWrite(tmp_path / "whole", shards, alone=True, objects=objects)
    plan.finish([plan.write()], {"iteration": 3})
    streamed = [Shard(s.key, streamed_tensor(s.data), s.global_shape, s.offset) for s in shards]
    stream_pieces(tmp_path / "streamed", streamed, objects=objects, common={"iteration": 3})
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes(), file.name
    assert torch.equal(ShardReader(tmp_path / "streamed")["w"], full)
    assert torch.load(tmp_path / "streamed/common.pt") == {"iteration": 3}


def streamed_tensor(tensor):
    def read(first, target):
        target.copy_(tensor.reshape(-1)[first : first + target.numel()])

    return StreamedTensor(tuple(tensor.shape), tensor.dtype, 1, read)
