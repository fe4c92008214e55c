import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy, linear_kl, token_scores

N = 37
H = 12
H_T = 20
V = 50


def tensors(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: (torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)  # noqa: E731
    return (
        draw(N, H) * scale,
        draw(V, H),
        draw(N, H_T) * scale,
        draw(V, H_T),
        torch.randint(0, V, (N,), generator=generator),
    )


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_kl_and_gradients_equal_dense_torch_in_float64(chunk, scale):
    h, w, ht, wt, _ = tensors(torch.float64, scale)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    student, teacher = (a @ b.t()).log_softmax(-1), (ht @ wt.t()).log_softmax(-1)
    want = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    (want * 3).backward()
    c, d = h.clone().requires_grad_(), w.clone().requires_grad_()
    got = linear_kl(c, d, ht, wt, chunk_tokens=chunk)
    (got * 3).backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_cross_entropy_and_gradients_equal_dense_torch_in_float64(chunk):
    h, w, _, _, labels = tensors(torch.float64, 5.0)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    want = F.cross_entropy(a @ b.t(), labels)
    want.backward()
    c, d = h.clone().requires_grad_(), w.clone().requires_grad_()
    got = linear_cross_entropy(c, d, labels, chunk_tokens=chunk)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_identical_models_have_no_divergence_and_no_gradient():
    h, w, *_ = tensors(torch.float32)
    h.requires_grad_()
    loss = linear_kl(h, w, h.detach(), w, chunk_tokens=16)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and h.grad.abs().max() < 1e-6


def test_bf16_inputs_keep_fp32_sums():
    h, w, ht, wt, labels = (
        t.bfloat16() if t.is_floating_point() else t for t in tensors(torch.float32)
    )
    want = F.kl_div(
        (h.double() @ w.double().t()).log_softmax(-1),
        (ht.double() @ wt.double().t()).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    got = linear_kl(h, w, ht, wt, chunk_tokens=16)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert linear_cross_entropy(h, w, labels, chunk_tokens=16).dtype == torch.float32


def test_frozen_weight_gets_no_gradient_buffer():
    h, w, ht, wt, _ = tensors(torch.float32)
    h.requires_grad_()
    linear_kl(h, w, ht, wt, chunk_tokens=16).backward()
    assert h.grad is not None and w.grad is None


def test_token_scores_are_the_label_likelihoods():
    h, w, _, _, labels = tensors(torch.float64)
    logits = h @ w.t()
    labels[:5] = logits[:5].argmax(-1)
    nll, correct = token_scores(h, w, labels, chunk_tokens=8)
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(correct, logits.argmax(-1) == labels) and correct[:5].all()


def test_mismatched_token_counts_and_empty_chunks_are_refused():
    h, w, ht, wt, labels = tensors(torch.float32)
    with pytest.raises(ValueError, match="37 tokens, teacher 36"):
        linear_kl(h, w, ht[1:], wt, chunk_tokens=8)
    with pytest.raises(ValueError, match="36 labels for 37 hidden states"):
        linear_cross_entropy(h, w, labels[1:], chunk_tokens=8)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy(h, w, labels, chunk_tokens=0)


@pytest.mark.parametrize("chunk", [8, 1000])
def test_token_weights_scale_each_token_in_loss_and_gradient(chunk):
    h, w, ht, wt, labels = tensors(torch.float64)
    counts = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    scores = a @ b.t()
    kl = F.kl_div(
        scores.log_softmax(-1), (ht @ wt.t()).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    want = (counts * (kl + F.cross_entropy(scores, labels, reduction="none"))).sum() / N
    want.backward()
    c, d = h.clone().requires_grad_(), w.clone().requires_grad_()
    got = linear_kl(c, d, ht, wt, chunk_tokens=chunk, token_weights=counts)
    got = got + linear_cross_entropy(
        c, d, labels, chunk_tokens=chunk, token_weights=counts, sequence_parallel=True
    )
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.grad, a.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(d.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_token_weights_need_one_number_per_token():
    h, w, _, _, labels = tensors(torch.float32)
    with pytest.raises(ValueError, match="36 token weights for 37 hidden states"):
        linear_cross_entropy(h, w, labels, chunk_tokens=8, token_weights=torch.ones(36))
