"""Weights, gradients and optimizer state inside DeepSpeed's optimizers, by parameter: one class per
kind of optimizer, chosen once.

The fields used here are listed and checked in `private_fields.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_hypenet.engine.deepspeed import private_fields
from megatron_hypenet.engine.deepspeed.bf16_accumulation import Fp32GradAccumulator
from megatron_hypenet.engine.deepspeed.bf16_step import FusedAdamWStep
from megatron_hypenet.errors import SetupError

MASTER = "fp32_param"
"""The name of the fp32 master weight among a parameter's optimizer states."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_REPLICATED = "ds_pipe_replicated"


def mark_replicated(parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that another pipeline stage counts this parameter's gradient in the norm."""
    setattr(parameter, _REPLICATED, True)


def is_replicated(parameter: nn.Parameter) -> bool:
    """Return whether `mark_replicated` was called."""
    return getattr(parameter, _REPLICATED, False)


class OptimizerAccess:
    """Access that is the same for all of DeepSpeed's optimizers around AdamW."""

    kind: ClassVar[str]
    """Key of `private_fields.PRIVATE_FIELDS`."""

    def __init__(self, optimizer: Any, deepspeed: Any) -> None:
        self.optimizer = optimizer
        self.deepspeed = deepspeed

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return this process's sum of gradients; None where no micro-batch has left one."""
        return parameter.grad

    def accumulate_in_fp32(
        self, counts: Callable[[nn.Parameter], bool], exchange: torch.dtype
    ) -> Fp32GradAccumulator | None:
        """Take over how gradients are summed, measured and applied, where DeepSpeed's own way
        rounds them; arguments as of Fp32GradAccumulator. None where its way is kept."""
        return None

    def drop_gradients(self) -> None:
        """Clear the gradients of a refused update, where DeepSpeed does not."""

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def gradient_norm(self) -> float:
        """Return the norm before clipping of the current step."""
        return float(self.optimizer._global_grad_norm)

    @property
    def overflow(self) -> bool:
        """Return whether the last step was refused."""
        return bool(self.optimizer.overflow)

    def flat_parameters(self) -> list[Tensor]:
        """Return the tensors that AdamW updates."""
        return [
            parameter
            for group in self.optimizer.optimizer.param_groups
            for parameter in group["params"]
        ]

    def gathered(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `parameter` holds its full local value."""
        return contextlib.nullcontext()

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite the weight the forward pass uses."""
        parameter.data.copy_(value)

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return fp32_param, exp_avg or exp_avg_sq of one parameter, full local shape; collective
        over the data-parallel group."""
        utils = self.deepspeed.utils
        full = (
            utils.safe_get_full_fp32_param(parameter)
            if name == MASTER
            else utils.safe_get_full_optimizer_state(parameter, name)
        )
        assert full is not None, "DeepSpeed holds no optimizer state for a trained parameter"
        return full

    def set_full_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Write this rank's part of one state from the full local value."""
        utils = self.deepspeed.utils
        if name == MASTER:
            utils.safe_set_full_fp32_param(parameter, value.float())
        else:
            utils.safe_set_full_optimizer_state(parameter, value.float(), name)

    def init_adam(self, adam_step: int) -> None:
        """Create Adam's moments (zeros) where they are missing, and set its step counters."""
        adam = self.optimizer.optimizer
        fused = any(group.get("fused") for group in adam.param_groups)
        for flat in self.flat_parameters():
            state = adam.state[flat]
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(flat.data)
            state["step"] = torch.tensor(
                float(adam_step), dtype=torch.float32, device=flat.device if fused else "cpu"
            )
        self.link_states()

    def link_states(self) -> None:
        """Make the new state reachable by parameter."""

    def adam_step(self) -> int:
        """Return Adam's step counter, 0 before the first step."""
        return int(self.optimizer.optimizer.state[self.flat_parameters()[0]].get("step", 0))


class Bf16Access(OptimizerAccess):
    """BF16_Optimizer: bf16 weights, fp32 sums and masters, sharded over the data-parallel ranks."""

    kind = private_fields.BF16

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the fp32 sum."""
        return getattr(parameter, "_hp_grad", None)

    def accumulate_in_fp32(
        self, counts: Callable[[nn.Parameter], bool], exchange: torch.dtype
    ) -> Fp32GradAccumulator | None:
        """Accumulate gradients in fp32, with clipping, AdamW and the copy to bf16 in one pass over
        memory."""
        sums = Fp32GradAccumulator(self.optimizer, counts=counts, exchange=exchange)
        FusedAdamWStep(self.optimizer, sums.norm)
        return sums

    def link_states(self) -> None:
        """Link the states at once; DeepSpeed by itself does so after the first step only."""
        self.optimizer._lazy_init_hp_params_optimizer_state()


class Zero12Access(OptimizerAccess):
    """DeepSpeedZeroOptimizer: ZeRO stages 1 and 2."""

    kind = private_fields.ZERO_1_2

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the sum in the dtype that gradients accumulate in."""
        if self.optimizer.use_grad_accum_attribute:
            return getattr(parameter, "grad_accum", None)
        return parameter.grad

    def drop_gradients(self) -> None:
        """Clear them from the buffers of an optimizer on the CPU, where they would corrupt all
        later ones."""
        if self.optimizer.cpu_offload:
            self.optimizer._release_preflattened_grad_buffers()
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None

    def link_states(self) -> None:
        """Link the states at once; DeepSpeed by itself does so after the first step only."""
        self.optimizer._lazy_init_hp_params_optimizer_state()


class Zero3Access(OptimizerAccess):
    """DeepSpeedZeroOptimizer_Stage3: ZeRO stage 3, where weights are sharded too."""

    kind = private_fields.ZERO_3

    def flat_parameters(self) -> list[Tensor]:
        """Return the flat fp32 partitions."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @contextmanager
    def gathered(self, parameter: nn.Parameter) -> Iterator[None]:
        """Gather `parameter` from all ranks inside the block."""
        with self.deepspeed.zero.GatheredParameters([parameter]):
            yield

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite it on the first rank, which gives the others their parts."""
        with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def set_full_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Write the local part itself: `safe_set_full_*` fails when a parameter's size is no
        multiple of the group."""
        optimizer: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
        key = None if name == MASTER else name
        part, _ = optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = part.numel() * optimizer._get_param_partition_rank(parameter)
        # the last part is padded beyond the parameter's end
        own = value.float().flatten()[start : start + part.numel()]
        part.data.view(-1)[: own.numel()].copy_(own)


KINDS: tuple[type[OptimizerAccess], ...] = (Bf16Access, Zero12Access, Zero3Access)


def optimizer_access(optimizer: Any, deepspeed: Any) -> OptimizerAccess:
    """Return the access to an optimizer that `deepspeed.initialize` has made; SetupError for a kind
    that no layout asks for."""
    for kind in KINDS:
        if isinstance(optimizer, private_fields.owner_class(kind.kind)):
            return kind(optimizer, deepspeed)
    raise SetupError(
        f"deepspeed {deepspeed.__version__} made a {type(optimizer).__name__}, which training does "
        f"not know; it was written for {', '.join(private_fields.SEEN_IN)}"
    )
