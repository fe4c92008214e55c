"""Micro-batches through the stages of a pipeline, by Megatron-core's schedules: 1F1B for training,
interleaved where a stage holds several chunks of layers, forward only for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device


def run_pipeline(
    chunks: Sequence[Any],
    num_micro_batches: int,
    *,
    seq_length: int,
    micro_batch_size: int,
    step: Callable[[int, int], Tensor],
    finish: Callable[[int, Tensor], Tensor | None],
    train: bool,
) -> None:
    """Send micro-batches 0 .. num_micro_batches - 1 of [micro_batch_size, seq_length] tokens
    through a pipeline of at least two stages, of which this rank holds the `chunks` of a model.

    `step(i, c)` runs chunk c of this rank on micro-batch i (whose input Megatron has handed over
    through `set_input_tensor`) and returns what the next chunk takes. On the last stage, behind its
    last chunk, `finish(i, output)` is called with the result. With `train` it returns the loss of
    the micro-batch, a scalar, and gradients of the mean over micro-batches accumulate in the
    parameters; without, nothing is differentiated and its value is ignored. `seq_length` is that of
    whole sequences, before context parallelism.

    The interleaved schedule takes micro-batches in multiples of the stages; what is missing is
    filled with zeros, which pass by `step` and `finish`."""
    total = num_micro_batches
    if len(chunks) > 1:
        total += -total % groups.pipeline_stage()[1]

    def forward_step(
        micro_batches: Iterator[int], chunk: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]]:
        index = next(micro_batches)
        missing = index >= num_micro_batches
        output = (
            _passed_on(chunk, seq_length, micro_batch_size)
            if missing
            else step(index, chunk.vp_stage or 0)
        )

        def loss_of(last_output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss = last_output.sum() if missing else finish(index, last_output)
            one = torch.ones((), dtype=torch.int, device=last_output.device)
            # Three results with a token count of 1 make Megatron divide by the number of
            # micro-batches and do nothing else; with two it multiplies the loss by the
            # context-parallel size. It divides in place, so it gets a copy.
            if loss is None:
                loss = last_output.new_zeros(())
            elif total > num_micro_batches:
                loss = loss * (total / num_micro_batches)
            else:
                loss = loss.clone()
            return loss, one, {}

        return output, loss_of

    with torch.set_grad_enabled(train):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(range(total)) for _ in chunks],
            model=list(chunks),
            num_microbatches=total,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=not train,
        )


def _passed_on(chunk: Any, seq_length: int, micro_batch_size: int) -> Tensor:
    """Return what a micro-batch that is not there gives the next chunk: its input, or zeros where
    the model begins."""
    if not chunk.pre_process:
        return chunk.input_tensor.clone()
    config = chunk.config
    ranks = groups.context_group().size()
    if config.sequence_parallel:
        ranks *= groups.tensor_group().size()
    shape = (seq_length // ranks, micro_batch_size, config.hidden_size)
    return torch.zeros(shape, dtype=config.pipeline_dtype, device=device())
