"""What Megatron's schedules get from us. The schedules themselves run in
tests/distributed/test_parity.py."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.specs import transformer_config
from megatron_hypenet.parallel import pipeline
from tests.tiny import tiny_model_config

SIZES = {"seq_length": 8, "micro_batch_size": 1}


class Chunk(SimpleNamespace):
    """A chunk of a pipeline stage, as the schedules see it."""

    pre_process = False
    config = SimpleNamespace(sequence_parallel=False, hidden_size=2, pipeline_dtype=torch.float32)


@pytest.fixture
def schedule(monkeypatch):
    """Put a schedule in Megatron's place that runs every micro-batch through every chunk of this
    stage, the last one; returns what it was called with."""
    seen = {}

    def run(*, forward_step_func, data_iterator, model, num_microbatches, **sizes):
        seen.update(sizes, count=num_microbatches, grad=torch.is_grad_enabled())
        for _ in range(num_microbatches):
            for chunk, micro_batches in zip(model, data_iterator, strict=True):
                output, loss_of = forward_step_func(micro_batches, chunk)
            loss, count, _ = loss_of(output)
            loss /= torch.clamp(count, min=1)  # as Megatron does on the last stage
            loss /= num_microbatches
            if torch.is_grad_enabled():
                loss.backward()

    monkeypatch.setattr(pipeline, "get_forward_backward_func", lambda: run)
    return seen


def test_the_last_stage_answers_with_a_loss_that_may_be_divided_in_place(schedule):
    weight = torch.tensor(3.0, requires_grad=True)
    losses = []

    def finish(index, output):
        losses.append(output.sum() * index)
        return losses[-1]

    def step(index, chunk):
        assert chunk == 0
        return weight * torch.ones(2)

    whole = [Chunk(vp_stage=None)]
    pipeline.run_pipeline(whole, 3, step=step, finish=finish, train=True, **SIZES)
    assert [float(loss.detach()) for loss in losses] == [0.0, 6.0, 12.0]
    assert float(weight.grad) == (0 + 2 + 4) / 3
    assert schedule == {**SIZES, "count": 3, "forward_only": False, "grad": True}
    pipeline.run_pipeline(
        whole, 2, step=step, finish=lambda index, output: None, train=False, **SIZES
    )
    assert schedule["forward_only"] and not schedule["grad"]


def test_chunks_get_whole_rounds_of_micro_batches(schedule, monkeypatch):
    """What is missing passes by, and the mean is over what is there."""
    monkeypatch.setattr(pipeline.groups, "pipeline_stage", lambda: (1, 2))
    weight = torch.tensor(3.0, requires_grad=True)
    ran = []

    def step(index, chunk):
        ran.append((index, chunk))
        return weight * torch.ones(2)

    chunks = [
        Chunk(vp_stage=number, input_tensor=torch.zeros(2, requires_grad=True))
        for number in range(2)
    ]
    pipeline.run_pipeline(
        chunks, 3, step=step, finish=lambda index, output: output.sum() * index, train=True, **SIZES
    )
    assert schedule["count"] == 4
    assert ran == [(index, chunk) for index in range(3) for chunk in range(2)]
    assert float(weight.grad) == (0 + 2 + 4) / 3


def test_a_micro_batch_that_is_missing_has_the_shape_of_the_others(monkeypatch):
    monkeypatch.setattr(pipeline.groups, "context_group", lambda: SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(pipeline.groups, "tensor_group", lambda: SimpleNamespace(size=lambda: 2))
    first = Chunk(pre_process=True)
    assert pipeline._passed_on(first, 8, 3).shape == (4, 3, 2)
    first.config = SimpleNamespace(**{**vars(Chunk.config), "sequence_parallel": True})
    assert pipeline._passed_on(first, 8, 3).shape == (2, 3, 2)
    later = Chunk(input_tensor=torch.ones(4, 3, 2, requires_grad=True))
    passed = pipeline._passed_on(later, 8, 3)
    assert passed is not later.input_tensor and torch.equal(passed, later.input_tensor)


def test_megatron_exchanges_of_chunks_are_unbatched():
    """Two stages are each other's neighbours on both sides: a batch would mix up what goes forward
    and what goes back."""
    model = tiny_model_config(("lightning_attn",) * 4)
    plain, chunked = (
        transformer_config(
            model,
            ParallelConfig(
                pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks
            ),
            torch.float32,
            layout,
        )
        for chunks, layout in ((1, (2, 2)), (2, (1, 1, 1, 1)))
    )
    assert plain.batch_p2p_comm and plain.virtual_pipeline_model_parallel_size is None
    assert chunked.virtual_pipeline_model_parallel_size == 2
    assert chunked.overlap_p2p_comm and not chunked.batch_p2p_comm
