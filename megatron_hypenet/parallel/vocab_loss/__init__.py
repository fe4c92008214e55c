"""Losses over the vocabulary with the output-head product inside: divergences from a teacher, cross
entropy, and per-token scores.

Full logits never exist: tokens go through the head in chunks, and the gradients of hidden states
and weight are computed while a chunk's logits are in memory. The vocabulary may be split over a
tensor-parallel group; then each chunk costs one all-gather of a few values per token (two or three
for divergences other than forward KL). Sums are fp32 (float64 for float64 inputs), and logits are
never rounded to bf16: near p = q that alone gives 4-23% gradient error.

With logits shifted by each model's maximum, Z = sum e^x and A = sum e^t (t - s), per token
    KL(teacher || student) = A / Z_t - log Z_t + log Z_s          dKL/ds = softmax(s) - softmax(t)
(arXiv 2601.22156 uses temperature 1 and the mean over all tokens).

On CUDA the terms of forward KL and cross entropy are Triton kernels, elsewhere torch; see
`torch_terms.py` and `triton_terms.py`. Other divergences are in `objectives.py`. Nothing here waits
for the device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.ops.kernels import enabled, kernel_family
from megatron_hypenet.parallel.vocab_loss import torch_terms
from megatron_hypenet.parallel.vocab_loss.gradients import (
    CHUNKS_PER_PRODUCT,
    HeadGradients,
    blocks,
    chunk_size,
    product,
)
from megatron_hypenet.parallel.vocab_loss.losses import CrossEntropyLoss, Loss, TeacherHead
from megatron_hypenet.parallel.vocab_loss.objectives import ForwardKL, Objective
from megatron_hypenet.parallel.vocab_loss.split import VocabSplit


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    objective: Objective,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the divergence of the student from its teacher averaged over all n tokens, and beside
    it forward KL without gradients, which is the same for `ForwardKL`; scalars in fp32 (float64 for
    float64 inputs).

    hidden [..., h] and teacher_hidden [..., h_t] hold the same tokens in the same order; weight [v,
    h], teacher_weight [v, h_t] are this rank's rows of the heads. With `sequence_parallel` both
    hold this rank's contiguous n / group size tokens; they are gathered here and the gradient of
    `hidden` is reduce-scattered. token_weights [n tokens] w makes both sum(w * value) / n.
    chunk_tokens bounds the tokens whose logits exist at one time; None takes what 2 GB hold (32 MB
    on a CPU). Gradients flow to `hidden` and `weight` alone. Raises ValueError when the numbers of
    tokens differ."""
    student = hidden.reshape(-1, hidden.shape[-1])
    teacher = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student has {student.shape[0]} tokens, teacher {teacher.shape[0]}")
    split = VocabSplit(group, sequence_parallel)
    count = student.shape[0] * split.token_parts
    head = TeacherHead(split.gather_tokens(teacher), teacher_weight.detach())
    loss = objective.loss(_terms(student), head)
    weights = _flat_weights(token_weights, count, student)
    total, beside = _HeadLoss.apply(student, weight, loss, weights, chunk_tokens, split)
    value = total / count
    return value, (beside[-1] / count if len(beside) else value.detach())


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Return forward KL(teacher || student) averaged over all n tokens; arguments as in
    `linear_divergence`."""
    loss, _ = linear_divergence(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        objective=ForwardKL(),
        chunk_tokens=chunk_tokens,
        group=group,
        sequence_parallel=sequence_parallel,
        token_weights=token_weights,
    )
    return loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy of `labels` averaged over all n tokens, given hidden [..., h] and
    this rank's head rows weight [v, h]; fp32 or float64.

    With `sequence_parallel`, hidden holds this rank's contiguous n / group size tokens: it is
    gathered here and its gradient is reduce-scattered; labels and token_weights are those of all n
    tokens. token_weights w makes the loss sum(w * ce) / n. chunk_tokens as in `linear_divergence`.
    Raises ValueError when there is not one label per hidden state (as when hidden states are split
    and `sequence_parallel` is not set)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    split = VocabSplit(group, sequence_parallel)
    count = flat.shape[0] * split.token_parts
    if labels.numel() != count:
        raise ValueError(f"{labels.numel()} labels for {count} hidden states")
    loss = CrossEntropyLoss(_terms(flat), split.local_labels(labels, weight.shape[0]))
    weights = _flat_weights(token_weights, count, flat)
    total, _ = _HeadLoss.apply(flat, weight, loss, weights, chunk_tokens, split)
    mean: Tensor = total / count
    return mean


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the negative log likelihood [...] (fp32 or float64) of each label and whether it is
    the most likely token [...] (bool)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    split = VocabSplit(group, False)
    loss = CrossEntropyLoss(_terms(flat), split.local_labels(labels, weight.shape[0]))
    merged = _run(flat, weight, loss, None, chunk_tokens, split, None)
    nll = loss.per_token(merged)[0]
    correct = merged[2] >= merged[0]
    return nll.view(labels.shape), correct.view(labels.shape)


class _HeadLoss(torch.autograd.Function):
    """Sum over tokens of w * loss, and the same sums of what is reported beside it; gradients are
    formed in forward, chunk by chunk, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Loss,
        weights: Tensor | None,
        chunk: int | None,
        split: VocabSplit,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:2])
        hidden = split.gather_tokens(hidden)
        grads = (
            HeadGradients(hidden, weight, want_weight=ctx.needs_input_grad[1]) if wanted else None
        )
        losses, *beside = loss.per_token(_run(hidden, weight, loss, weights, chunk, split, grads))
        ctx.split = split
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(*(grads.hidden, grads.weight) if grads else (None, None))
        total, *others = (
            row.sum() if weights is None else row @ weights for row in (losses, *beside)
        )
        reported = torch.stack(others) if others else total.new_empty(0)
        ctx.mark_non_differentiable(reported)
        return total, reported

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, _reported: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            hidden_grad = ctx.split.reduce_tokens(hidden_grad) * grad.to(hidden_grad.dtype)
        if weight_grad is not None:
            compute_grad = torch.empty_like(weight_grad, dtype=ctx.weight_dtype)
            # rounds once, without a temporary in the accumulation dtype
            weight_grad = torch.mul(weight_grad, grad, out=compute_grad)
        return hidden_grad if ctx.needs_input_grad[0] else None, weight_grad, None, None, None, None


