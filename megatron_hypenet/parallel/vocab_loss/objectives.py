"""What a student can minimise beside a teacher: divergences of two next-token distributions, p of
the teacher and q of the student, both at temperature 1.

    forward_kl        KL(p || q)
    reverse_kl        KL(q || p)
    jensen_shannon    b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q     (arXiv 2306.13649)
    top_k             forward KL over k + 1 outcomes: the teacher's k most likely tokens, the rest

An objective is a function of log-probabilities [n, v] of one chunk of tokens on this rank's part of
the vocabulary. With d = the derivative by log q of its sum over the vocabulary, the gradient of the
student's logits is d - q * sum(d); each objective has it written out. Forward KL has kernels on
CUDA (`losses.py`). The others are torch on every device: fp32 (float64 for float64), at most
`logit_sets` tensors of the size of a chunk's logits at one time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.config.objective import ObjectiveConfig
from megatron_hypenet.parallel.vocab_loss.losses import ForwardKLLoss, Loss, TeacherHead
from megatron_hypenet.parallel.vocab_loss.split import VocabSplit

_LINEAR_FROM = 40.0
"""Argument from which log(1 + e^x) is x, to float64 precision."""


class Objective(ABC):
    """A divergence of the student from its teacher."""

    kind: ClassVar[str]
    """The name in settings."""
    quantity: ClassVar[str]
    """The name of its value among the quantities that a run reports (training/tags.py)."""
    logit_sets: ClassVar[int]
    """Tensors of the size of a chunk's logits, in the accumulation dtype, that exist at one time on
    CUDA: the logits of both models, and what is computed from them."""
    traffic: ClassVar[float]
    """Bytes per logit of the vocabulary that its operations on CUDA read and write beyond those of
    the fused kernels of forward KL, in fp32."""

    @classmethod
    @abstractmethod
    def of(cls, config: ObjectiveConfig) -> Objective:
        """Return the objective with its parameters from the settings."""

    @abstractmethod
    def loss(self, terms: ModuleType, teacher: TeacherHead) -> Loss:
        """Return the loss of a chunk beside `teacher`; `terms` are those of forward KL."""


_KINDS: dict[str, type[Objective]] = {}


def register_objective(cls: type[Objective]) -> type[Objective]:
    """Register an objective under its kind, as a class decorator."""
    assert cls.kind not in _KINDS, f"objective {cls.kind} is there twice"
    _KINDS[cls.kind] = cls
    return cls


def objective_kinds() -> tuple[str, ...]:
    """Return the kinds of objectives."""
    return tuple(_KINDS)


def objective_of(config: ObjectiveConfig) -> Objective:
    """Return the objective that the settings ask for."""
    return _KINDS[config.kind].of(config)


@register_objective
@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(p || q): the student covers everything that the teacher may say."""

    kind = "forward_kl"
    quantity = "kl"
    logit_sets = 2
    traffic = 0.0

    @classmethod
    def of(cls, config: ObjectiveConfig) -> ForwardKL:
        """Return it; there are no parameters."""
        return cls()

    def loss(self, terms: ModuleType, teacher: TeacherHead) -> Loss:
        """Return the loss by `terms`."""
        return ForwardKLLoss(terms, teacher)


