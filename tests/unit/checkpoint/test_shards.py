"""Any tensor comes back bit for bit, whole or in part. Megatron's own reader: tests/integration."""

import pytest
import torch

from megatron_hypenet.checkpoint import shards
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


@pytest.mark.parametrize("cut", [None, 0, 1])
def test_values_are_read_from_any_row_on(tmp_path, cut):
    """Values are read whole, as pieces of rows, and as pieces of columns; cast and not."""
    full = torch.arange(60.0).view(10, 6)
    pieces = [(full, (0, 0))] if cut is None else []
    if cut == 0:
        pieces = [(full[:4], (0, 0)), (full[4:], (4, 0))]
    elif cut == 1:
        pieces = [(full[:, :2], (0, 0)), (full[:, 2:], (0, 2))]
    write_shards(tmp_path, [Shard("w", data, (10, 6), offset) for data, offset in pieces])
    reader = ShardReader(tmp_path)
    unit = reader.unit("w")
    assert unit == (6 if cut == 1 else 1)
    for first, count in ((0, 60), (12, 30), (18, 6), (54, 6)):
        for dtype in (torch.float32, torch.float64):
            target = torch.empty(count, dtype=dtype)
            reader.read_values("w", first, target)
            assert torch.equal(target, full.view(-1)[first : first + count].to(dtype))
    part = torch.empty(7)
    reader.read_values("w", 17, part)
    assert torch.equal(part, full.view(-1)[17:24])


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    full = torch.arange(1000.0).view(100, 10)
    write_shards(tmp_path, [Shard.whole("w", full)])
    asked = []
    read = shards.read_values

    def counting(path, stream, place, first, target):
        asked.append(target.numel())
        read(path, stream, place, first, target)

    monkeypatch.setattr(shards, "read_values", counting)
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 400)
    target = torch.empty(25, 3, dtype=torch.float64)
    ShardReader(tmp_path).read_into([("w", (30, 5), target)])
    assert torch.equal(target, full[30:55, 5:8].double()) and asked == [100, 100, 50]
