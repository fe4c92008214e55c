import torch

from megatron_hypenet.ops.gated_delta_rule import (
    chunked_gated_delta_summary,
    naive_gated_delta_rule,
)
from megatron_hypenet.ops.kimi_delta_attention import kimi_delta_attention
from tests.unit.ops.gated_delta_rule.inputs import drawn


def test_on_the_cpu_it_is_the_definition():
    inputs = drawn(20, per_channel=True)
    got = kimi_delta_attention(*inputs, scale=2.0)
    want = naive_gated_delta_rule(*inputs, scale=2.0)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    summary = kimi_delta_attention.summary(*inputs[1:])
    chunked = chunked_gated_delta_summary(*inputs[1:])
    assert all(torch.equal(x, y) for x, y in zip(summary, chunked, strict=True))
