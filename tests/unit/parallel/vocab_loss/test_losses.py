"""Losses of one chunk by their terms, whole and on ranks with parts of the vocabulary; what they
are worth over all chunks is tested in test_vocab_loss.py."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.vocab_loss import torch_terms
from megatron_hypenet.parallel.vocab_loss.losses import (
    CrossEntropyLoss,
    ForwardKLLoss,
    TeacherHead,
)
from megatron_hypenet.parallel.vocab_loss.split import VocabSplit
from tests.threaded_ranks import on_ranks

N = 9
H = 6
V = 20


def draw():
    generator = torch.Generator().manual_seed(2)
    hidden, weight, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((N, H), (V, H), (N, V))
    )
    return hidden, weight, logits, torch.randint(0, V, (N,), generator=generator)


def test_a_teacher_gives_the_logits_of_a_chunk_in_the_accumulation_dtype():
    hidden, weight, *_ = draw()
    head = TeacherHead(hidden.bfloat16(), weight.bfloat16())
    for rows in (slice(0, 2), slice(2, 9)):
        logits = head.logits(rows)
        assert logits.dtype == torch.float32
        want = hidden.bfloat16()[rows].double() @ weight.bfloat16().double().t()
        torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=1e-6)


def kl(logits, labels, weights, out, split, part=slice(None)):
    hidden, weight, *_ = draw()
    loss = ForwardKLLoss(torch_terms, TeacherHead(hidden, weight[part]))
    return loss, loss.chunk(slice(2, 7), logits[2:7, part].clone(), weights, out, split)


def cross_entropy(logits, labels, weights, out, split, part=slice(None)):
    loss = CrossEntropyLoss(torch_terms, labels - (part.start or 0))
    return loss, loss.chunk(slice(2, 7), logits[2:7, part].clone(), weights, out, split)


@pytest.mark.parametrize("computed", [kl, cross_entropy])
def test_a_chunk_is_the_same_with_and_without_gradient_and_in_parts(computed):
    hidden, weight, logits, labels = draw()
    weights = torch.linspace(0, 2, 5, dtype=torch.float64)
    x = logits[2:7].clone().requires_grad_()
    want = (
        F.kl_div(
            x.log_softmax(-1), (hidden[2:7] @ weight.t()).log_softmax(-1), log_target=True,
            reduction="none",
        ).sum(-1)
        if computed is kl
        else F.cross_entropy(x, labels[2:7], reduction="none")
    )  # fmt: skip
    (want * weights).sum().backward()
    out = torch.empty(5, V, dtype=torch.float64)
    whole = VocabSplit(None, False)
    loss, numbers = computed(logits, labels, weights, out, whole)
    assert numbers.shape == (loss.numbers, 5)
    torch.testing.assert_close(loss.per_token(numbers), want.detach()[None])
    torch.testing.assert_close(out, x.grad)
    torch.testing.assert_close(computed(logits, labels, None, None, whole)[1], numbers)

    def rank(group):
        part = slice(group.rank() * 10, group.rank() * 10 + 10)
        mine = out[:, part].clone().fill_(float("nan"))
        _, found = computed(logits, labels, weights, mine, VocabSplit(group, False), part)
        return found, mine

    found = on_ranks(2, rank)
    for merged, _ in found:
        torch.testing.assert_close(merged, numbers)
    torch.testing.assert_close(torch.cat([mine for _, mine in found], -1), x.grad)
