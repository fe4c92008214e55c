"""The update against AdamW in float64, and its torch form against torch's own optimizer."""

import pytest
import torch

from megatron_hypenet.ops import kernels
from megatron_hypenet.ops.adamw import AdamWStep, adamw, fused_adamw, kernel_fits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(*arguments):
    pytest.importorskip("triton")
    fused_adamw(*arguments)


def numbers(count, **changes):
    return AdamWStep(
        **{"count": count, "lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        | changes
    )


def scaled_by(value):
    return torch.tensor(value, device=DEVICE)


# Triton's interpreter cuts bf16 off instead of rounding it
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def state(count):
    weight = torch.randn(count, device=DEVICE)
    compute_weight = torch.full((count,), torch.nan, dtype=NARROW, device=DEVICE)
    return weight, torch.zeros_like(weight), torch.zeros_like(weight), compute_weight


def definition(weight, gradients, scale, **changes):
    """Return weights and both moments after all gradients, in float64."""
    weight = weight.double()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for count, gradient in enumerate(gradients, 1):
        step = numbers(count, **changes)
        scaled = gradient.double() * scale
        (beta1, beta2) = step.betas
        mean = beta1 * mean + (1 - beta1) * scaled
        square = beta2 * square + (1 - beta2) * scaled**2
        direction = mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + step.eps)
        weight = weight - step.lr * step.weight_decay * weight - step.lr * direction
    return weight, mean, square


@pytest.mark.parametrize("op", [adamw, kernel])
@pytest.mark.parametrize("count", [1, 7, 1024, 2500])
@pytest.mark.parametrize(
    ("scale", "changes"),
    [(0.25, {}), (1.0, {"weight_decay": 0.0}), (0.25, {"betas": (0.0, 0.999)})],
)
def test_three_steps_match_float64(op, count, scale, changes):
    weight, mean, square, compute_weight = state(count)
    gradients = [torch.randn(count, device=DEVICE) * 10.0**-turn for turn in range(3)]
    want = definition(weight, gradients, scale, **changes)
    for turn, gradient in enumerate(gradients, 1):
        op(
            weight,
            gradient.clone(),
            mean,
            square,
            compute_weight,
            numbers(turn, **changes),
            scaled_by(scale),
        )
        assert torch.equal(compute_weight, weight.to(NARROW))
    for got, exact in zip((weight, mean, square), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("op", [adamw, kernel])
def test_only_their_piece_of_memory_is_written(op):
    memory = [torch.randn(1400, device=DEVICE).abs() for _ in range(4)]
    memory.append(torch.randn(1400, device=DEVICE).half())
    before = [x.clone() for x in memory]
    op(*(x[start : start + 1100] for start, x in enumerate(memory, 1)), numbers(3), scaled_by(0.25))
    for start, (now, old) in enumerate(zip(memory, before, strict=True), 1):
        same = now == old
        assert same[:start].all() and same[start + 1100 :].all()
        assert start == 2 or not same[start : start + 1100].all()  # the gradient may stay


@pytest.mark.parametrize("op", [adamw, kernel])
def test_a_weight_that_never_had_a_gradient_only_decays(op):
    weight, mean, square, compute_weight = state(40)
    want = weight * (1 - 0.05 * 0.1)
    op(weight, torch.zeros_like(weight), mean, square, compute_weight, numbers(1), scaled_by(0.25))
    torch.testing.assert_close(weight, want, rtol=1e-6, atol=0)
    assert not mean.any() and not square.any()


@pytest.mark.parametrize("op", [adamw, kernel])
def test_a_scale_that_is_nan_changes_nothing(op):
    before = [x.fill_(0.5) for x in state(1100)]
    op(
        before[0],
        torch.full((1100,), torch.inf, device=DEVICE),
        *before[1:],
        numbers(1),
        scaled_by(torch.nan),
    )
    assert all((x == 0.5).all() for x in before)


def test_the_torch_form_is_torchs_own_optimizer_bit_for_bit(monkeypatch):
    monkeypatch.setitem(kernels._enabled, "adamw", False)
    weight, mean, square, compute_weight = state(300)
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW(
        [parameter], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    for turn in (1, 2, 3):
        gradient = torch.randn(300, device=DEVICE)
        parameter.grad = gradient * 0.25
        theirs.step()
        adamw(weight, gradient, mean, square, compute_weight, numbers(turn), scaled_by(0.25))
    assert torch.equal(weight, parameter) and torch.equal(mean, theirs.state[parameter]["exp_avg"])
    assert torch.equal(compute_weight, parameter.to(NARROW))


def test_what_does_not_belong_together_is_refused():
    pytest.importorskip("triton")
    weight, mean, square, compute_weight = state(8)
    with pytest.raises(ValueError, match=r"do not belong together: \(8,\), \(1,\)"):
        fused_adamw(
            weight,
            torch.ones(1, device=DEVICE),
            mean,
            square,
            compute_weight,
            numbers(1),
            scaled_by(1.0),
        )
    with pytest.raises(ValueError, match="do not belong together"):
        fused_adamw(
            weight,
            torch.ones(16, device=DEVICE)[::2],
            mean,
            square,
            compute_weight,
            numbers(1),
            scaled_by(1.0),
        )


def test_float64_has_no_kernel():
    assert (
        kernel_fits(torch.bfloat16)
        and kernel_fits(torch.float16)
        and not kernel_fits(torch.float64)
    )