def _run(
    hidden: Tensor,
    weight: Tensor,
    loss: Loss,
    weights: Tensor | None,
    chunk: int | None,
    split: VocabSplit,
    grads: HeadGradients | None,
) -> Tensor:
    """Return the loss's numbers [numbers, n] of all tokens of hidden [n, h]; also fills `grads`
    unless it is None."""
    count = hidden.shape[0]
    vocab_rows = weight.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    per_token = vocab_rows * (
        loss.logit_sets * dtype.itemsize + CHUNKS_PER_PRODUCT * hidden.dtype.itemsize
    )
    size = chunk_size(count, chunk, per_token, hidden.device)
    numbers = torch.empty(loss.numbers, count, dtype=dtype, device=hidden.device)
    buffer = torch.empty(size, vocab_rows, dtype=dtype, device=hidden.device)
    logit_grads = (
        hidden.new_empty(min(size * CHUNKS_PER_PRODUCT, count), vocab_rows) if grads else None
    )
    for block, chunks in blocks(count, size):
        for rows in chunks:
            logits = product(hidden[rows], weight.t(), buffer[: rows.stop - rows.start])
            mine = weights if weights is None else weights[rows]
            out = (
                None
                if logit_grads is None
                else logit_grads[rows.start - block.start : rows.stop - block.start]
            )
            numbers[:, rows] = loss.chunk(rows, logits, mine, out, split)
        if grads is not None and logit_grads is not None:
            grads.add(block, logit_grads[: block.stop - block.start])
    return numbers


@kernel_family(
    "vocab_loss",
    fits=lambda use: use.dtype != torch.float64,
    check="megatron_hypenet.parallel.vocab_loss.selftest:check_vocab_loss_use",
    checked_uses=({}, {"tensor_ranks": 2, "vocab_rows": 75_968}),
)
def _terms(hidden: Tensor) -> ModuleType:
    """Choose Triton kernels where logits are fp32 on CUDA, torch elsewhere (and where Triton is not
    installed, or the kernels are disabled)."""
    if (
        not hidden.is_cuda
        or not enabled("vocab_loss")
        or accumulation_dtype(hidden.dtype) != torch.float32
    ):
        return torch_terms
    try:
        from megatron_hypenet.parallel.vocab_loss import triton_terms
    except ImportError:
        return torch_terms
    return triton_terms


def _flat_weights(token_weights: Tensor | None, count: int, like: Tensor) -> Tensor | None:
    """Return the token weights as [n] in the dtype of the sums, or None."""
    if token_weights is None:
        return None
    if token_weights.numel() != count:
        raise ValueError(f"{token_weights.numel()} token weights for {count} hidden states")
    return (
        token_weights.detach()
        .reshape(-1)
        .to(device=like.device, dtype=accumulation_dtype(like.dtype))
    )
