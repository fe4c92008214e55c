"""Losses over the vocabulary with the output-head product inside: forward KL, cross entropy, and
per-token scores.

Full logits never exist: tokens go through the head in chunks, and the gradients of hidden states
and weight are computed while a chunk's logits are in memory. The vocabulary may be split over a
tensor-parallel group; then each chunk costs one all-gather of a few values per token. Sums are fp32
(float64 for float64 inputs), and logits are never rounded to bf16: near p = q that alone gives
4-23% gradient error.

With logits shifted by each model's maximum, Z = sum e^x and A = sum e^t (t - s), per token
    KL(teacher || student) = A / Z_t - log Z_t + log Z_s          dKL/ds = softmax(s) - softmax(t)
(arXiv 2601.22156 uses temperature 1 and the mean over all tokens).

On CUDA the terms are Triton kernels, elsewhere torch; see `torch_terms.py` and `triton_terms.py`.
Nothing here waits for the device."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

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
    """Forward KL(teacher || student) averaged over all n tokens, a scalar in fp32 (float64 for
    float64 inputs).

    hidden [..., h] and teacher_hidden [..., h_t] hold the same tokens in the same order; weight [v,
    h], teacher_weight [v, h_t] are this rank's rows of the heads. With `sequence_parallel` both
    hold this rank's contiguous n / group size tokens; they are gathered here and the gradient of
    `hidden` is reduce-scattered. token_weights [n tokens] w makes the loss sum(w * kl) / n.
    chunk_tokens bounds the tokens whose logits exist at one time; None takes what 2 GB hold (32 MB
    on a CPU). Gradients flow to `hidden` and `weight` alone. Raises ValueError when the numbers of
    tokens differ."""
    student = hidden.reshape(-1, hidden.shape[-1])
    teacher = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student has {student.shape[0]} tokens, teacher {teacher.shape[0]}")
    split = _Split(group, sequence_parallel)
    count = student.shape[0] * split.token_parts
    loss = _KL(_terms(student), split.gather_tokens(teacher), teacher_weight.detach())
    return (
        _HeadLoss.apply(
            student, weight, loss, _flat_weights(token_weights, count, student), chunk_tokens, split
        )
        / count
    )


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
    tokens. token_weights w makes the loss sum(w * ce) / n. chunk_tokens as in `linear_kl`. Raises
    ValueError when there is not one label per hidden state (as when hidden states are split and
    `sequence_parallel` is not set)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    split = _Split(group, sequence_parallel)
    count = flat.shape[0] * split.token_parts
    if labels.numel() != count:
        raise ValueError(f"{labels.numel()} labels for {count} hidden states")
    loss = _CrossEntropy(_terms(flat), split.local_labels(labels, weight.shape[0]))
    return (
        _HeadLoss.apply(
            flat, weight, loss, _flat_weights(token_weights, count, flat), chunk_tokens, split
        )
        / count
    )


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
    split = _Split(group, False)
    loss = _CrossEntropy(_terms(flat), split.local_labels(labels, weight.shape[0]))
    merged = _run(flat, weight, loss, None, chunk_tokens, split, None)
    nll = loss.per_token(merged)
    correct = merged[2] >= merged[0]
    return nll.view(labels.shape), correct.view(labels.shape)


class _Loss(Protocol):
    """A loss of student logits [n, v] in the accumulation dtype: statistics, merged over shards,
    then loss and gradient (see `torch_terms.py`)."""

    numbers: int
    logit_sets: int
    """Elements of the accumulation dtype per logit of a chunk: the student's, and more with a
    teacher."""

    def stats(self, rows: slice, logits: Tensor) -> Tensor: ...
    def merge(self, stats: Tensor) -> Tensor: ...
    def per_token(self, merged: Tensor) -> Tensor: ...
    def gradient(
        self,
        rows: slice,
        logits: Tensor,
        local: Tensor,
        merged: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None: ...
    def stats_and_gradient(
        self, rows: slice, logits: Tensor, weights: Tensor | None, out: Tensor
    ) -> Tensor: ...


class _KL:
    """Forward KL to a teacher with a head of its own."""

    numbers = 5

    def __init__(self, terms: ModuleType, hidden: Tensor, weight: Tensor) -> None:
        self.terms = terms
        self.hidden = hidden
        self.weight = weight
        # torch has the difference of both models' logits in memory too
        self.logit_sets = 2 + (terms is torch_terms)
        self._buffer = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))

    def _logits(self, rows: slice) -> Tensor:
        part = self.hidden[rows]
        if len(part) > len(self._buffer):
            self._buffer = self._buffer.new_empty(len(part), self.weight.shape[0])
        return product(part, self.weight.t(), self._buffer[: len(part)])

    def stats(self, rows: slice, logits: Tensor) -> Tensor:
        self._teacher = self._logits(rows)
        return self.terms.kl_stats(logits, self._teacher)

    def merge(self, stats: Tensor) -> Tensor:
        return self.terms.kl_merge(stats)

    def per_token(self, merged: Tensor) -> Tensor:
        return torch_terms.kl_loss(merged)

    def gradient(
        self,
        rows: slice,
        logits: Tensor,
        local: Tensor,
        merged: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        self.terms.kl_gradient(logits, self._teacher, local, merged, weights, out)

    def stats_and_gradient(
        self, rows: slice, logits: Tensor, weights: Tensor | None, out: Tensor
    ) -> Tensor:
        return self.terms.kl_stats_and_gradient(logits, self._logits(rows), weights, out)


class _CrossEntropy:
    """Cross entropy of labels counted from this shard's first row of the vocabulary."""

    numbers = 3
    logit_sets = 1

    def __init__(self, terms: ModuleType, labels: Tensor) -> None:
        self.terms = terms
        self.labels = labels

    def stats(self, rows: slice, logits: Tensor) -> Tensor:
        return self.terms.ce_stats(logits, self.labels[rows])

    def merge(self, stats: Tensor) -> Tensor:
        return self.terms.ce_merge(stats)

    def per_token(self, merged: Tensor) -> Tensor:
        return torch_terms.ce_loss(merged)

    def gradient(
        self,
        rows: slice,
        logits: Tensor,
        local: Tensor,
        merged: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        self.terms.ce_gradient(logits, self.labels[rows], local, merged, weights, out)

    def stats_and_gradient(
        self, rows: slice, logits: Tensor, weights: Tensor | None, out: Tensor
    ) -> Tensor:
        return self.terms.ce_stats_and_gradient(logits, self.labels[rows], weights, out)


class _HeadLoss(torch.autograd.Function):
    """Sum over tokens of w * loss; gradients are formed in forward, chunk by chunk, and scaled in
    backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: _Loss,
        weights: Tensor | None,
        chunk: int | None,
        split: _Split,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        hidden = split.gather_tokens(hidden)
        grads = (
            HeadGradients(hidden, weight, want_weight=ctx.needs_input_grad[1]) if wanted else None
        )
        losses = loss.per_token(_run(hidden, weight, loss, weights, chunk, split, grads))
        ctx.split = split
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(*(grads.hidden, grads.weight) if grads else (None, None))
        return losses.sum() if weights is None else losses @ weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
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
    loss: _Loss,
    weights: Tensor | None,
    chunk: int | None,
    split: _Split,
    grads: HeadGradients | None,
) -> Tensor:
    """Return merged statistics [numbers, n] of all tokens of hidden [n, h]; also fills `grads`
    unless it is None."""
    count = hidden.shape[0]
    vocab_rows = weight.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    per_token = vocab_rows * (
        loss.logit_sets * dtype.itemsize + CHUNKS_PER_PRODUCT * hidden.dtype.itemsize
    )
    size = chunk_size(count, chunk, per_token, hidden.device)
    merged = torch.empty(loss.numbers, count, dtype=dtype, device=hidden.device)
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
            if out is not None and split.size == 1:
                merged[:, rows] = loss.stats_and_gradient(rows, logits, mine, out)
                continue
            local = loss.merge(loss.stats(rows, logits))
            whole = split.merge_shards(loss, local)
            merged[:, rows] = whole
            if out is not None:
                loss.gradient(rows, logits, local, whole, mine, out)
        if grads is not None and logit_grads is not None:
            grads.add(block, logit_grads[: block.stop - block.start])
    return merged


class _Split:
    """How the vocabulary, and with sequence parallelism the tokens, are split over a
    tensor-parallel group (None: not split)."""

    def __init__(self, group: dist.ProcessGroup | None, sequence_parallel: bool) -> None:
        self.group = group
        self.size = group.size() if group is not None else 1
        self.token_parts = self.size if sequence_parallel else 1

    def local_labels(self, labels: Tensor, vocab_rows: int) -> Tensor:
        """Return the labels as [n], counted from this rank's first of `vocab_rows` head rows."""
        return labels.reshape(-1) - (
            self.group.rank() * vocab_rows if self.group is not None else 0
        )

    def gather_tokens(self, part: Tensor) -> Tensor:
        """Gather this rank's tokens [n / parts, h] -> the tokens of all ranks [n, h]; the same
        tensor when tokens are not split."""
        if self.token_parts == 1:
            return part
        whole = part.new_empty(part.shape[0] * self.token_parts, part.shape[1])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)
        return whole

    def reduce_tokens(self, grad: Tensor) -> Tensor:
        """Sum the gradients [n, h] that each vocabulary shard gives; with split tokens keep this
        rank's part [n / parts, h]."""
        if self.size == 1:
            return grad
        if self.token_parts == 1:
            dist.all_reduce(grad, group=self.group)
            return grad
        mine = grad.new_empty(grad.shape[0] // self.token_parts, grad.shape[1])
        dist.reduce_scatter_tensor(mine, grad, group=self.group)
        return mine

    def merge_shards(self, loss: _Loss, numbers: Tensor) -> Tensor:
        """Merge statistics of this rank's rows [numbers, n] -> those of the whole vocabulary, by
        one all-gather."""
        if self.size == 1:
            return numbers
        gathered = numbers.new_empty(self.size, *numbers.shape)
        dist.all_gather_into_tensor(gathered.view(-1), numbers.view(-1), group=self.group)
        return loss.merge(gathered)


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
