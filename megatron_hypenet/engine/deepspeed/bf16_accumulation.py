"""The fp32 sums of bf16 gradients in DeepSpeed's BF16_Optimizer: reduced over the ranks without
loss, and with fewer passes over memory.

DeepSpeed 0.19.8 does the following, in bytes of memory traffic per weight: each micro-batch's
gradient is copied to fp32 (6) and added to the sum (12), the sums are set to zero twice between
steps (8), and even a single rank takes them through bf16 and back for the reduction (20), which
rounds them. Here the first gradient of a step overwrites the sum (6), later ones are added as they
are (10), and the ranks' sums are reduced in place, in fp32 unless the layout asks for bf16.

Every data-parallel rank updates its own part of the weights (ZeRO-1), so the sums are scattered
while they are reduced: half of what an all-reduce sends. Afterwards a rank's own part of its buffer
is valid and the rest is not; the norm sums over the ranks' parts."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hypenet.ops.gradient_sum import gradient_sum

PIECE = 2**24
"""Number of gradients of each rank in one collective of bf16 copies: enough to use the links fully,
with a small copy."""


class Fp32GradAccumulator:
    """Takes over how one BF16_Optimizer accumulates, clears and measures gradients.

    `optimizer.fp32_groups_has_gradients` still records which sums hold gradients of this step; a
    sum that is not marked there holds those of an earlier step."""

    def __init__(
        self,
        optimizer: Any,
        *,
        counts: Callable[[nn.Parameter], bool],
        exchange: torch.dtype = torch.float32,
    ) -> None:
        """Take over `optimizer`. `counts` says whether a parameter's gradient counts in the norm on
        this process, and not on another one that holds the same weights; `exchange` is the dtype in
        which sums are sent between data-parallel ranks."""
        self.optimizer = optimizer
        self.exchange = exchange
        self._counted = _counted(optimizer, counts)
        optimizer._update_hp_grad = self._accumulate
        optimizer.clear_hp_grads = self.forget
        optimizer.get_grads_for_reduction = self._for_reduction
        # the hooks that call these are bound to the optimizer and look them up by name
        assert isinstance(optimizer.accumulate_hp_grads_and_remove_lp, types.MethodType)

    @property
    def empty(self) -> bool:
        """Return whether no micro-batch of this step has left a gradient yet."""
        return not any(any(group) for group in self.optimizer.fp32_groups_has_gradients)

    @property
    def marks(self) -> list[list[bool]]:
        """Return which sums hold gradients of this step, by group and parameter; a copy."""
        return [list(group) for group in self.optimizer.fp32_groups_has_gradients]

    def set_marks(self, marks: list[list[bool]]) -> None:
        """Set which sums hold gradients of this step, after a CUDA graph has run without Python."""
        self.optimizer.fp32_groups_has_gradients = [list(group) for group in marks]

    def norms(self) -> list[Tensor]:
        """Return the norm of every parameter's sum, 0-dimensional, fp32."""
        return [total.norm() for sums in self.optimizer.fp32_groups_gradients for total in sums]

    def forget(self) -> None:
        """Begin a step: the next gradient of each parameter overwrites its sum."""
        self.set_marks([[False] * len(group) for group in self.optimizer.fp32_groups_has_gradients])

    @torch.no_grad()
    def _accumulate(
        self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool = False
    ) -> None:
        if parameter.grad is None:
            return
        total: Tensor = self.optimizer.fp32_groups_gradients[group][index]
        gradient = parameter.grad.reshape(-1)
        marked = self.optimizer.fp32_groups_has_gradients[group]
        gradient_sum(total, gradient, add=marked[index])
        marked[index] = True
        parameter._hp_grad = total  # type: ignore[attr-defined] # where DeepSpeed itself looks for it
        if clear_lp_grads:
            parameter.grad.zero_()

    @torch.no_grad()
    def _for_reduction(self) -> Any:
        """Reduce the gradients here; returns nothing for DeepSpeed to average over the
        data-parallel ranks."""
        optimizer = self.optimizer
        group = self.optimizer.dp_process_group
        for sums, marked in zip(
            optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
        ):
            for total, holds in zip(sums, marked, strict=True):
                # a parameter that got no gradient here may have got one on another rank
                if not holds:
                    total.zero_()
        if (ranks := dist.get_world_size(group)) > 1:
            for whole, own in zip(
                optimizer.fp32_groups_gradients_flat,
                optimizer.fp32_groups_gradient_flat_partition,
                strict=True,
            ):
                self._scatter(whole, own, group)
                own.mul_(1 / ranks)
        return [], {}

    def _scatter(self, whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
        """Sum `whole` over the ranks into `own`, this rank's part of it."""
        if self.exchange == whole.dtype:
            dist.reduce_scatter_tensor(own, whole, group=group)
            return
        parts = whole.view(dist.get_world_size(group), -1)
        for start in range(0, parts.shape[1], PIECE):
            sent = parts[:, start : start + PIECE].to(self.exchange)
            received = sent.new_empty(sent.shape[1])
            dist.reduce_scatter_tensor(received, sent.flatten(), group=group)
            own[start : start + PIECE] = received

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the norm of the gradients of all ranks, after they are reduced: 0-dimensional,
        fp32, on their device. Collective."""
        own = self.optimizer.fp32_groups_gradient_flat_partition
        square = torch.zeros((), dtype=torch.float32, device=own[0].device)
        for group, start, stop in self._counted:
            square += own[group][start:stop].norm().square()
        for ranks in (
            self.optimizer.dp_process_group,
            self.optimizer.mpu.get_model_parallel_group(),
        ):
            if dist.get_world_size(ranks) > 1:
                dist.all_reduce(square, group=ranks)
        return square.sqrt()


def _counted(optimizer: Any, counts: Callable[[nn.Parameter], bool]) -> list[tuple[int, int, int]]:
    """Return the slices (group, start, stop) of this rank's parts that count in the norm, as few as
    possible."""
    found: list[tuple[int, int, int]] = []
    for group, (parameters, own) in enumerate(
        zip(optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True)
    ):
        first = own.storage_offset()
        begin = 0
        for parameter in parameters:
            start = max(begin - first, 0)
            stop = min(begin + parameter.numel() - first, own.numel())
            begin += parameter.numel()
            if start >= stop or not counts(parameter):
                continue
            if found and found[-1][0] == group and found[-1][2] == start:
                start = found.pop()[1]
            found.append((group, start, stop))
    return found
