"""Losses over the vocabulary with the output-head product inside: forward KL, cross entropy, and per-token scores.

Full logits never exist: tokens go through the head in chunks, and the gradients of hidden states and weight are formed while a chunk's
logits are at hand. The vocabulary may be split over a tensor-parallel group; then each chunk costs one all-gather of a few numbers per
token. Sums are fp32 (float64 for float64 inputs), and logits are never rounded to bf16: near p = q that alone gives 4-23% gradient error.

With logits shifted by each model's maximum, Z = sum e^x and A = sum e^t (t - s), per token
    KL(teacher || student) = A / Z_t - log Z_t + log Z_s          dKL/ds = softmax(s) - softmax(t)
(arXiv 2601.22156 uses temperature 1 and the mean over all tokens)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Forward KL(teacher || student) averaged over all n tokens, a scalar in fp32 (float64 for float64 inputs).

    hidden [..., h] and teacher_hidden [..., h_t] hold the same tokens in the same order; weight [v, h], teacher_weight [v, h_t] are this
    rank's rows of the heads. With `sequence_parallel` both hold this rank's contiguous n / group size tokens; they are gathered here and
    the gradient of `hidden` is reduce-scattered. token_weights [n tokens] w makes the loss sum(w * kl) / n.
    Gradients flow to `hidden` and `weight` alone. Raises ValueError when the numbers of tokens differ."""
    student, teacher = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student has {student.shape[0]} tokens, teacher {teacher.shape[0]}")
    scatter = sequence_parallel and group is not None and group.size() > 1
    count = student.shape[0] * (group.size() if scatter and group is not None else 1)
    weights = _flat_weights(token_weights, count, student)
    return _LinearKL.apply(student, weight, teacher, teacher_weight.detach(), weights, chunk_tokens, group, scatter) / count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of `labels` averaged over all n tokens, given hidden [..., h] and this rank's head rows weight [v, h]; fp32 or float64.

    With `sequence_parallel`, hidden holds this rank's contiguous n / group size tokens: it is gathered here and its gradient is
    reduce-scattered; labels and token_weights are those of all n tokens. token_weights w makes the loss sum(w * ce) / n.
    Raises ValueError when there is not one label per hidden state (as when hidden states are split and nobody said so)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    scatter = sequence_parallel and group is not None and group.size() > 1
    count = flat.shape[0] * (group.size() if scatter and group is not None else 1)
    if labels.numel() != count:
        raise ValueError(f"{labels.numel()} labels for {count} hidden states")
    weights = _flat_weights(token_weights, count, flat)
    return _LinearCrossEntropy.apply(flat, weight, labels.reshape(-1), weights, chunk_tokens, group, scatter) / count


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood [...] (fp32 or float64) of each label and whether it is the most likely token [...] (bool)."""
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    nll = torch.empty(flat.shape[0], dtype=_wide(flat.dtype), device=flat.device)
    correct = torch.empty(flat.shape[0], dtype=torch.bool, device=flat.device)
    for rows in _chunks(flat.shape[0], chunk_tokens):
        logits = _logits(flat[rows], weight)
        maximum, total, chosen, _ = _cross_entropy_terms(logits, flat_labels[rows], group)
        nll[rows] = maximum + total.log() - chosen
        correct[rows] = chosen >= maximum
    return nll.view(labels.shape), correct.view(labels.shape)


class _LinearKL(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student); gradients are formed in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor | None,
        chunk: int,
        group: Any,
        scatter: bool,
    ) -> Tensor:
        if scatter:
            hidden, teacher_hidden = _gather_tokens(hidden, group), _gather_tokens(teacher_hidden, group)
        grads = _HeadGradients(ctx, hidden, weight, group, scatter)
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        for rows in _chunks(hidden.shape[0], chunk):
            s, t = _logits(hidden[rows], weight), _logits(teacher_hidden[rows], teacher_weight)
            s_max, t_max = s.amax(-1), t.amax(-1)
            s.sub_(s_max[:, None])
            t.sub_(t_max[:, None])
            difference = t - s
            p, q = t.exp_(), s.exp_()  # unnormalised teacher and student probabilities
            stats = _gather([t_max, p.sum(-1), (p * difference).sum(-1), s_max, q.sum(-1)], group)
            t_top, s_top = stats[:, 0].amax(0), stats[:, 3].amax(0)
            t_shift, s_shift = stats[:, 0] - t_top, stats[:, 3] - s_top
            z_t, z_s = (stats[:, 1] * t_shift.exp()).sum(0), (stats[:, 4] * s_shift.exp()).sum(0)
            a = (t_shift.exp() * (stats[:, 2] + stats[:, 1] * (t_shift - s_shift))).sum(0)
            total += _weighted_sum(a / z_t - z_t.log() + z_s.log(), token_weights, rows)
            if grads.wanted:
                q.mul_(((s_max - s_top).exp() / z_s)[:, None])
                p.mul_(((t_max - t_top).exp() / z_t)[:, None])
                grads.add(rows, q.sub_(p), token_weights)
        grads.save()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_HeadGradients.scaled(ctx, grad), *[None] * 6)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy; gradients are formed in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, chunk: int, group: Any, scatter: bool
    ) -> Tensor:
        if scatter:
            hidden = _gather_tokens(hidden, group)
        grads = _HeadGradients(ctx, hidden, weight, group, scatter)
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], weight)
            maximum, z, chosen, local = _cross_entropy_terms(logits, labels[rows], group)
            total += _weighted_sum(maximum + z.log() - chosen, token_weights, rows)
            if grads.wanted:
                q = logits.sub_(maximum[:, None]).exp_().div_(z[:, None])
                mine = (local >= 0) & (local < weight.shape[0])
                q.scatter_add_(1, local.clamp(0, weight.shape[0] - 1)[:, None], -mine.to(q.dtype)[:, None])
                grads.add(rows, q, token_weights)
        grads.save()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_HeadGradients.scaled(ctx, grad), *[None] * 5)


class _HeadGradients:
    """Accumulates d(sum of losses)/d hidden and d/d weight from the logit gradients of each chunk."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None, scatter: bool) -> None:
        self.ctx, self.hidden, self.weight = ctx, hidden, weight
        ctx.weight_dtype = weight.dtype
        self.wanted = any(ctx.needs_input_grad[:2])
        ctx.group, ctx.scatter = group, scatter
        self.hidden_grad = torch.empty_like(hidden) if self.wanted else None
        self.weight_grad = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if ctx.needs_input_grad[1] else None

    def add(self, rows: slice, logit_grad: Tensor, token_weights: Tensor | None) -> None:
        """Use the gradient [tokens of the chunk, v] of the logits of `rows`, times the weights of these tokens."""
        if token_weights is not None:
            logit_grad.mul_(token_weights[rows, None])
        narrow = logit_grad.to(self.hidden.dtype)
        assert self.hidden_grad is not None, "add() without wanted gradients"
        torch.matmul(narrow, self.weight, out=self.hidden_grad[rows])
        if self.weight_grad is not None:
            self.weight_grad += _product(narrow.t(), self.hidden[rows])

    def save(self) -> None:
        """Keep the sums for backward."""
        self.ctx.save_for_backward(self.hidden_grad, self.weight_grad)

    @staticmethod
    def scaled(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients times the upstream scalar; the hidden gradient is a partial sum over vocabulary shards."""
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            if ctx.scatter:
                mine = hidden_grad.new_empty(hidden_grad.shape[0] // ctx.group.size(), hidden_grad.shape[1])
                dist.reduce_scatter_tensor(mine, hidden_grad, group=ctx.group)
                hidden_grad = mine
            elif ctx.group is not None and ctx.group.size() > 1:
                dist.all_reduce(hidden_grad, group=ctx.group)
            hidden_grad = hidden_grad * grad.to(hidden_grad.dtype)
        if weight_grad is not None:
            narrow = torch.empty_like(weight_grad, dtype=ctx.weight_dtype)
            weight_grad = torch.mul(weight_grad, grad, out=narrow)  # rounds once, without a wide temporary
        return hidden_grad if ctx.needs_input_grad[0] else None, weight_grad


def _cross_entropy_terms(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Global maximum [n], sum of e^(logit - maximum) [n], logit of the label [n], and the label's index in this rank's shard [n]."""
    width = logits.shape[-1]
    local = labels - (group.rank() * width if group is not None else 0)
    mine = (local >= 0) & (local < width)
    chosen = logits.gather(-1, local.clamp(0, width - 1)[:, None]).squeeze(-1) * mine
    maximum = logits.amax(-1)
    stats = _gather([maximum, (logits - maximum[:, None]).exp().sum(-1), chosen], group)
    top = stats[:, 0].amax(0)
    return top, (stats[:, 1] * (stats[:, 0] - top).exp()).sum(0), stats[:, 2].sum(0), local


def _gather_tokens(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens [n / group size, h] -> the tokens of all ranks [n, h]."""
    whole = part.new_empty(part.shape[0] * group.size(), part.shape[1])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _flat_weights(token_weights: Tensor | None, count: int, like: Tensor) -> Tensor | None:
    """Token weights as [n] in the dtype of the sums, or None."""
    if token_weights is None:
        return None
    if token_weights.numel() != count:
        raise ValueError(f"{token_weights.numel()} token weights for {count} hidden states")
    return token_weights.detach().reshape(-1).to(device=like.device, dtype=_wide(like.dtype))


def _weighted_sum(losses: Tensor, token_weights: Tensor | None, rows: slice) -> Tensor:
    return losses.sum() if token_weights is None else losses @ token_weights[rows]


def _gather(stats: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Stack [n]-vectors and gather them over the group in one collective: [group size, number of vectors, n]."""
    mine = torch.stack(stats)
    if group is None or group.size() == 1:
        return mine[None]
    gathered = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather_into_tensor(gathered.view(-1), mine.view(-1), group=group)
    return gathered


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, h] x weight [v, h] -> [n, v] in fp32 (float64 for float64), not rounded to the model's dtype in between."""
    return _product(hidden, weight.t())


def _product(a: Tensor, b: Tensor) -> Tensor:
    wide = _wide(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)  # tensor cores on bf16 inputs, fp32 result
    return a.to(wide) @ b.to(wide)


def _chunks(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"chunk_tokens={size}: at least one token per chunk")
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
