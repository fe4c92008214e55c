"""Rows of stored tensors in another order, from any place on, and back."""

import pytest
import torch

from megatron_hypenet.checkpoint.shard_writer import write_shards
from megatron_hypenet.checkpoint.shards import Shard, ShardReader
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export.row_blocks import Assembled, Block, inverted, streamed

A, B = torch.arange(12.0).view(4, 3), 100 + torch.arange(6.0).view(2, 3)
MIXED = Assembled(
    "mixed", (8, 3), (Block("a", 2, 2), Block("b", 0, 1), Block("a", 0, 2), Block("b", 1, 1))
    + (Block(None, 0, 2),),
)  # fmt: skip
WHOLE = torch.cat([A[2:], B[:1], A[:2], B[1:], torch.zeros(2, 3)])


@pytest.fixture
def reader(tmp_path):
    """Write "a" in two pieces of columns, "b" whole, "c" in another dtype."""
    shards = [
        Shard("a", A[:, :1], (4, 3), (0, 0)),
        Shard("a", A[:, 1:], (4, 3), (0, 1)),
        Shard.whole("b", B),
        Shard.whole("c", torch.tensor([1.0, 1e300], dtype=torch.float64)),
    ]
    write_shards(tmp_path, shards)
    return ShardReader(tmp_path)


def test_rows_are_put_together_from_any_row_on(reader):
    tensor = streamed(reader, MIXED, torch.float32, leading=(1,))
    assert tensor.shape == (1, 8, 3) and tensor.unit == 3
    assert torch.equal(tensor.whole()[0], WHOLE)
    for first in range(8):
        for count in range(1, 9 - first):
            part = torch.full((3 * count,), -1.0)
            tensor.read(3 * first, part)
            assert torch.equal(part.view(-1, 3), WHOLE[first : first + count])


def test_the_inverse_takes_the_sources_out_again(tmp_path):
    write_shards(tmp_path, [Shard.whole("mixed", WHOLE)])
    back = inverted([MIXED], {"a": (4, 3), "b": (2, 3)})
    found = {t.name: streamed(ShardReader(tmp_path), t, torch.float32).whole() for t in back}
    assert torch.equal(found["a"], A) and torch.equal(found["b"], B)


def test_values_are_cast_and_must_stay_finite(reader):
    half = streamed(reader, MIXED, torch.bfloat16).whole()
    assert torch.equal(half, WHOLE.bfloat16())
    with pytest.raises(ConversionError, match=r"c as torch.float32 has 1 of 2 values"):
        streamed(reader, Assembled("x", (2,), (Block("c", 0, 2),)), torch.float32).whole()


def test_sources_of_several_dtypes_need_a_choice(reader):
    both = Assembled("x", (4,), (Block("b", 0, 2), Block("c", 0, 2)))
    with pytest.raises(ConversionError, match="choose one with --dtype"):
        both.dtype(reader)
    assert MIXED.dtype(reader) == torch.float32
