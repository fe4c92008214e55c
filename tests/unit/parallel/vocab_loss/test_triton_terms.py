"""The kernels against the torch terms in float64: on a GPU where there is one, in Triton's
interpreter elsewhere.

The interpreter runs programs one after another, so there the one-pass kernels run with one tile per
token only, the split ones with any."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.parallel import vocab_loss
from megatron_hypenet.parallel.vocab_loss import torch_terms, triton_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 21
V = 150
TILES = [64, 256]  # three tiles of a token, the last not full; one tile


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    monkeypatch.setattr(triton_terms, "TILE", request.param)
    return request.param


def draw():
    generator = torch.Generator().manual_seed(9)
    s, t = (8 * torch.randn(N, V, generator=generator).to(DEVICE) for _ in range(2))
    # a third of them lies in this shard
    labels = torch.randint(-V, 2 * V, (N,), generator=generator).to(DEVICE)
    return s, t, labels, torch.linspace(0, 2, N, device=DEVICE)


def close(got, want, tolerance=3e-6):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_kl_statistics_of_tiles_merge_to_those_of_the_shard(tile):
    s, t, *_ = draw()
    stats = triton_terms.kl_stats(s, t)
    assert stats.shape == (-(-V // tile), 5, N)
    close(
        triton_terms.kl_merge(stats),
        torch_terms.kl_merge(torch_terms.kl_stats(s.double(), t.double())),
    )


def test_ce_statistics_of_tiles_merge_to_those_of_the_shard(tile):
    s, _, labels, _ = draw()
    stats = triton_terms.ce_stats(s, labels)
    assert stats.shape == (-(-V // tile), 3, N)
    close(
        triton_terms.ce_merge(stats), torch_terms.ce_merge(torch_terms.ce_stats(s.double(), labels))
    )


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_shards(parts):
    generator = torch.Generator().manual_seed(2)
    for numbers, ours, theirs in (
        (5, triton_terms.kl_merge, torch_terms.kl_merge),
        (3, triton_terms.ce_merge, torch_terms.ce_merge),
    ):
        stats = torch.rand(parts, numbers, 37, generator=generator).to(DEVICE) + 0.5
        close(ours(stats), theirs(stats.double()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kl_gradients(tile, weighted, dtype):
    s, t, _, weights = draw()
    weights = weights if weighted else None
    exact = s.double(), t.double()
    local = torch_terms.kl_merge(torch_terms.kl_stats(*exact))
    merged = torch_terms.kl_merge(torch.stack([local, local + 0.25]))  # beside another shard
    want = torch.empty_like(exact[0])
    out = torch.empty(N, V, dtype=dtype, device=DEVICE)
    torch_terms.kl_gradient(
        *exact, local, merged, None if weights is None else weights.double(), want
    )
    triton_terms.kl_gradient(s, t, local.float(), merged.float(), weights, out)
    close(out, want, 3e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ce_gradients(tile, weighted, dtype):
    s, _, labels, weights = draw()
    weights = weights if weighted else None
    exact = s.double()
    local = torch_terms.ce_merge(torch_terms.ce_stats(exact, labels))
    merged = torch_terms.ce_merge(torch.stack([local, local + 0.25]))
    want = torch.empty_like(exact)
    out = torch.empty(N, V, dtype=dtype, device=DEVICE)
    torch_terms.ce_gradient(
        exact, labels, local, merged, None if weights is None else weights.double(), want
    )
    triton_terms.ce_gradient(s, labels, local.float(), merged.float(), weights, out)
    close(out, want, 3e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_and_gradient_together(tile, weighted):
    s, t, labels, weights = draw()
    weights = weights if weighted else None
    exact = None if weights is None else weights.double()
    want = torch.empty(N, V, dtype=torch.float64, device=DEVICE)
    out = torch.empty_like(s)
    merged = torch_terms.kl_stats_and_gradient(s.double(), t.double(), exact, want)
    close(triton_terms.kl_stats_and_gradient(s, t, weights, out), merged)
    close(out, want)
    merged = torch_terms.ce_stats_and_gradient(s.double(), labels, exact, want)
    close(triton_terms.ce_stats_and_gradient(s, labels, weights, out), merged)
    close(out, want)


@pytest.mark.parametrize(
    ("tiles", "processors", "fits"), [(75, 132, True), (75, 75, True), (75, 24, False)]
)
def test_one_pass_needs_room_for_all_tiles_of_a_token(monkeypatch, tiles, processors, fits):
    class OnGpu(torch.Tensor):
        is_cuda = True

    class Properties:
        multi_processor_count = processors

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert triton_terms._fits(torch.empty(1).as_subclass(OnGpu), tiles) is fits
    assert triton_terms._fits(torch.empty(1), 1) and not triton_terms._fits(torch.empty(1), 2)


def test_logits_with_gaps_are_refused():
    s = torch.zeros(4, 6, device=DEVICE)[:, ::2]
    with pytest.raises(AssertionError, match="densely"):
        triton_terms.kl_stats(s, s)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_losses_run_on_these_terms(tile, monkeypatch, chunk):
    """This is what a GPU runs, end to end: loss, scores and gradients of the vocabulary losses with
    the kernels in place of the torch terms."""
    if DEVICE == "cpu":
        monkeypatch.setattr(
            vocab_loss,
            "_terms",
            lambda hidden: triton_terms if hidden.dtype == torch.float32 else torch_terms,
        )
    generator = torch.Generator().manual_seed(4)
    h, w, ht, wt = (
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((N, 8), (V, 8), (N, 12), (V, 12))
    )
    labels = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    counts = torch.linspace(0, 2, N, device=DEVICE)
    results = []
    for dtype in (torch.float64, torch.float32):
        a, b, c, d, weights = (x.to(dtype) for x in (h, w, ht, wt, counts))
        a, b = a.requires_grad_(), b.requires_grad_()
        kl = vocab_loss.linear_kl(a, b, c, d, chunk_tokens=chunk, token_weights=weights)
        ce = vocab_loss.linear_cross_entropy(a, b, labels, chunk_tokens=chunk)
        (kl + 2 * ce).backward()
        scores = vocab_loss.token_scores(a, b, labels, chunk_tokens=chunk)
        results.append((kl.detach(), ce.detach(), a.grad, b.grad, scores[0], scores[1].double()))
    for want, got in zip(*results, strict=True):
        close(got, want, 2e-5)
