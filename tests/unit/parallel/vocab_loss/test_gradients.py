"""The head's products against float64, on every path a version of torch may send them down.

Paths for GPUs run here on CPU tensors that say they were on one: what is tested is which product is
taken and that its sums are right."""

import pytest
import torch

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel.vocab_loss import gradients
from megatron_hypenet.parallel.vocab_loss.gradients import (
    HeadGradients,
    accumulate,
    blocks,
    chunk_size,
    product,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OnGpu(torch.Tensor):
    """A CPU tensor that takes the branches of a GPU's."""

    is_cuda = True


def on_gpu(x):
    return x.as_subclass(OnGpu)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (7, 2), (8, 2), (9, 4), (5, 100)])
def test_blocks_are_consecutive_and_complete(count, chunk):
    seen = []
    for block, chunks in blocks(count, chunk):
        rows = [row for part in chunks for row in range(part.start, part.stop)]
        assert (
            rows == list(range(block.start, block.stop))
            and len(chunks) <= gradients.CHUNKS_PER_PRODUCT
        )
        assert all(part.stop - part.start <= chunk for part in chunks)
        seen += rows
    assert seen == list(range(count))


@pytest.mark.parametrize(
    ("count", "limit", "per_token", "device", "want"),
    [
        (37, 8, 1, CPU, 8),  # the caller's word
        (37, 1000, 1, CPU, 37),  # no more than there are
        (8192, None, 151_936 * 12, CUDA, 1024),  # KL in bf16 at 2 GB: 8 equal chunks
        (8192, None, 151_936 * 16, CPU, 128),  # a large vocabulary on a CPU: the least
        (1100, 1024, 1, CPU, 640),  # two nearly equal chunks, not 1024 and 76
        (0, None, 8, CPU, 1),
    ],
)
def test_chunk_size(count, limit, per_token, device, want):
    assert chunk_size(count, limit, per_token, device) == want


def test_an_open_limit_keeps_to_its_budget():
    for vocab_rows in (500, 32_000, 151_936):
        size = chunk_size(10**6, None, vocab_rows * 12, CUDA)
        assert (
            size * vocab_rows * 12 <= gradients.BUFFER_BYTES["cuda"]
            and size % gradients.ROW_MULTIPLE == 0
        )


def test_chunks_below_one_token_are_refused():
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        chunk_size(8, 0, 1, CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_wide(dtype):
    a = draw(9, 20, dtype=dtype)
    b = draw(20, 11, dtype=dtype, seed=1)
    out = torch.empty(9, 11, dtype=accumulation_dtype(dtype))
    assert product(a, b, out) is out
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=2e-6)


@pytest.fixture(params=[True, False])
def tf32(request):
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    switch.allow_tf32 = request.param
    yield request.param
    switch.allow_tf32 = before


def test_old_torch_multiplies_fp32_copies_as_tf32(monkeypatch, tf32):
    monkeypatch.setattr(gradients, "_has_wide_products", lambda: False)
    multiply = torch.mm
    seen = []

    def mm(a, b, *, out):
        seen.append((a.dtype, b.dtype, torch.backends.cuda.matmul.allow_tf32))
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    a = draw(9, 20, dtype=torch.bfloat16)
    b = draw(20, 11, dtype=torch.bfloat16, seed=1)
    out = torch.empty(9, 11)
    product(on_gpu(a), on_gpu(b), out)
    assert (
        seen == [(torch.float32, torch.float32, True)]
        and torch.backends.cuda.matmul.allow_tf32 is tf32
    )
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=2e-6)


def test_new_torch_widens_in_the_product(monkeypatch):
    monkeypatch.setattr(gradients, "_has_wide_products", lambda: True)
    seen = []

    def mm(a, b, *, out_dtype, out):
        seen.append((a.dtype, out_dtype))
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    a = draw(9, 20, dtype=torch.bfloat16)
    b = draw(20, 11, dtype=torch.bfloat16, seed=1)
    out = torch.empty(9, 11)
    product(on_gpu(a), on_gpu(b), out)
    assert seen == [(torch.bfloat16, torch.float32)]
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 19])  # fewer than the eighths, and not a multiple of them
def test_sums_start_from_anything_and_go_on(dtype, rows):
    a = draw(rows, 6, dtype=dtype)
    b = draw(6, 5, dtype=dtype, seed=1)
    total = torch.full((rows, 5), float("nan"), dtype=accumulation_dtype(dtype))
    accumulate(total, a, b, fresh=True)
    accumulate(total, a, b, fresh=False)
    torch.testing.assert_close(total.double(), 2 * (a.double() @ b.double()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_adds_in_place_where_its_torch_can(monkeypatch, works):
    monkeypatch.setattr(gradients, "_wide_addmm_works", lambda dtype, device: works)
    monkeypatch.setattr(gradients, "_has_wide_products", lambda: False)
    plain = torch.addmm
    seen = []

    def addmm(total, a, b, *, out_dtype, beta, out):
        seen.append(beta)
        return plain(total, a.to(out_dtype), b.to(out_dtype), beta=beta, out=out)

    monkeypatch.setattr(torch, "addmm", addmm)
    a = draw(19, 6, dtype=torch.bfloat16)
    b = draw(6, 5, dtype=torch.bfloat16, seed=1)
    total = torch.full((19, 5), float("nan"))
    for fresh in (True, False):
        accumulate(total, on_gpu(a), on_gpu(b), fresh=fresh)
    assert seen == ([0, 1] if works else [])
    torch.testing.assert_close(total.double(), 2 * (a.double() @ b.double()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("has", "error", "want"),
    [(False, None, False), (True, RuntimeError("dtypes"), False), (True, None, True)],
)
def test_in_place_sums_are_tried_before_they_are_used(monkeypatch, has, error, want):
    def addmm(*args, **kwargs):
        if error is not None:
            raise error

    monkeypatch.setattr(gradients, "_has_wide_products", lambda: has)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert gradients._wide_addmm_works.__wrapped__(torch.bfloat16, CPU) is want


def test_head_gradients_gather_all_blocks():
    hidden = draw(10, 4)
    weight = draw(7, 4, seed=1)
    logit_grad = draw(10, 7, seed=2)
    grads = HeadGradients(hidden, weight, want_weight=True)
    for rows in (slice(0, 4), slice(4, 10)):
        grads.add(rows, logit_grad[rows])
    torch.testing.assert_close(grads.hidden, logit_grad @ weight)
    torch.testing.assert_close(grads.weight, logit_grad.t() @ hidden)
    assert HeadGradients(hidden, weight, want_weight=False).weight is None
