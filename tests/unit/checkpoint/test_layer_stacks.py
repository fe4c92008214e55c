"""Stacks become layers in the index alone, and only where every piece is of one layer."""

import pytest
import torch

from megatron_hypenet.checkpoint.layer_stacks import unstacked
from megatron_hypenet.checkpoint.shard_index import StoredTensor, read_contents
from megatron_hypenet.checkpoint.shard_writer import write_shards
from megatron_hypenet.checkpoint.shards import Shard, ShardReader
from megatron_hypenet.errors import CheckpointError


def reader(folder):
    return ShardReader(folder, unstacked(read_contents(folder)[0], folder, "layers."))


def test_layers_are_read_whatever_way_their_pieces_were_cut(tmp_path):
    full = torch.arange(60.0).view(3, 4, 5)
    shards = [
        Shard("layers.w", full[:1], full.shape, (0, 0, 0)),
        Shard("layers.w", full[1:2, :, :2], full.shape, (1, 0, 0)),
        Shard("layers.w", full[1:2, :, 2:], full.shape, (1, 0, 2)),
        Shard("layers.w", full[2:, :3], full.shape, (2, 0, 0)),
        Shard("layers.w", full[2:, 3:], full.shape, (2, 3, 0)),
    ]
    one = torch.arange(4.0)
    write_shards(tmp_path, [*shards, Shard.whole("layers.0.b", one), Shard.whole("w", one)])
    found = reader(tmp_path)
    assert set(found) == {"layers.0.w", "layers.1.w", "layers.2.w", "layers.0.b", "w"}
    for layer in range(3):
        name = f"layers.{layer}.w"
        assert found.shape(name) == (4, 5)
        assert torch.equal(found[name], full[layer])
        rows = torch.empty(10)
        found.read_values(name, 5, rows)
        assert torch.equal(rows, full[layer].reshape(-1)[5:15])
    assert torch.equal(found["layers.0.b"], one)


def test_a_stored_piece_of_other_strides_is_read(tmp_path, monkeypatch):
    turned = torch.arange(20.0).view(1, 5, 4).transpose(1, 2)
    monkeypatch.setattr("megatron_hypenet.checkpoint.shard_writer._data_of", lambda s: s.data)
    write_shards(tmp_path, [Shard.whole("layers.w", turned)])
    assert torch.equal(reader(tmp_path)["layers.0.w"], turned[0])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([Shard.whole("layers.w", torch.ones(2, 3))], "pieces of 2 layers"),
        (
            [
                Shard.whole("layers.w", torch.ones(1, 3)),
                Shard.whole("layers.0.w", torch.ones(3)),
            ],
            "is there twice",
        ),
        ([Shard.whole("layers.w", torch.tensor(1.0))], "no stack of layers"),
    ],
)
def test_what_is_no_stack_is_refused(tmp_path, shards, message):
    write_shards(tmp_path, shards)
    with pytest.raises(CheckpointError, match=message):
        reader(tmp_path)


def test_a_claim_of_layers_without_values_costs_nothing(tmp_path):
    huge = {"layers.w": StoredTensor((1 << 50, 0), torch.float32, ())}
    with pytest.raises(CheckpointError, match="no stack of layers"):
        unstacked(huge, tmp_path, "layers.")
