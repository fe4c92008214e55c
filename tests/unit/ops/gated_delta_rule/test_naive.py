"""The definition against the matrix form of the recurrence, in numbers small enough to read."""

import pytest
import torch

from megatron_hypenet.ops.gated_delta_rule import naive_gated_delta_rule
from tests.unit.ops.gated_delta_rule.inputs import drawn


@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_products_of_matrices(per_channel):
    """The recurrence is S_t = (I - beta k k^T) Diag(decay) S_(t-1) + beta k v^T."""
    q, k, v, g, beta = drawn(6, per_channel=per_channel, b=1, h=1)
    o, final = naive_gated_delta_rule(q, k, v, g, beta, scale=0.5)
    state = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype)
    for t in range(6):
        key = k[0, t, 0][:, None]
        decay = torch.diag(g[0, t, 0].exp().expand(k.shape[-1]))
        eye = torch.eye(k.shape[-1], dtype=k.dtype)
        forget = (eye - beta[0, t, 0] * key @ key.T) @ decay
        state = forget @ state + beta[0, t, 0] * key @ v[0, t, 0][None]
        torch.testing.assert_close(o[0, t, 0], 0.5 * q[0, t, 0] @ state)
    torch.testing.assert_close(final[0, 0], state)


def test_documents_are_as_if_alone():
    inputs = drawn(9)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 1 + [3] * 8])
    o, final = naive_gated_delta_rule(*inputs, scale=1.0, document_ids=ids)
    alone, end = naive_gated_delta_rule(*(x[:1, 4:] for x in inputs), scale=1.0)
    torch.testing.assert_close(o[:1, 4:], alone)
    torch.testing.assert_close(final[:1], end)
