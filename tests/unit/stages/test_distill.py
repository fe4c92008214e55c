"""Stage 2 against plain torch: forward KL from whole logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.vocab_loss.objectives import JensenShannon, ReverseKL, TopK
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.stages.distill import DistillStage
from megatron_hypenet.stages.head import FORWARD_KL


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(student, teacher, batch, chunk_tokens):
    stage = DistillStage(student, teacher, chunk_tokens=chunk_tokens)
    loss, metrics = stage(batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    inputs = batch.tokens[:, :-1]
    with torch.no_grad():
        target = teacher(inputs).log_softmax(-1)
    want = (
        F.kl_div(student(inputs).log_softmax(-1), target, log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert metrics == {"train/kl": loss.detach()} and not metrics["train/kl"].requires_grad
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            got[name],
            parameter.grad,
            rtol=1e-8,
            atol=1e-13,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_the_teacher_neither_trains_nor_is_saved(student, teacher, batch):
    stage = DistillStage(student, teacher, chunk_tokens=8)
    stage(batch)[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(stage.trainable_parameters()) == {
        f"student.{name}" for name, _ in student.named_parameters()
    }
    assert set(stage.sharded_state_dict()) == set(student.sharded_state_dict())
    assert stage.model_config == student.model_config


def test_a_student_that_equals_the_teacher_has_no_loss(teacher, batch):
    loss, _ = DistillStage(teacher, teacher, chunk_tokens=8)(batch)
    assert abs(loss.item()) < 1e-12


def test_the_last_token_has_no_say(student, teacher, batch):
    stage = DistillStage(student, teacher, chunk_tokens=8)
    changed = batch.tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    assert stage(batch)[0] == stage(MicroBatch(changed))[0]


OBJECTIVES = {
    "reverse-kl": ReverseKL(),
    "jensen-shannon": JensenShannon(0.3),
    "top-k-kl": TopK(5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_objective_is_reported_beside_forward_kl(student, teacher, batch, name):
    plain, _ = DistillStage(student, teacher, chunk_tokens=8)(batch)
    loss, metrics = DistillStage(student, teacher, chunk_tokens=8, objective=OBJECTIVES[name])(
        batch
    )
    assert set(metrics) == {"train/kl", f"train/{name}"}
    torch.testing.assert_close(metrics["train/kl"], plain.detach())
    assert metrics[f"train/{name}"] == loss.detach() != plain.detach()


@pytest.mark.parametrize("name", ["kl", *OBJECTIVES])
def test_only_positions_before_an_answer_count(student, teacher, batch, name):
    objective = OBJECTIVES.get(name, FORWARD_KL)
    stage = DistillStage(student, teacher, chunk_tokens=8, objective=objective)
    total = stage(batch)[0]
    weights = torch.zeros(2, 11, dtype=torch.float32)
    parts = []
    for place in range(11):
        weights.zero_()
        weights[:, place] = 11.0
        parts.append(stage(replace(batch, answer_weights=weights.clone()))[0].detach())
        # weights of labels are for losses with labels
        assert stage(replace(batch, token_weights=weights.clone()))[0] == total
    torch.testing.assert_close(torch.stack(parts).mean(), total)
    assert len({float(part) for part in parts}) == 11
