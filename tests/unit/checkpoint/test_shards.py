"""Any tensor comes back bit for bit, whole or in part; pieces must tile. Megatron's own reader: tests/integration."""

import weakref

import pytest
import torch

from megatron_hypenet.checkpoint.shards import LazyTensor, Shard, ShardReader, write_shards
from megatron_hypenet.errors import CheckpointError


def test_round_trip_is_bit_equal_in_every_dtype_and_rank(tmp_path):
    want = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(6).view(1, 2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    write_shards(tmp_path, [Shard.whole(key, tensor) for key, tensor in want.items()])
    reader = ShardReader(tmp_path)
    assert set(reader) == set(want) and reader.shape("a") == (5, 3) and reader.dtype("b") == torch.bfloat16
    for key, tensor in want.items():
        assert torch.equal(reader[key], tensor) and reader[key].dtype == tensor.dtype


def test_pieces_are_stored_apart_and_read_across(tmp_path):
    full = torch.arange(24.0).view(6, 4)
    write_shards(tmp_path, [Shard("w", full[:2], (6, 4), (0, 0)), Shard("w", full[2:], (6, 4), (2, 0))])
    reader = ShardReader(tmp_path)
    middle = torch.empty(3, 2, dtype=torch.float64)
    reader.read_into([("w", (1, 2), middle)])
    assert torch.equal(reader["w"], full) and torch.equal(middle, full[1:4, 2:].double())


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
        write_shards(tmp_path, [Shard.whole("w", LazyTensor((2, 2), torch.float32, lambda: torch.ones(3)))])


def test_damaged_data_file_is_a_checkpoint_error(tmp_path):
    write_shards(tmp_path, [Shard.whole("w", torch.ones(100))])
    data = next(tmp_path.glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ShardReader(tmp_path)["w"]
    data.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ShardReader(tmp_path)["w"]


def test_only_one_lazy_tensor_is_alive_while_writing(tmp_path):
    alive = []

    def produce():
        tensor = torch.zeros(64)
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) <= 2  # this one, and the one just written
        return tensor

    write_shards(tmp_path, [Shard.whole(f"w{at}", LazyTensor((64,), torch.float32, produce)) for at in range(8)])
    assert len(alive) == 8


def test_views_are_written_without_the_storage_behind_them(tmp_path):
    big = torch.arange(1000.0).view(100, 10)
    write_shards(tmp_path, [Shard.whole("w", big[3:5])])
    assert torch.equal(ShardReader(tmp_path)["w"], big[3:5])
    assert next(tmp_path.glob("*.distcp")).stat().st_size < 3000
