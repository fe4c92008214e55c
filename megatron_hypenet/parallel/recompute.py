"""Cheap results that are freed once their only consumer has run, and recomputed from their input in
backward.

Replaces Megatron's `CheckpointWithoutOutput`, which asks Transformer Engine for its FP8 state
(0.16) or compiles C++ at run time (0.17 and later), and saves random-number states, which nothing
here uses."""

from collections.abc import Callable
from typing import Any

import megatron.core.tensor_parallel as megatron_tensor_parallel
import torch
from torch import Tensor


def use_in_megatron() -> None:
    """Let Megatron's layers drop their norms' outputs with `DropOutput` where their configuration
    recomputes "layernorm"."""
    megatron_tensor_parallel.CheckpointWithoutOutput = DropOutput


class DropOutput:
    """One result of one forward pass: computed by `checkpoint`, read by one consumer, then freed.
    Nothing is freed where no input needs a gradient. Needs `Tensor.backward`; `torch.autograd.grad`
    raises RuntimeError."""

    def __init__(self) -> None:
        self._made_by: Any = None
        self._output: Tensor | None = None

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`, of which only the inputs are kept. The result must be a
        tensor with a storage of its own."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            return function(*inputs)
        self._output = output = _Dropped.apply(function, *inputs)
        self._made_by = output.grad_fn
        return output

    def discard_output_and_register_recompute(self, consumed: Tensor) -> None:
        """Free the result's memory; it is filled again once the gradient of `consumed`, the
        consumer's output, is known."""
        if self._output is not None:
            self._output.untyped_storage().resize_(0)
            consumed.register_hook(self._fill)

    def _fill(self, _: Tensor) -> None:
        """Recompute in backward, before the consumer's own backward runs."""
        if self._output is None:
            return
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "results that are recomputed in backward need .backward(): "
                "torch.autograd.grad() cannot be used"
            )
        self._made_by.again = _again(self._made_by)
        _restore(self._output, self._made_by.again[0])
        self._output = self._made_by = None


def _restore(dropped: Tensor, made: Tensor) -> None:
    """Let everything that shares the freed tensor's storage see the values of `made`. A consumer
    that kept the tensor itself gets the other storage without a copy; views that it may have kept
    instead (as behind hooks of ZeRO-3, or Megatron's copy to tensor-parallel ranks) need the values
    in the old one."""
    if _references(dropped) == _references(torch.empty(0)):
        dropped.data = made.detach()
    else:
        storage = dropped.untyped_storage()
        storage.resize_(made.untyped_storage().size())
        storage.copy_(made.untyped_storage())


def _references(x: Tensor) -> int:
    """Return the number of references to x's storage, including those that Python itself holds."""
    storage = x.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


class _Dropped(torch.autograd.Function):
    """Keeps the inputs; backward goes through the graph of the recomputation."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function = function
        ctx.again = None
        with torch.no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        output, inputs = ctx.again or _again(ctx)
        ctx.again = None
        torch.autograd.backward(output, grad)
        return None, *(x.grad for x in inputs)


def _again(ctx: Any) -> tuple[Tensor, list[Tensor]]:
    """Recompute the function on its inputs, detached from the graph; returns the result and these
    inputs."""
    inputs = [
        x.detach().requires_grad_(needed)
        for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
    ]
    with torch.enable_grad():
        return ctx.function(*inputs), inputs
