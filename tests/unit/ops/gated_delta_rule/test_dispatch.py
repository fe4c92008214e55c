"""On the CPU the front is the chunked form; a summary from two final states is the chunked one."""

import pytest
import torch

from megatron_hypenet.ops.gated_delta_rule import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
    gated_delta_rule,
    naive_gated_delta_rule,
)
from megatron_hypenet.ops.gated_delta_rule.dispatch import summary_from_states
from tests.unit.ops.gated_delta_rule.inputs import drawn


def test_the_front_on_the_cpu():
    inputs = drawn(20)
    for got, want in (
        (gated_delta_rule(*inputs, scale=2.0), chunked_gated_delta_rule(*inputs, scale=2.0)),
        (gated_delta_rule.summary(*inputs[1:]), chunked_gated_delta_summary(*inputs[1:])),
    ):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_summary_from_states(per_channel, packed):
    _, k, v, g, beta = (x.detach() for x in drawn(20, per_channel=per_channel))
    ids = torch.tensor([[0] * 12 + [1] * 8, [0] * 20]) if packed else None

    def rule(*inputs, initial_state=None, **options):
        # as the kernels do, it takes a float32 state
        state = None if initial_state is None else initial_state.double()
        return naive_gated_delta_rule(*inputs, initial_state=state, **options)

    got = summary_from_states(rule, k, v, g, beta, ids)
    want = chunked_gated_delta_summary(k, v, g, beta, document_ids=ids)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
