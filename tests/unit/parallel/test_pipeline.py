"""What Megatron's schedules get from us. The schedules themselves run in
tests/distributed/test_parity.py."""

import torch

from megatron_hypenet.parallel import pipeline


def test_the_last_stage_answers_with_a_loss_that_may_be_divided_in_place(monkeypatch):
    weight = torch.tensor(3.0, requires_grad=True)
    seen = {}

    def schedule(*, forward_step_func, model, num_microbatches, **sizes):
        seen.update(sizes, grad=torch.is_grad_enabled())
        for _ in range(num_microbatches):  # as Megatron does on the last stage
            output, loss_of = forward_step_func(None, model)
            loss, count, _ = loss_of(output)
            loss /= torch.clamp(count, min=1)
            loss /= num_microbatches
            if torch.is_grad_enabled():
                loss.backward()

    monkeypatch.setattr(pipeline, "get_forward_backward_func", lambda: schedule)
    losses = []

    def finish(index, output):
        losses.append(output.sum() * index)
        return losses[-1]

    sizes = {"seq_length": 8, "micro_batch_size": 1}
    pipeline.run_pipeline(
        None, 3, step=lambda index: weight * torch.ones(2), finish=finish, train=True, **sizes
    )
    assert [float(loss.detach()) for loss in losses] == [0.0, 6.0, 12.0]
    assert float(weight.grad) == (0 + 2 + 4) / 3
    assert seen == {**sizes, "forward_only": False, "grad": True, "data_iterator": None}
    pipeline.run_pipeline(
        None,
        2,
        step=lambda index: weight * torch.ones(2),
        finish=lambda index, output: None,
        train=False,
        **sizes,
    )
    assert seen["forward_only"] and not seen["grad"]
