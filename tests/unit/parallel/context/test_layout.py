import pytest
import torch

from megatron_hypenet.parallel.context.layout import (
    check_document_ids,
    chunk_tokens,
    chunks_of,
    gather_sequence,
    local_chunk_tokens,
    local_part,
    local_positions,
    natural_order,
    split_sequence,
)
from tests.threaded_ranks import on_ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_ranks_chunks_are_all_chunks_and_cost_the_same(size):
    held = [chunks_of(rank, size) for rank in range(size)]
    assert sorted(chunk for pair in held for chunk in pair) == list(range(2 * size))
    assert {sum(pair) for pair in held} == {2 * size - 1}


def test_local_parts_are_an_early_and_a_late_chunk():
    x = torch.arange(12)
    assert local_part(x, 0, 3, 0).tolist() == [0, 1, 10, 11]
    assert local_part(x, 2, 3, 0).tolist() == [4, 5, 6, 7]
    assert torch.equal(natural_order([local_part(x, rank, 3, 0) for rank in range(3)], 0), x)
    assert local_part(x, 0, 1, 0) is x


def test_positions_and_parts_agree_on_every_rank():
    x = torch.arange(32).view(2, 16) * 10

    def one_rank(group):
        mine = split_sequence(x, group, 1)
        assert torch.equal(mine, x[:, local_positions(4, group)])
        return gather_sequence(mine, group, -1)

    for whole in on_ranks(4, one_rank):
        assert torch.equal(whole, x)


def test_the_gradient_of_a_gathered_sequence_sums_over_the_losses_of_all_ranks():
    def one_rank(group):
        mine = torch.ones(4, 2, requires_grad=True)
        (gather_sequence(mine, group, 0) * (group.rank() + 1)).sum().backward()
        return mine.grad

    for grad in on_ranks(2, one_rank):
        assert torch.equal(grad, torch.full((4, 2), 3.0))


@pytest.mark.parametrize(
    ("length", "fits"), [(20, "16 or 32"), (31, "16 or 32"), (3, "example 16"), (0, "example 16")]
)
def test_lengths_that_do_not_split_are_refused_with_lengths_that_do(length, fits):
    with pytest.raises(
        ValueError,
        match=rf"{length} tokens .* 8 context-parallel ranks.*multiple of 2 \* 8.*{fits}",
    ):
        chunk_tokens(length, 8)


def test_odd_local_lengths_and_foreign_document_ids_are_refused():
    with pytest.raises(ValueError, match="7 local tokens on one of 2"):
        local_chunk_tokens(7, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected \(2, 16\)"):
        check_document_ids(torch.zeros(2, 8), 2, 16)
    check_document_ids(None, 2, 16)
    check_document_ids(torch.zeros(2, 16), 2, 16)
