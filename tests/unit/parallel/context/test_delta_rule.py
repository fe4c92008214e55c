"""Chunks of a delta rule on several ranks give what one rank gives, outputs and gradients.

The whole mixers are in tests/unit/model/mixers/test_contract.py."""

import pytest
import torch

from megatron_hypenet.ops.gated_delta_rule import gated_delta_rule
from megatron_hypenet.parallel.context.delta_rule import context_delta_rule
from megatron_hypenet.parallel.context.layout import local_part, natural_order
from tests.threaded_ranks import on_ranks
from tests.unit.ops.gated_delta_rule.inputs import drawn


def computed(inputs, weight, group, ids):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = context_delta_rule(gated_delta_rule, *inputs, scale=0.5, group=group, document_ids=ids)
    return o.detach(), *torch.autograd.grad(o, inputs, weight)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_two_ranks_equal_one(per_channel, packed):
    inputs = drawn(24, per_channel=per_channel)
    ids = torch.tensor([[0] * 5 + [1] * 13 + [2] * 6, [0] * 12 + [1] * 12]) if packed else None
    weight = torch.randn(2, 24, 3, 6, dtype=torch.float64)
    (want,) = on_ranks(1, lambda group: computed(inputs, weight, group, ids))

    def rank(group):
        own, part = (
            [local_part(x, group.rank(), 2, 1) for x in given] for given in (inputs, [weight])
        )
        return computed(own, part[0], group, ids)

    for index, (early, late) in enumerate(zip(*on_ranks(2, rank), strict=True)):
        torch.testing.assert_close(
            natural_order([early, late], 1), want[index], rtol=1e-10, atol=1e-12
        )
