"""The kernels launched directly: every element is written, rows past the end are not read."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.gated_norm import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_partial_sums_cover_all_rows(monkeypatch):
    x = torch.randn(7, 3, 20, device=DEVICE)
    weight = torch.ones(20, device=DEVICE)
    gate = torch.full_like(x, 100.0)  # open
    _, _, want = kernels.backward(x, gate, weight, x, 0.0)
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 4)
    _, _, got = kernels.backward(x, gate, weight, x, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    normal = torch.nn.functional.rms_norm(x, (20,))
    torch.testing.assert_close(got, (x * normal).sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_narrow_inputs_give_narrow_outputs():
    x = torch.randn(3, 1, 20, device=DEVICE).half()
    weight = torch.ones(20, device=DEVICE).half()
    outputs = (kernels.forward(x, x, weight, 1e-6), *kernels.backward(x, x, weight, x, 1e-6))
    assert all(output.dtype == torch.float16 for output in outputs)
