"""Any tensor comes back bit for bit, whole or in part. Megatron's own reader: tests/integration."""

import pytest
import torch

from megatron_hypenet.checkpoint.shard_writer import write_shards
from megatron_hypenet.checkpoint.shards import Shard, ShardReader
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
    assert (
        set(reader) == set(want)
        and reader.shape("a") == (5, 3)
        and reader.dtype("b") == torch.bfloat16
    )
    for key, tensor in want.items():
        assert torch.equal(reader[key], tensor) and reader[key].dtype == tensor.dtype


def test_pieces_are_stored_apart_and_read_across(tmp_path):
    full = torch.arange(24.0).view(6, 4)
    write_shards(
        tmp_path, [Shard("w", full[:2], (6, 4), (0, 0)), Shard("w", full[2:], (6, 4), (2, 0))]
    )
    reader = ShardReader(tmp_path)
    middle = torch.empty(3, 2, dtype=torch.float64)
    reader.read_into([("w", (1, 2), middle)])
    assert torch.equal(reader["w"], full) and torch.equal(middle, full[1:4, 2:].double())


def test_damaged_data_file_is_a_checkpoint_error(tmp_path):
    write_shards(tmp_path, [Shard.whole("w", torch.ones(100))])
    data = next(tmp_path.glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        ShardReader(tmp_path)["w"]
    data.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        ShardReader(tmp_path)["w"]
