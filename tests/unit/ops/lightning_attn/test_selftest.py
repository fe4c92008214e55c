"""The checks pass where kernels are right (in Triton's interpreter without a GPU) and fail where
they are wrong."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
from megatron_hypenet.ops.lightning_attn import selftest
from megatron_hypenet.ops.lightning_attn import triton as lightning_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter cannot multiply bf16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
CHECKS = {
    "lightning": lambda dtype: selftest.check_lightning(
        DEVICE, dtype, head_dim=16, documents=False, states=False, pieces=False, tokens=200
    ),
    "lightning_mix": lambda dtype: selftest.check_lightning_mix(
        DEVICE, dtype, head_dim=32, heads=2, documents=True, tokens=70
    ),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(name, dtype):
    found = CHECKS[name](dtype)
    assert found.ok and found.error > 0, found


def test_lightning_with_everything():
    found = selftest.check_lightning(
        DEVICE, torch.float32, head_dim=16, documents=True, states=True, pieces=True, tokens=300
    )
    assert found.ok and "packed float32" in found.name, found


@pytest.mark.parametrize("states", [False, True])
def test_every_tensor_of_lightning_is_compared(monkeypatch, states):
    seen = {}
    monkeypatch.setattr(selftest, "check", lambda name, dtype, limit, run: seen.update(run()))
    selftest.check_lightning(
        DEVICE, torch.float32, head_dim=16, documents=False, states=states, pieces=True, tokens=64
    )
    wanted = {"o", "dq", "dk", "dv"} | ({"final state", "d initial state"} if states else set())
    assert {name.removesuffix(" by descriptors") for name in seen} == wanted | {"state alone"}
    assert all(
        got.shape == want.shape and want.dtype == torch.float64 for got, want in seen.values()
    )


def test_tf32_products_are_allowed_where_torch_allows_them(monkeypatch):
    limits = []
    monkeypatch.setattr(selftest, "check", lambda name, dtype, limit, run: limits.append(limit))
    for precision in ("highest", "high"):
        monkeypatch.setattr(
            torch, "get_float32_matmul_precision", lambda precision=precision: precision
        )
        selftest.check_lightning(
            DEVICE, torch.float32, head_dim=16, documents=False, states=False, pieces=False
        )
    assert limits == [selftest.PRODUCT_LIMITS[torch.float32], selftest.TF32_LIMIT]


WRONG = {
    "lightning": (lightning_kernels, "forward", lambda o, *rest: (o * 1.02, *rest), "o"),
    "lightning_mix": (gated_norm_kernels, "forward", lambda *rows: torch.stack(rows) * 1.02, "y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_fail_and_say_where(monkeypatch, name):
    module, function, spoil, worst = WRONG[name]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: spoil(*right(*args)))
    found = CHECKS[name](torch.float32)
    assert (
        not found.ok
        and found.worst.partition(" with")[0] == worst
        and 0.01 < found.error < 0.03
        and worst in str(found)
    )
