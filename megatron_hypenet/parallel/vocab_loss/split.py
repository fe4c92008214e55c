"""How the vocabulary, and with sequence parallelism the tokens, are split over a tensor-parallel
group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class VocabSplit:
    """The exchange between the ranks that hold parts of the vocabulary (group None: one rank holds
    it all)."""

    def __init__(self, group: dist.ProcessGroup | None, sequence_parallel: bool) -> None:
        self.group = group
        self.size = group.size() if group is not None else 1
        self.token_parts = self.size if sequence_parallel else 1

    def local_labels(self, labels: Tensor, vocab_rows: int) -> Tensor:
        """Return the labels as [n], counted from this rank's first of `vocab_rows` head rows."""
        return labels.reshape(-1) - (
            self.group.rank() * vocab_rows if self.group is not None else 0
        )

    def gather_tokens(self, part: Tensor) -> Tensor:
        """Gather this rank's tokens [n / parts, h] -> the tokens of all ranks [n, h]; the same
        tensor when tokens are not split."""
        if self.token_parts == 1:
            return part
        whole = part.new_empty(part.shape[0] * self.token_parts, part.shape[1])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)
        return whole

    def reduce_tokens(self, grad: Tensor) -> Tensor:
        """Sum the gradients [n, h] that each vocabulary shard gives; with split tokens keep this
        rank's part [n / parts, h]."""
        if self.size == 1:
            return grad
        if self.token_parts == 1:
            dist.all_reduce(grad, group=self.group)
            return grad
        mine = grad.new_empty(grad.shape[0] // self.token_parts, grad.shape[1])
        dist.reduce_scatter_tensor(mine, grad, group=self.group)
        return mine

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """Gather numbers of this rank's part of the vocabulary, contiguous [m, n], from all ranks
        -> [ranks, m, n]."""
        if self.size == 1:
            return numbers[None]
        gathered = numbers.new_empty(self.size, *numbers.shape)
        dist.all_gather_into_tensor(gathered.view(-1), numbers.view(-1), group=self.group)
        return gathered