class Divergence(Objective):
    """An objective in torch operations."""

    def loss(self, terms: ModuleType, teacher: TeacherHead) -> Loss:
        """Return the loss by `evaluate`."""
        return _DivergenceLoss(self, teacher)

    @abstractmethod
    def evaluate(
        self, t: Tensor, s: Tensor, split: VocabSplit, weights: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Return the objective, and forward KL, of each token [2, n] from log-probabilities t of
        the teacher and s of the student [n, v], which are destroyed. The gradient of the student's
        logits, times the token weights [n], is written to `out` [n, v] unless it is None."""


@register_objective
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p): the student avoids what the teacher would not say."""

    kind = "reverse_kl"
    quantity = "reverse-kl"
    logit_sets = 3
    traffic = 164.0

    @classmethod
    def of(cls, config: ObjectiveConfig) -> ReverseKL:
        """Return it; there are no parameters."""
        return cls()

    def evaluate(
        self, t: Tensor, s: Tensor, split: VocabSplit, weights: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Compute values, and the gradient q (log q - log p - KL)."""
        p = t.exp()
        ratio, q = t.sub_(s), s.exp_()  # log p - log q
        forward = p.mul_(ratio).sum(-1)
        reverse = -torch.mul(q, ratio, out=p).sum(-1)
        values = _summed(split, reverse, forward)
        if out is not None:
            _write(ratio.add_(values[0][:, None]).mul_(q), -1.0, weights, out)
        return values


@register_objective
@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence with the teacher's share `beta` of the mixture:
    divided by beta it nears forward KL for small beta, divided by 1 - beta reverse KL near 1."""

    beta: float

    kind = "jensen_shannon"
    quantity = "jensen-shannon"
    logit_sets = 5
    traffic = 216.0

    @classmethod
    def of(cls, config: ObjectiveConfig) -> JensenShannon:
        """Return it with `beta`, or one half."""
        return cls(0.5 if config.beta is None else config.beta)

    def evaluate(
        self, t: Tensor, s: Tensor, split: VocabSplit, weights: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Compute values, and the gradient (1 - beta) q (log q - log m - KL(q || m))."""
        p = t.exp()
        ratio, q = t.sub_(s), s.exp_()  # log p - log q
        scratch = p * ratio
        forward = scratch.sum(-1)
        # log m - log q = log(1 - beta + beta p / q)
        torch.add(ratio, math.log(self.beta / (1 - self.beta)), out=scratch)
        mixed = F.softplus(scratch, threshold=_LINEAR_FROM).add_(math.log1p(-self.beta))
        teacher = ratio.sub_(mixed).mul_(p).sum(-1)
        student = -torch.mul(q, mixed, out=p).sum(-1)
        teacher, student, forward = _summed(split, teacher, student, forward)
        if out is not None:
            _write(mixed.add_(student[:, None]).mul_(q), self.beta - 1, weights, out)
        return torch.stack([self.beta * teacher + (1 - self.beta) * student, forward])


@register_objective
@dataclass(frozen=True)
class TopK(Divergence):
    """Forward KL over k + 1 outcomes: each of the teacher's k most likely tokens, and all others
    together. Tokens as likely as the k-th are among the first; ties are the same on every
    layout."""

    k: int

    kind = "top_k"
    quantity = "top-k-kl"
    logit_sets = 5
    traffic = 293.0

    @classmethod
    def of(cls, config: ObjectiveConfig) -> TopK:
        """Return it with `k`, which the settings require."""
        assert config.k is not None, "the settings check that k is there"
        return cls(config.k)

    def evaluate(
        self, t: Tensor, s: Tensor, split: VocabSplit, weights: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Compute values, and the gradient q - p for the k tokens, q - q P / Q for the others,
        whose probabilities are P and Q together."""
        kept = t >= self._least(t, split)[:, None]
        p = t.exp()
        scratch = (t - s).mul_(p)
        forward = scratch.sum(-1)
        top = scratch.mul_(kept).sum(-1)
        rest = [_log_sum(scratch.copy_(x).masked_fill_(kept, -math.inf)) for x in (t, s)]
        log_p_rest, log_q_rest = split.gather_numbers(torch.stack(rest)).logsumexp(0)
        top, forward = _summed(split, top, forward)
        p_rest = log_p_rest.exp()
        # without a rest, or one of probability 0, it has no part
        tail = torch.where(p_rest > 0, p_rest * (log_p_rest - log_q_rest), 0.0)
        if out is not None:
            torch.add(s, (log_p_rest - log_q_rest)[:, None], out=scratch).exp_()
            torch.where(kept, p, scratch, out=scratch)
            _write(s.exp_().sub_(scratch), 1.0, weights, out)
        return torch.stack([top + tail, forward])

    def _least(self, t: Tensor, split: VocabSplit) -> Tensor:
        """Return the teacher's k-th largest log-probability over the whole vocabulary [n]."""
        own = t.topk(min(self.k, t.shape[-1]), dim=-1).values.t().contiguous()
        return split.gather_numbers(own).flatten(0, 1).topk(self.k, dim=0).values[-1]


class _DivergenceLoss:
    """A divergence for the loop over chunks; its numbers are its value and forward KL."""

    numbers = 2

    def __init__(self, objective: Divergence, teacher: TeacherHead) -> None:
        self.objective = objective
        self.teacher = teacher
        self.logit_sets = objective.logit_sets

    def chunk(
        self,
        rows: slice,
        logits: Tensor,
        weights: Tensor | None,
        out: Tensor | None,
        split: VocabSplit,
    ) -> Tensor:
        """Compute `Loss.chunk`: one exchange for the sums of both distributions, one or more for
        the objective."""
        teacher = self.teacher.logits(rows)
        to_log_probabilities(teacher, logits, split)
        return self.objective.evaluate(teacher, logits, split, weights, out)

    def per_token(self, numbers: Tensor) -> Tensor:
        """Return the objective and forward KL of each token [2, n]."""
        return numbers


def to_log_probabilities(teacher: Tensor, student: Tensor, split: VocabSplit) -> None:
    """Turn logits [n, v] of both models on this rank's part of the vocabulary into
    log-probabilities over all of it, in place."""
    # the largest logit is taken off first: the rest is then rounded to its own size
    own = []
    for logits in (teacher, student):
        largest = logits.amax(-1)
        own += [largest, logits.sub_(largest[:, None]).logsumexp(-1)]
    parts = split.gather_numbers(torch.stack(own))
    for logits, (largest, log_sums), mine in zip(
        (teacher, student),
        (parts[:, :2].unbind(1), parts[:, 2:].unbind(1)),
        (own[0], own[2]),
        strict=True,
    ):
        top = largest.amax(0)
        log_sum = (log_sums + (largest - top)).logsumexp(0)
        logits.sub_((log_sum - (mine - top))[:, None])


def _log_sum(x: Tensor) -> Tensor:
    """Return log sum e^x [n] of x [n, v], which is destroyed; -inf without any finite value."""
    largest = x.amax(-1).clamp_(min=torch.finfo(x.dtype).min)
    return x.sub_(largest[:, None]).exp_().sum(-1).log_().add_(largest)


def _summed(split: VocabSplit, *numbers: Tensor) -> Tensor:
    """Add numbers [n] of this rank's part of the vocabulary over all ranks -> [numbers, n]."""
    return split.gather_numbers(torch.stack(numbers)).sum(0)


def _write(gradient: Tensor, factor: float, weights: Tensor | None, out: Tensor) -> None:
    """Write the gradient [n, v] times a factor and the token weights [n] to out, rounded once."""
    if weights is None:
        torch.mul(gradient, factor, out=out)
    else:
        torch.mul(gradient, (factor * weights)[:, None], out=out)
