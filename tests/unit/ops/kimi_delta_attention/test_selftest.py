"""The family is checked with a decay per channel."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from megatron_hypenet.model.kernel_guard import DOCTOR_USE
from megatron_hypenet.ops.kimi_delta_attention import selftest
from tests.unit.ops.gated_delta_rule.test_fla import kernel


def test_the_kernel_gets_a_decay_per_channel(monkeypatch):
    shapes = []

    def chunk_kda(q, k, v, g, beta, **options):
        shapes.append((g.shape[-1], q.shape[-1]))
        return kernel(q, k, v, g, beta, **options)

    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops.kda", SimpleNamespace(chunk_kda=chunk_kda))
    use = replace(DOCTOR_USE, dtype=torch.float32, head_dim=4, thorough=False)
    found = selftest.check_kimi_delta_attention_use(torch.device("cpu"), use)
    assert found.ok and shapes == [(4, 4)]
