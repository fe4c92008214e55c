"""Every objective against its definition from whole distributions in float64: values, gradients,
parts of the vocabulary on several ranks, masks, and the memory that is planned for it."""

import math
import typing
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hypenet.config.objective import ObjectiveConfig
from megatron_hypenet.parallel.vocab_loss import linear_divergence
from megatron_hypenet.parallel.vocab_loss.objectives import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    TopK,
    objective_kinds,
    objective_of,
    register_objective,
    to_log_probabilities,
)
from megatron_hypenet.parallel.vocab_loss.split import VocabSplit
from tests.threaded_ranks import on_ranks

N = 13
V = 48
WHOLE = VocabSplit(None, False)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p, log_q, beta):
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def top_k(log_p, log_q, k):
    chosen = log_p.topk(k, dim=-1).indices
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, chosen, False)
    outcomes = [
        torch.cat(
            [x.gather(-1, chosen), x.masked_fill(~rest, -math.inf).logsumexp(-1, keepdim=True)], -1
        )
        for x in (log_p, log_q)
    ]
    return kl(*outcomes)


DEFINITIONS = {
    ForwardKL(): kl,
    ReverseKL(): lambda log_p, log_q: kl(log_q, log_p),
    JensenShannon(0.5): lambda log_p, log_q: jensen_shannon(log_p, log_q, 0.5),
    JensenShannon(0.1): lambda log_p, log_q: jensen_shannon(log_p, log_q, 0.1),
    TopK(1): lambda log_p, log_q: top_k(log_p, log_q, 1),
    TopK(5): lambda log_p, log_q: top_k(log_p, log_q, 5),
    TopK(30): lambda log_p, log_q: top_k(log_p, log_q, 30),
}
IN_TORCH = [objective for objective in DEFINITIONS if isinstance(objective, Divergence)]


def draw(scale=1.0, dtype=torch.float64):
    """Return logits of teacher and student, and token weights."""
    generator = torch.Generator().manual_seed(7)
    t, s = (scale * torch.randn(N, V, generator=generator).double() for _ in range(2))
    return t.to(dtype), s.to(dtype), torch.linspace(0, 2, N, dtype=dtype)


def expected(objective, t, s, weights=None):
    """Return values [n] and the gradient of the student's logits [n, v] by autograd."""
    x = s.double().clone().requires_grad_()
    values = DEFINITIONS[objective](t.double().log_softmax(-1), x.log_softmax(-1))
    (values if weights is None else values * weights.double()).sum().backward()
    return values.detach(), x.grad


def evaluated(objective, t, s, weights=None, split=WHOLE, dtype=None):
    """Return values [2, n] and the gradient [n, v] of logits, which are kept."""
    t, s = t.clone(), s.clone()
    out = torch.empty_like(s, dtype=dtype)
    to_log_probabilities(t, s, split)
    return objective.evaluate(t, s, split, weights, out), out


@pytest.mark.parametrize("objective", IN_TORCH, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_the_definitions(objective, scale, weighted):
    t, s, weights = draw(scale)
    weights = weights if weighted else None
    want, gradient = expected(objective, t, s, weights)
    values, out = evaluated(objective, t, s, weights)
    torch.testing.assert_close(values[0], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out, gradient, rtol=1e-9, atol=1e-11)
    forward = kl(t.log_softmax(-1), s.log_softmax(-1))
    torch.testing.assert_close(values[1], forward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", IN_TORCH, ids=repr)
@pytest.mark.parametrize("near", [1.0, 1e-3])
def test_fp32_keeps_six_digits_and_rounds_a_gradient_once(objective, near):
    t, s, weights = draw(3.0, torch.float32)
    s = t + near * s
    want, gradient = expected(objective, t, s, weights)
    values, out = evaluated(objective, t, s, weights)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0].double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), gradient, rtol=1e-5, atol=1e-6)
    _, rounded = evaluated(objective, t, s, weights, dtype=torch.bfloat16)
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize("objective", IN_TORCH, ids=repr)
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_the_vocabulary_give_the_whole(objective, ranks):
    t, s, weights = draw(5.0)
    want, gradient = evaluated(objective, t, s, weights)

    def part(group):
        mine = [x.chunk(ranks, -1)[group.rank()] for x in (t, s)]
        return evaluated(objective, *mine, weights, VocabSplit(group, False))

    found = on_ranks(ranks, part)
    for values, _ in found:
        torch.testing.assert_close(values, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.cat([out for _, out in found], -1), gradient, rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("objective", list(DEFINITIONS), ids=repr)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_gradients_of_hidden_states_and_head_and_kl_beside_it(objective, chunk):
    generator = torch.Generator().manual_seed(3)
    h, w, ht, wt = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((N, 8), (V, 8), (N, 12), (V, 12))
    )
    counts = torch.linspace(0, 2, N, dtype=torch.float64)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    log_p, log_q = (ht @ wt.t()).log_softmax(-1), (a @ b.t()).log_softmax(-1)
    want = (DEFINITIONS[objective](log_p, log_q) * counts).sum() / N
    (3 * want).backward()
    c, d = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss, beside = linear_divergence(
        c, d, ht, wt, objective=objective, chunk_tokens=chunk, token_weights=counts
    )
    (3 * loss).backward()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d.grad, b.grad, rtol=1e-9, atol=1e-11)
    assert not beside.requires_grad
    forward = (kl(log_p, log_q) * counts).sum() / N
    torch.testing.assert_close(beside, forward.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", list(DEFINITIONS), ids=repr)
def test_sequence_parallel_ranks_give_the_whole(objective):
    generator = torch.Generator().manual_seed(4)
    tokens = 12
    h, w, ht, wt = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, 8), (V, 8), (tokens, 12), (V, 12))
    )
    counts = torch.linspace(0, 2, tokens, dtype=torch.float64)

    def graded(a, b, c, d, **split):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss, beside = linear_divergence(
            a, b, c, d, objective=objective, chunk_tokens=5, token_weights=counts, **split
        )
        loss.backward()
        return torch.stack([loss.detach(), beside]), a.grad, b.grad

    values, of_hidden, of_head = graded(h, w, ht, wt)

    def part(group):
        mine = [x.chunk(2)[group.rank()] for x in (h, w, ht, wt)]
        return graded(*mine, group=group, sequence_parallel=True)

    found = on_ranks(2, part)
    for got, _, _ in found:
        torch.testing.assert_close(got, values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([one[1] for one in found]), of_hidden)
    torch.testing.assert_close(torch.cat([one[2] for one in found]), of_head)


