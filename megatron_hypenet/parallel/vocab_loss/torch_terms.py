"""Terms of the vocabulary losses for one chunk of logits, in plain torch: any device, fp32 or
float64; the Triton kernels are tested against these.

Each loss has a few statistics per token from which shards of the vocabulary can be merged. With
logits shifted by their maximum:
    KL(teacher || student)    t_max, Z_t = sum e^t, A = sum e^t (t - s), s_max, Z_s = sum e^s
    cross entropy             s_max, Z_s, the label's logit (zero where another shard has the label)
Statistics have shape [parts, numbers, n]: parts of the vocabulary (tiles of a kernel or ranks),
merged into [numbers, n].

`*_stats` may overwrite the logits, and `*_gradient` must be given what it left: here the
exponentials, so that each is computed once. `*_gradient` writes d(sum of w * loss) / d logits of
this shard into `out`, given the merged numbers of this shard alone (`local`) and of the whole
vocabulary (`merged`), and destroys what it reads."""

import torch
from torch import Tensor


def kl_stats(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute from logits [n, v] of both models -> statistics [1, 5, n]; the logits become e^(logit
    - maximum)."""
    s_max, t_max = student.amax(-1), teacher.amax(-1)
    s, t = student.sub_(s_max[:, None]), teacher.sub_(t_max[:, None])
    difference = t - s
    p, q = t.exp_(), s.exp_()
    return torch.stack([t_max, p.sum(-1), difference.mul_(p).sum(-1), s_max, q.sum(-1)])[None]


def kl_merge(stats: Tensor) -> Tensor:
    """Merge statistics [parts, 5, n] of parts of the vocabulary -> those of the whole [5, n]."""
    t_max, t_sum, a, s_max, s_sum = stats.unbind(1)
    t_top, s_top = t_max.amax(0), s_max.amax(0)
    t_shift, s_shift = t_max - t_top, s_max - s_top
    scale = t_shift.exp()
    a_sum = (scale * (a + t_sum * (t_shift - s_shift))).sum(0)
    return torch.stack(
        [t_top, (t_sum * scale).sum(0), a_sum, s_top, (s_sum * s_shift.exp()).sum(0)]
    )


def kl_loss(merged: Tensor) -> Tensor:
    """Compute from statistics of the whole vocabulary [5, n] -> A / Z_t - log Z_t + log Z_s, the
    divergence of each token [n]."""
    _, t_sum, a, _, s_sum = merged
    return a / t_sum - t_sum.log() + s_sum.log()


def kl_gradient(
    student: Tensor,
    teacher: Tensor,
    local: Tensor,
    merged: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """Write softmax(student) - softmax(teacher) of this shard, times the token weights [n],
    rounded, into out [n, v]."""
    p_scale = (local[0] - merged[0]).exp() / merged[1]
    q_scale = (local[3] - merged[3]).exp() / merged[4]
    if weights is not None:
        p_scale, q_scale = p_scale * weights, q_scale * weights
    torch.sub(student.mul_(q_scale[:, None]), teacher.mul_(p_scale[:, None]), out=out)


def kl_stats_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor | None, out: Tensor
) -> Tensor:
    """Return the merged statistics [5, n], with the gradient in `out`, when this shard is the whole
    vocabulary."""
    merged = kl_merge(kl_stats(student, teacher))
    kl_gradient(student, teacher, merged, merged, weights, out)
    return merged


def ce_stats(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute from logits [n, v], labels [n] counted from this shard's first row (outside 0..v-1:
    not here) -> statistics [1, 3, n].

    The logits become e^(logit - maximum)."""
    mine, columns = _places(logits, labels)
    chosen = logits.gather(-1, columns).squeeze(-1) * mine
    maximum = logits.amax(-1)
    return torch.stack([maximum, logits.sub_(maximum[:, None]).exp_().sum(-1), chosen])[None]


def ce_merge(stats: Tensor) -> Tensor:
    """Merge statistics [parts, 3, n] of parts of the vocabulary -> those of the whole [3, n]."""
    maximum, total, chosen = stats.unbind(1)
    top = maximum.amax(0)
    return torch.stack([top, (total * (maximum - top).exp()).sum(0), chosen.sum(0)])


def ce_loss(merged: Tensor) -> Tensor:
    """Compute from statistics of the whole vocabulary [3, n] -> negative log likelihood of each
    label [n]."""
    top, total, chosen = merged
    return top + total.log() - chosen


def ce_gradient(
    logits: Tensor,
    labels: Tensor,
    local: Tensor,
    merged: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """Write softmax(logits) - one_hot(label) of this shard, times the token weights [n], rounded,
    into out [n, v]."""
    mine, columns = _places(logits, labels)
    scale = (local[0] - merged[0]).exp() / merged[1]
    drop = mine.to(logits.dtype)
    if weights is not None:
        scale, drop = scale * weights, drop * weights
    # the label's entry in the accumulation dtype first: p - 1 must not be formed from a rounded p
    at_label = logits.gather(-1, columns) * scale[:, None] - drop[:, None]
    torch.mul(logits, scale[:, None], out=out).scatter_(1, columns, at_label.to(out.dtype))


def ce_stats_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor | None, out: Tensor
) -> Tensor:
    """Return the merged statistics [3, n], with the gradient in `out`, when this shard is the whole
    vocabulary."""
    merged = ce_merge(ce_stats(logits, labels))
    ce_gradient(logits, labels, merged, merged, weights, out)
    return merged


def _places(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each label lies in this shard [n], and its column, or any column if it does
    not [n, 1]."""
    width = logits.shape[-1]
    return (labels >= 0) & (labels < width), labels.clamp(0, width - 1)[:, None]
