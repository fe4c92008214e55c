"""Cheap results that are dropped once their one reader has run, and made again from their input in
backward.

Does what Megatron's `CheckpointWithoutOutput` promises. Megatron's own asks Transformer Engine for
its FP8 state (0.16) or compiles C++ at run time (0.17 and later), and saves random-number states,
which nothing here draws from."""

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
    """One result of one forward pass: made by `checkpoint`, read by one consumer, then dropped.

    Where no input needs a gradient nothing is dropped. Needs `Tensor.backward`;
    `torch.autograd.grad` raises RuntimeError."""

    def __init__(self) -> None:
        self._made_by: Any = None
        self._output: Tensor | None = None

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, of which only the inputs are kept. The result must be a tensor with
        a storage of its own."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            return function(*inputs)
        self._output = output = _Dropped.apply(function, *inputs)
        self._made_by = output.grad_fn
        return output

    def discard_output_and_register_recompute(self, consumed: Tensor) -> None:
        """Free the result's memory; once the gradient of `consumed`, which the consumer made of it,
        is known, it is filled again."""
        if self._output is not None:
            self._output.untyped_storage().resize_(0)
            consumed.register_hook(self._fill)

    def _fill(self, _: Tensor) -> None:
        """Runs in backward, before that of the consumer."""
        if self._output is None:
            return
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "results that are made again in backward need .backward(): "
                "torch.autograd.grad() cannot be used"
            )
        self._made_by.again = _again(self._made_by)
        _restore(self._output, self._made_by.again[0])
        self._output = self._made_by = None


def _restore(dropped: Tensor, made: Tensor) -> None:
    """Let everything that shares the dropped tensor's storage see the numbers of `made`.

    A consumer that kept the tensor itself gets the other storage for nothing; views that it may
    have kept instead (as behind hooks of ZeRO-3, or Megatron's copy to tensor-parallel ranks) have
    to find the numbers in the old one."""
    if _references(dropped) == _references(torch.empty(0)):
        dropped.data = made.detach()
    else:
        storage = dropped.untyped_storage()
        storage.resize_(made.untyped_storage().size())
        storage.copy_(made.untyped_storage())


def _references(x: Tensor) -> int:
    """How many tensors share x's storage, and what Python adds to that."""
    storage = x.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


class _Dropped(torch.autograd.Function):
    """Keeps the inputs; backward goes through the graph of the second time."""

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
    """The function's result on its inputs cut off from the graph, and these inputs."""
    inputs = [
        x.detach().requires_grad_(needed)
        for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
    ]
    with torch.enable_grad():
        return ctx.function(*inputs), inputs
