"""The fp32 sums of bf16 gradients in DeepSpeed's BF16_Optimizer: reduced over the ranks without loss, and with fewer passes over memory.

Found with DeepSpeed 0.19.8, in bytes of memory traffic per weight: each micro-batch's gradient is copied to fp32 (6) and added to the sum
(12), the sums are set to zero twice between steps (8), and even a single rank takes them through bf16 and back for the reduction (20),
which rounds them. Here the first gradient of a step overwrites the sum (6), later ones are added as they are (10), and the sums of all
ranks are added in place, in fp32 unless the layout asks for bf16. The norm takes whole buffers where all of them count."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIECE = 2**27
"""Gradients in one collective: enough to use the links fully, few enough for a bf16 copy."""


class GradientSums:
    """Takes over how one BF16_Optimizer accumulates, clears and measures gradients.

    `optimizer.fp32_groups_has_gradients` stays the record of what this step's sums hold: one not marked there holds an earlier step's."""

    def __init__(self, optimizer: Any, *, whole_buffers: bool, exchange: torch.dtype = torch.float32) -> None:
        """`whole_buffers`: every gradient counts in this process's norm, as without tensor and pipeline parallelism; `exchange`: dtype in
        which sums travel between data-parallel ranks."""
        self.optimizer, self.whole_buffers, self.exchange = optimizer, whole_buffers, exchange
        self._norm = optimizer.get_grads_for_norm
        optimizer._update_hp_grad = self._accumulate
        optimizer.clear_hp_grads = self.forget
        optimizer.get_grads_for_reduction = self._for_reduction
        optimizer.get_grads_for_norm = self._for_norm
        # the hooks that call these are bound to the optimizer and look them up by name
        assert isinstance(optimizer.accumulate_hp_grads_and_remove_lp, types.MethodType)

    @property
    def empty(self) -> bool:
        """Whether no micro-batch of this step has left a gradient yet."""
        return not any(any(group) for group in self.optimizer.fp32_groups_has_gradients)

    @property
    def marks(self) -> list[list[bool]]:
        """Which sums hold gradients of this step, by group and parameter; a copy."""
        return [list(group) for group in self.optimizer.fp32_groups_has_gradients]

    def set_marks(self, marks: list[list[bool]]) -> None:
        """Say which sums hold gradients of this step: for what ran where Python did not."""
        self.optimizer.fp32_groups_has_gradients = [list(group) for group in marks]

    def norms(self) -> list[Tensor]:
        """Of every parameter's sum, 0-dimensional, fp32."""
        return [total.norm() for sums in self.optimizer.fp32_groups_gradients for total in sums]

    def forget(self) -> None:
        """Begin a step: the next gradient of each parameter overwrites its sum."""
        self.set_marks([[False] * len(group) for group in self.optimizer.fp32_groups_has_gradients])

    @torch.no_grad()
    def _accumulate(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool = False) -> None:
        if parameter.grad is None:
            return
        total: Tensor = self.optimizer.fp32_groups_gradients[group][index]
        gradient, marked = parameter.grad.reshape(-1), self.optimizer.fp32_groups_has_gradients[group]
        if marked[index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        marked[index] = True
        parameter._hp_grad = total  # type: ignore[attr-defined] # where DeepSpeed itself looks for it
        if clear_lp_grads:
            parameter.grad.zero_()

    @torch.no_grad()
    def _for_reduction(self) -> Any:
        """DeepSpeed asks what it shall average over the data-parallel ranks: nothing, once it is done here."""
        optimizer, group = self.optimizer, self.optimizer.dp_process_group
        for sums, marked in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
            for total, holds in zip(sums, marked, strict=True):
                if not holds:  # a parameter that got no gradient here may have got one on another rank
                    total.zero_()
        ranks = dist.get_world_size(group)
        for flat in optimizer.fp32_groups_gradients_flat if ranks > 1 else ():
            for piece in flat.split(PIECE):
                travelling = piece.to(self.exchange)  # the piece itself in fp32
                dist.all_reduce(travelling, group=group)
                if travelling is not piece:
                    piece.copy_(travelling)
                piece.mul_(1 / ranks)
        return [], {}

    def _for_norm(self, for_clipping: bool = False) -> Any:
        if not self.whole_buffers:
            return self._norm(for_clipping)
        flat = self.optimizer.fp32_groups_actual_gradients_flat
        return flat if for_clipping else (flat, {})
