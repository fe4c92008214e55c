import torch

from megatron_hypenet.ops.lightning_attn import selftest


def test_passes_where_the_operator_is_right(monkeypatch):
    monkeypatch.setattr(selftest, "LIMITS", {torch.bfloat16: 8e-3, torch.float32: 1e-5})
    checks = selftest.check_kernels("cpu")
    assert len(checks) == 4 and all(check.ok for check in checks), checks
    assert {check.name for check in checks} >= {"lightning_attn bfloat16 head_dim 64", "lightning_attn float32 head_dim 128 packed"}


def test_a_wrong_operator_fails_by_name(monkeypatch):
    right = selftest.lightning_attn
    monkeypatch.setattr(selftest, "lightning_attn", lambda q, k, v, decay, **kwargs: right(q, k, v * 1.02, decay, **kwargs))
    errors = selftest.relative_errors("cpu", torch.float32, head_dim=64, documents=False, tokens=200)
    assert errors["o"] > 1e-5 and set(errors) == set(selftest.NAMES)


def test_nan_is_never_ok():
    assert not selftest.KernelCheck("x", "o", float("nan"), 1.0).ok
