"""Stage 3 against plain torch: next-token cross entropy from whole logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.vocab_loss.objectives import ReverseKL
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


@pytest.mark.parametrize("w", [0.25, 1.0])
def test_beside_a_teacher_the_loss_is_the_weighted_sum_of_cross_entropy_and_divergence(
    student, teacher, batch, w
):
    stage = FinetuneStage(student, teacher, chunk_tokens=7, teacher_weight=w, objective=ReverseKL())
    # labels and positions are masked apart: a boundary of documents concerns labels alone
    labels, positions = torch.rand(2, 2, 11, generator=torch.Generator().manual_seed(1)).double()
    masked = replace(batch, token_weights=labels, answer_weights=positions)
    loss, metrics = stage(masked)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    with torch.no_grad():
        log_p = teacher(inputs).log_softmax(-1)
    log_q = student(inputs).log_softmax(-1)
    nll = F.nll_loss(log_q.flatten(0, 1), targets.flatten(), reduction="none").view(2, 11)
    values = {
        "lm-loss": (labels * nll).mean(),
        "reverse-kl": (positions * (log_q.exp() * (log_q - log_p)).sum(-1)).mean(),
        "kl": (positions * (log_p.exp() * (log_p - log_q)).sum(-1)).mean(),
    }
    want = (1 - w) * values["lm-loss"] + w * values["reverse-kl"]
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
    values["mixed-loss"] = want
    assert {tag.removeprefix("train/") for tag in metrics} == set(values)
    for name, value in values.items():
        torch.testing.assert_close(metrics[f"train/{name}"], value.detach(), rtol=1e-11, atol=0)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-13)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_weight_and_a_teacher_come_together(student, teacher):
    for models, w in (((student,), 0.5), ((student, teacher), 0.0)):
        with pytest.raises(AssertionError, match="a teacher has a weight"):
            FinetuneStage(*models, chunk_tokens=8, teacher_weight=w)
