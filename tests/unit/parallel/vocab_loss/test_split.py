"""The exchange of a vocabulary over threads as ranks; gradients over real processes are in
tests/distributed/test_tensor_parallel.py."""

import torch

from megatron_hypenet.parallel.vocab_loss.split import VocabSplit
from tests.threaded_ranks import on_ranks


def test_one_rank_has_everything():
    split = VocabSplit(None, True)
    x = torch.randn(4, 3)
    assert split.size == split.token_parts == 1
    assert split.gather_tokens(x) is x and split.reduce_tokens(x) is x
    assert torch.equal(split.gather_numbers(x), x[None])
    assert split.local_labels(torch.tensor([[3, 1]]), 9).tolist() == [3, 1]


def test_ranks_gather_tokens_and_numbers_in_order_and_reduce_gradients():
    whole = torch.arange(24.0).view(8, 3)

    def rank(group):
        split = VocabSplit(group, True)
        mine = whole.chunk(2)[group.rank()]
        return (
            split.gather_tokens(mine),
            split.reduce_tokens(whole * (group.rank() + 1)),
            split.gather_numbers(mine.contiguous()),
            split.local_labels(torch.tensor([0, 5]), 4),
        )

    for number, (tokens, gradient, numbers, labels) in enumerate(on_ranks(2, rank)):
        assert torch.equal(tokens, whole)
        assert torch.equal(gradient, 3 * whole.chunk(2)[number])
        assert torch.equal(numbers, torch.stack(whole.chunk(2)))
        assert labels.tolist() == [-4 * number, 5 - 4 * number]
