"""The step of DeepSpeed's BF16_Optimizer on its fp32 master weights: clipping, AdamW and the copy
to bf16 in one pass over memory.

The host waits for nothing before the device has the whole step. Scale and refusal of a bad gradient
norm are decided on the device; the host learns of both from the norm, which arrives while the
update runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.engine.async_scalar import AsyncScalar
from megatron_hypenet.ops.adamw import AdamWStep, adamw

NORM_FLOOR = 1e-6
"""The constant that DeepSpeed adds to the norm before dividing by it."""


class FusedAdamWStep:
    """Takes the place of `owner.step`, where `owner` is a BF16_Optimizer around torch's AdamW.

    DeepSpeed's scaling, update and copy are three passes over gradients or weights; `ops/adamw`
    does them in one."""

    def __init__(self, owner: Any, norm: Callable[[], Tensor]) -> None:
        """Replace the step of `owner`. `norm` returns the norm of this step's gradients over all
        ranks, 0-dimensional, fp32, on their device. Adam's step counters are moved to the CPU,
        where reading them does not wait for the device."""
        self._owner = owner
        self._norm = norm
        assert all(len(group["params"]) == 1 for group in owner.optimizer.param_groups), (
            "one flat master per group"
        )
        for group in owner.optimizer.param_groups:
            group["fused"] = None
        for state in owner.optimizer.state.values():
            state["step"] = state["step"].cpu()
        owner.step = self.step

    @torch.no_grad()
    def step(self) -> None:
        """Update every group, or none where the norm is not finite; `overflow` and
        `_global_grad_norm` are set as by DeepSpeed's own step."""
        owner = self._owner
        norm = self._norm()
        arriving = AsyncScalar(norm)
        scale = self._scale(norm)
        states = []
        for group, gradient, compute_weight in zip(
            owner.optimizer.param_groups,
            owner.fp32_groups_gradient_flat_partition,
            self._own_parts(),
            strict=True,
        ):
            (weight,) = group["params"]
            state = owner.optimizer.state[weight]
            states.append(state)
            count = int(state["step"]) + 1
            numbers = AdamWStep(
                count,
                float(group["lr"]),
                tuple(group["betas"]),
                group["eps"],
                group["weight_decay"],
            )
            adamw(
                weight,
                gradient,
                state["exp_avg"],
                state["exp_avg_sq"],
                compute_weight,
                numbers,
                scale,
            )
        self._gather()
        owner.clear_hp_grads()
        owner._global_grad_norm = arriving.value()
        owner.overflow = not math.isfinite(owner._global_grad_norm)
        if not owner.overflow:
            for state in states:
                state["step"] += 1

    def _scale(self, norm: Tensor) -> Tensor:
        """Return the factor that clips gradients to the largest allowed norm: 1 below it or without
        a limit, NaN where the norm is not finite."""
        largest = float(self._owner.clip_grad)
        fitting = (
            (largest / (norm + NORM_FLOOR)).clamp(max=1.0) if largest > 0 else torch.ones_like(norm)
        )
        return fitting + norm * 0

    def _own_parts(self) -> list[Tensor]:
        """Return the bf16 weights that this data-parallel rank updates, one flat piece per
        group."""
        rank = dist.get_rank(self._owner.dp_process_group)
        return [parts[rank] for parts in self._owner.bf16_partitioned_groups]

    def _gather(self) -> None:
        """Exchange the new weights with the other data-parallel ranks."""
        group = self._owner.dp_process_group
        if dist.get_world_size(group) > 1:
            for whole, own in zip(self._owner.bf16_groups_flat, self._own_parts(), strict=True):
                dist.all_gather_into_tensor(whole, own, group=group)
