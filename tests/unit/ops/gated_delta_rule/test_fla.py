"""Documents as fla's kernels take them, with the definition in the kernel's place."""

import torch

from megatron_hypenet.ops.gated_delta_rule import naive_gated_delta_rule
from megatron_hypenet.ops.gated_delta_rule.fla import document_bounds, kernel_fits, run_kernel
from tests.unit.ops.gated_delta_rule.inputs import drawn


def kernel(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens=None):
    """Imitate a kernel with fla's signature: with bounds one row of tokens, one state per document,
    in and out."""
    assert output_final_state
    if cu_seqlens is None:
        return naive_gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=initial_state)
    assert q.shape[0] == 1
    outs, states = [], []
    for i, (start, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        part = (x[:, start:stop] for x in (q, k, v, g, beta))
        state = None if initial_state is None else initial_state[i : i + 1]
        o, final = naive_gated_delta_rule(*part, scale=scale, initial_state=state)
        outs.append(o)
        states.append(final)
    return torch.cat(outs, dim=1), torch.cat(states)


def test_documents_and_states_of_rows():
    inputs = [x.detach().float() for x in drawn(9)]
    ids = torch.tensor([[0, 0, 0, 4, 4, 5, 5, 5, 5], [7] * 9])
    state = torch.randn(2, 3, 8, 6)
    for given in (None, state):
        for documents in (None, ids):
            options = {"scale": 0.5, "initial_state": given, "document_ids": documents}
            want = naive_gated_delta_rule(*inputs, **options)
            got = run_kernel(kernel, *inputs, **options)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y)


def test_bounds():
    first, bounds = document_bounds(torch.tensor([[0, 0, 1], [1, 1, 1], [2, 3, 3]]))
    assert first.tolist() == [0, 2, 3]
    assert bounds.tolist() == [0, 2, 3, 6, 7, 9]


def test_kernels_that_are_not_made_for_it():
    assert not kernel_fits(torch.float64, 64) and not kernel_fits(torch.bfloat16, 512)