@pytest.mark.parametrize("objective", IN_TORCH, ids=repr)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(objective):
    t, *_ = draw(3.0, torch.float32)
    values, out = evaluated(objective, t, t)
    assert values.abs().max() < 1e-6 and out.abs().max() < 1e-6


def test_the_ends_of_jensen_shannon_are_both_kls():
    t, s, _ = draw(2.0)
    reverse, forward = evaluated(ReverseKL(), t, s)[0]
    near_zero = evaluated(JensenShannon(1e-7), t, s)[0][0] / 1e-7
    near_one = evaluated(JensenShannon(1 - 1e-7), t, s)[0][0] / 1e-7
    torch.testing.assert_close(near_zero, forward, rtol=1e-5, atol=0)
    torch.testing.assert_close(near_one, reverse, rtol=1e-5, atol=0)


def test_all_tokens_but_one_are_the_whole_distribution():
    t, s, _ = draw(2.0)
    want, gradient = expected(ForwardKL(), t, s)
    for k in (V - 1, V):
        values, out = evaluated(TopK(k), t, s)
        torch.testing.assert_close(values[0], want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out, gradient, rtol=1e-9, atol=1e-12)


def test_tokens_as_likely_as_the_last_of_k_are_among_them_on_every_layout():
    t, s, _ = draw(2.0)
    t[:, 10:40] = t.amax(-1, keepdim=True)  # on both sides of the ranks' border
    ties = int((t[0] == t[0].max()).sum())
    torch.testing.assert_close(
        evaluated(TopK(3), t, s), evaluated(TopK(ties), t, s), rtol=0, atol=0
    )

    def part(group):
        mine = [x.chunk(2, -1)[group.rank()] for x in (t, s)]
        return evaluated(TopK(3), *mine, split=VocabSplit(group, False))[0]

    for values in on_ranks(2, part):
        torch.testing.assert_close(values, evaluated(TopK(3), t, s)[0])


class _Held(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at one time; `known` are there
    before."""

    def __init__(self, *known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(tensor, self.sizes.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.sizes.values()))
        return found


@pytest.mark.parametrize("objective", IN_TORCH, ids=repr)
def test_the_tensors_of_a_chunk_are_as_many_as_planned(objective):
    t, s, weights = (x.float() for x in draw())
    t, s = (x.repeat(1, 100) for x in (t, s))
    out = torch.empty_like(s)
    with _Held(t, s, out) as held:
        to_log_probabilities(t, s, WHOLE)
        objective.evaluate(t, s, WHOLE, weights, out)
    # both models' logits are there before
    sets = 2 + held.most / (4 * s.numel())
    assert objective.logit_sets - 1 < sets <= objective.logit_sets + 0.1, sets


def test_the_settings_name_every_objective_and_its_parameters():
    kinds = typing.get_args(ObjectiveConfig.model_fields["kind"].annotation)
    assert kinds == objective_kinds()
    made = [
        objective_of(ObjectiveConfig(**settings))
        for settings in (
            {},
            {"kind": "reverse_kl"},
            {"kind": "jensen_shannon"},
            {"kind": "jensen_shannon", "beta": 0.1},
            {"kind": "top_k", "k": 30},
        )
    ]
    assert made == [ForwardKL(), ReverseKL(), JensenShannon(0.5), JensenShannon(0.1), TopK(30)]
    quantities = [type(objective).quantity for objective in made[:3]] + [TopK.quantity]
    assert len(set(quantities)) == 4
    with pytest.raises(AssertionError, match="twice"):
        register_objective(TopK)
