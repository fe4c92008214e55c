"""Micro-batches through the stages of a pipeline, by Megatron-core's schedules: 1F1B for training,
forward only for evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor


def run_pipeline(
    model: Any,
    num_micro_batches: int,
    *,
    seq_length: int,
    micro_batch_size: int,
    step: Callable[[int], Tensor],
    finish: Callable[[int, Tensor], Tensor | None],
    train: bool,
) -> None:
    """Send micro-batches 0 .. num_micro_batches - 1 of [micro_batch_size, seq_length] tokens
    through a pipeline of at least two stages.

    `step(i)` runs this rank's layers of `model` on micro-batch i (whose input Megatron has handed
    over through `set_input_tensor`) and returns what the next stage takes. On the last stage
    `finish(i, output)` is called with the result. With `train` it returns the loss of the
    micro-batch, a scalar, and gradients of the mean over micro-batches accumulate in the
    parameters; without, nothing is differentiated and its value is ignored. `seq_length` is that of
    whole sequences, before context parallelism."""
    order = iter(range(num_micro_batches))

    def forward_step(
        _data: Any, _model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]]:
        index = next(order)
        output = step(index)

        def loss_of(last_output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss = finish(index, last_output)
            one = torch.ones((), dtype=torch.int, device=last_output.device)
            # Three results with a token count of 1 make Megatron divide by the number of
            # micro-batches and do nothing else; with two it multiplies the loss by the
            # context-parallel size. It divides in place, so it gets a copy.
            return last_output.new_zeros(()) if loss is None else loss.clone(), one, {}

        return output, loss_of

    with torch.set_grad_enabled(train):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=num_micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=not train,
        )
