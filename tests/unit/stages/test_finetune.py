"""Stage 3 against plain torch: next-token cross entropy from whole logits."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.stages.finetune import FinetuneStage


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(student, batch, chunk_tokens):
    loss, metrics = FinetuneStage(student, chunk_tokens=chunk_tokens)(batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    tokens = batch.tokens
    want = F.cross_entropy(student(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert metrics == {"train/lm-loss": loss.detach()}
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            got[name],
            parameter.grad,
            rtol=1e-8,
            atol=1e-13,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_the_whole_student_trains_and_is_saved(student):
    stage = FinetuneStage(student, chunk_tokens=8)
    assert set(stage.trainable_parameters()) == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    assert set(stage.sharded_state_dict()) == set(student.sharded_state_dict())
