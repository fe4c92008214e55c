"""The kernel launched directly: whole and broken blocks, and more numbers than 32 bits count."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.adamw import AdamWStep
from megatron_hypenet.ops.adamw import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = AdamWStep(count=1, lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_blocks_cover_every_number_once(monkeypatch, count):
    """The first step moves each weight by the learning rate, against the sign of its gradient."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    before = torch.randn(count + 8, device=DEVICE)
    gradient = torch.randn(count, device=DEVICE)
    weight = before.clone()
    moments = torch.zeros(2, count + 8, device=DEVICE)
    compute_weight = torch.zeros(count + 8, device=DEVICE).half()
    kernels.run(
        weight[:count],
        gradient,
        moments[0, :count],
        moments[1, :count],
        compute_weight[:count],
        STEP,
        torch.ones((), device=DEVICE),
    )
    torch.testing.assert_close(
        weight[:count], before[:count] - 0.05 * gradient.sign(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(moments[0, :count], 0.1 * gradient)
    torch.testing.assert_close(moments[1, :count], 0.05 * gradient.square())
    assert torch.equal(compute_weight[:count], weight[:count].half())
    assert (
        torch.equal(weight[count:], before[count:])
        and not moments[:, count:].any()
        and not compute_weight[count:].any()
    )


@pytest.mark.parametrize(("count", "launches"), [(0, []), (16, [16]), (40, [32, 8]), (7, [7])])
def test_whole_blocks_are_one_launch_and_the_rest_another(monkeypatch, count, launches):
    """A launch whose size is no multiple of 16 reads element by element."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: found.append((grid, args[6]))

    monkeypatch.setattr(kernels, "kernel", Kernel())
    kernels.run(*(torch.zeros(count) for _ in range(5)), STEP, torch.ones(()))
    assert found == [((-(-size // 16),), size) for size in launches]


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers(takes_gib):
    takes_gib(34)
    count = 2**31 + 5
    # one piece of memory for both: each number is read before it is written
    weight = gradient = torch.ones(count, device=DEVICE)
    mean, square = torch.zeros(count, device=DEVICE), torch.zeros(count, device=DEVICE)
    compute_weight = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    kernels.run(weight, gradient, mean, square, compute_weight, STEP, torch.ones((), device=DEVICE))
    for x, value in ((weight, 0.95), (mean, 0.1), (square, 0.05), (compute_weight, 0.95)):
        assert torch.allclose(
            x[[0, 2**31 - 1, 2**31, -1]].float(), torch.full((4,), value, device=DEVICE), rtol=4e-3
        )
        assert bool((x == x[0]).all())
