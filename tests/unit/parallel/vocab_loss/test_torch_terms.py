"""Terms of one chunk against torch's own losses in float64, whole and in shards of the
vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.vocab_loss import torch_terms as terms

N = 11
V = 40
CUTS = [(0, V), (0, 1, V), (0, 13, 26, V)]


def draw(scale=1.0):
    generator = torch.Generator().manual_seed(5)
    s, t = (torch.randn(N, V, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return (
        s,
        t,
        torch.randint(0, V, (N,), generator=generator),
        torch.linspace(0, 2, N, dtype=torch.float64),
    )


def parts(cuts):
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_kl_in_shards(cuts, scale, weighted):
    s, t, _, weights = draw(scale)
    weights = weights if weighted else None
    x = s.clone().requires_grad_()
    want = F.kl_div(x.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    (want if weights is None else want * weights).sum().backward()
    shards = [(s[:, part].clone(), t[:, part].clone()) for part in parts(cuts)]
    local = [terms.kl_merge(terms.kl_stats(*shard)) for shard in shards]
    merged = terms.kl_merge(torch.stack(local))
    torch.testing.assert_close(terms.kl_loss(merged), want, rtol=1e-10, atol=1e-10)
    out = torch.empty_like(s)
    for part, shard, numbers in zip(parts(cuts), shards, local, strict=True):
        terms.kl_gradient(*shard, numbers, merged, weights, out[:, part])
    torch.testing.assert_close(out, x.grad, rtol=1e-9, atol=1e-12)
    whole = torch.empty_like(s)
    torch.testing.assert_close(
        terms.kl_stats_and_gradient(s.clone(), t.clone(), weights, whole), merged
    )
    torch.testing.assert_close(whole, x.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_in_shards(cuts, weighted):
    s, _, labels, weights = draw(20.0)
    weights = weights if weighted else None
    x = s.clone().requires_grad_()
    want = F.cross_entropy(x, labels, reduction="none")
    (want if weights is None else want * weights).sum().backward()
    shards = [s[:, part].clone() for part in parts(cuts)]
    local = [
        terms.ce_merge(terms.ce_stats(shard, labels - part.start))
        for part, shard in zip(parts(cuts), shards, strict=True)
    ]
    merged = terms.ce_merge(torch.stack(local))
    torch.testing.assert_close(terms.ce_loss(merged), want, rtol=1e-10, atol=1e-10)
    out = torch.empty_like(s)
    for part, shard, numbers in zip(parts(cuts), shards, local, strict=True):
        terms.ce_gradient(shard, labels - part.start, numbers, merged, weights, out[:, part])
    torch.testing.assert_close(out, x.grad, rtol=1e-9, atol=1e-12)
    whole = torch.empty_like(s)
    torch.testing.assert_close(
        terms.ce_stats_and_gradient(s.clone(), labels, weights, whole), merged
    )
    torch.testing.assert_close(whole, x.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_at_a_likely_label_is_rounded_once():
    logits = torch.zeros(1, 3)
    logits[0, 1] = 9.0  # p = 0.99975: bf16 next to 1 has steps of 0.004
    out = torch.empty(1, 3, dtype=torch.bfloat16)
    terms.ce_stats_and_gradient(logits.clone(), torch.tensor([1]), None, out)
    want = logits.double().softmax(-1)[0, 1] - 1
    assert abs(out[0, 1].double() / want - 1) < 2**-8
