"""The kernel launched directly: whole and broken blocks, and more numbers than 32 bits count."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.gradient_sum import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_blocks_cover_every_number_once(monkeypatch, count, add):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    memory = torch.randn(count + 8, device=DEVICE)
    gradient = torch.randn(count, device=DEVICE).half()
    want = torch.cat((memory[:count] * add + gradient, memory[count:]))
    kernels.run(memory[:count], gradient, add)
    assert torch.equal(memory, want)


def test_nothing_is_launched_for_no_numbers(monkeypatch):
    monkeypatch.setattr(kernels, "kernel", None)
    kernels.run(torch.zeros(0, device=DEVICE), torch.zeros(0, device=DEVICE), True)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [16, 5])
def test_more_than_two_to_the_31_numbers(takes_gib, extra):
    takes_gib(15)
    total = torch.ones(2**31 + extra, device=DEVICE)
    gradient = torch.full_like(total, 0.5, dtype=torch.bfloat16)
    kernels.run(total, gradient, True)
    assert total[0] == total[-1] == 1.5 and bool((total == 1.5).all())
    kernels.run(total, gradient, False)
    assert total[0] == total[-1] == 0.5 and bool((total == 0.5).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("start", [0, 1, 2, 4])
@pytest.mark.parametrize("count", [4096 * 16, 4096 * 16 + 3])
def test_every_width_of_access_gives_torchs_bits(dtype, start, count):
    buffer = torch.randn(start + count, device=DEVICE)
    gradients = torch.randn(start + count, device=DEVICE).to(dtype)
    total = buffer[start:].clone()
    gradient = gradients[start:]
    want = total + gradient
    kernels.run(buffer[start:], gradient, True)
    assert torch.equal(buffer[start:], want)
    kernels.run(buffer[start:], gradient, False)
    assert torch.equal(buffer[start:], gradient.float())
