"""The checks pass where kernels are right (in Triton's interpreter without a GPU) and fail where
they are wrong or do not run."""

import math

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops import selftest
from megatron_hypenet.ops.adamw import triton as adamw_kernels
from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
from megatron_hypenet.ops.gradient_sum import triton as gradient_sum_kernels
from megatron_hypenet.ops.norm_rope import triton as norm_rope_kernels
from megatron_hypenet.ops.rms_norm import triton as rms_norm_kernels
from megatron_hypenet.ops.sigmoid_gate import triton as sigmoid_gate_kernels
from megatron_hypenet.ops.swiglu import triton as swiglu_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter cannot multiply bf16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
CHECKS = {
    "norm_rope": lambda dtype: selftest.check_norm_rope(DEVICE, dtype, head_dim=32, tokens=20),
    "gated_norm": lambda dtype: selftest.check_gated_norm(DEVICE, dtype, width=48, tokens=20),
    "rms_norm": lambda dtype: selftest.check_rms_norm(DEVICE, dtype, width=520, tokens=20),
    "sigmoid_gate": lambda dtype: selftest.check_sigmoid_gate(DEVICE, dtype, width=48, tokens=20),
    "swiglu": lambda dtype: selftest.check_swiglu(DEVICE, dtype, width=48, tokens=20),
    "gradient_sum": lambda dtype: selftest.check_gradient_sum(DEVICE, dtype, count=50),
    "adamw": lambda dtype: selftest.check_adamw(DEVICE, dtype, count=1100),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(name, dtype):
    found = CHECKS[name](dtype)
    assert found.ok and (found.error > 0) == (name != "gradient_sum"), found


WRONG = {
    "norm_rope": (norm_rope_kernels, "backward", lambda dx, dw: (dx, dw * 1.02), "d weight"),
    "gated_norm": (
        gated_norm_kernels,
        "backward",
        lambda dx, dgate, dw: (dx, dgate * 1.02, dw),
        "d gate",
    ),
    "rms_norm": (rms_norm_kernels, "backward", lambda dx, dw: (dx, dw * 1.02), "d weight"),
    "rms_norm of a sum": (rms_norm_kernels, "add_forward", lambda y, total: (y, total * 1.02), "y"),
    "sigmoid_gate": (
        sigmoid_gate_kernels,
        "backward",
        lambda dx, dgate: (dx, dgate * 1.02),
        "d gate",
    ),
    "swiglu": (swiglu_kernels, "backward", lambda *rows: (torch.stack(rows) * 1.02,), "d x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_fail_and_say_where(monkeypatch, name):
    module, function, spoil, worst = WRONG[name]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: spoil(*right(*args)))
    found = CHECKS[name.partition(" ")[0]](torch.float32)
    assert (
        not found.ok
        and found.worst.partition(" with")[0] == worst
        and 0.01 < found.error < 0.03
        and worst in str(found)
    )


def test_a_sum_that_is_off_by_its_last_bit_fails(monkeypatch):
    right = gradient_sum_kernels.run

    def rounded(total, gradient, add):
        right(total, gradient, add)
        if add:
            total[-1] = torch.nextafter(total[-1], total.new_tensor(torch.inf))

    monkeypatch.setattr(gradient_sum_kernels, "run", rounded)
    found = CHECKS["gradient_sum"](torch.float16)
    assert (
        not found.ok
        and found.worst.startswith("sum of")
        and 0 < found.error < 1e-6
        and "limit 0.0e+00" in str(found)
    )


def test_an_update_that_is_off_fails(monkeypatch):
    right = adamw_kernels.run

    def spoilt(weight, gradient, exp_avg, exp_avg_sq, narrow, step, scale):
        right(weight, gradient, exp_avg, exp_avg_sq, narrow, step, scale)
        exp_avg_sq.mul_(1.02 if scale.isfinite() else 1.0)

    monkeypatch.setattr(adamw_kernels, "run", spoilt)
    found = CHECKS["adamw"](torch.float32)
    assert (
        not found.ok and found.worst == "second moment of step 2" and 0.01 < found.error < 0.05
    ), found


def test_compute_weights_that_are_not_the_fp32_weights_rounded_fail(monkeypatch):
    right = adamw_kernels.run
    monkeypatch.setattr(adamw_kernels, "run", lambda *args: right(*args) or args[4].mul_(0.999))
    found = CHECKS["adamw"](torch.float16)
    assert (
        not found.ok
        and "the weights in the compute dtype are not the fp32 weights rounded" in str(found)
    )


def test_nan_is_the_worst_of_all():
    one = torch.ones(2, dtype=torch.float64)
    nan = torch.tensor([1.0, math.nan])
    found = selftest.check(
        "x",
        torch.float32,
        1.0,
        lambda: {"far": (one * 9, one), "nan": (nan, one), "right": (one, one)},
    )
    assert found.worst == "nan" and not found.ok


def test_a_kernel_that_does_not_run_is_a_finding():
    def run():
        raise RuntimeError("out of resource: shared memory\nmore lines")

    found = selftest.check("x", torch.bfloat16, 1.0, run)
    assert not found.ok and str(found) == "x bfloat16: RuntimeError: out of resource: shared memory"
