"""AdamW on the fp32 master weights of DeepSpeed's BF16_Optimizer, with clipping and the copy to bf16 in the same pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.ops.adamw import AdamWStep, adamw

NORM_FLOOR = 1e-6
"""What DeepSpeed adds to the norm it divides by."""


class MasterAdamW(torch.optim.AdamW):
    """torch's fused AdamW until `take_over`: then it updates BF16_Optimizer's masters in one pass (`ops/adamw.py`), as that reads the
    gradients anyway and has the new weights in hand."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, fused=True)
        self._owner: Any = None

    def take_over(self, owner: Any) -> None:
        """`owner`, the BF16_Optimizer around this one, from now on leaves it to this one to scale gradients and to write bf16 weights.

        The step counter moves to the CPU, where reading it waits for nothing."""
        assert owner.optimizer is self and all(len(group["params"]) == 1 for group in self.param_groups), "one flat master per group"
        self._owner = owner
        for group in self.param_groups:
            group["fused"] = None
        for state in self.state.values():
            state["step"] = state["step"].cpu()
        measured: Callable[[], Any] = owner.get_grads_for_norm
        owner.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else measured()
        owner.update_lp_params = self._gather

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every group; `closure` as in torch, and None once this has taken over."""
        if self._owner is None:
            return super().step(closure)
        assert closure is None, "BF16_Optimizer has none"
        scale = self._scale()
        for group, narrow in zip(self.param_groups, self._own_parts(), strict=True):
            (weight,) = group["params"]
            state = self.state[weight]
            state["step"] += 1
            numbers = AdamWStep(
                int(state["step"]), float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"], scale=scale
            )
            adamw(weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], narrow, numbers)
        return None

    def _scale(self) -> float:
        """What takes gradients down to the largest norm allowed: 1 within it, or where there is none."""
        largest = float(self._owner.clip_grad)
        return min(largest / (float(self._owner._global_grad_norm) + NORM_FLOOR), 1.0) if largest > 0 else 1.0

    def _own_parts(self) -> list[Tensor]:
        """The bf16 weights that this data-parallel rank updates, one flat piece per group."""
        rank = dist.get_rank(self._owner.dp_process_group)
        return [parts[rank] for parts in self._owner.bf16_partitioned_groups]

    def _gather(self) -> None:
        """Give the other data-parallel ranks this one's new weights, and take theirs."""
        group = self._owner.dp_process_group
        if dist.get_world_size(group) > 1:
            for whole, own in zip(self._owner.bf16_groups_flat, self._own_parts(), strict=True):
                dist.all_gather_into_tensor(whole, own, group=group)
