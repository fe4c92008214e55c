"""The fused kernel of dk and dv against the two scans it replaces."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.lightning_attn import triton as kernels
from megatron_hypenet.ops.lightning_attn.triton_plan import Blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("packed", [False, True])
def test_fused_equals_two_scans(packed):
    t = 150
    q, k, v, do = (torch.randn(2, t, 2, d, device=DEVICE) for d in (16, 16, 32, 32))
    initial, dfinal = torch.randn(2, 2, 2, 16, 32, device=DEVICE).unbind(0)
    decay = torch.tensor([-0.1, -0.7], device=DEVICE)
    ids = (torch.arange(t, device=DEVICE) // 70).int().expand(2, t).contiguous() if packed else None
    plan = dataclasses.replace(kernels._plan(q, v), segment_tokens=64, num_segments=3)
    states = kernels._segment_states(q, do, decay, ids, plan, reverse=True)
    fused, scans = (
        [torch.empty_like(k), torch.empty_like(v), torch.empty_like(initial)] for _ in range(2)
    )
    kernels._dkdv(
        q,
        k,
        v,
        do,
        *fused[:2],
        states,
        dfinal,
        fused[2],
        decay,
        ids,
        0.5,
        plan,
        Blocks(32, 32, 4, 2),
    )
    kernels._scan(
        k,
        q,
        do,
        scans[1],
        states,
        dfinal,
        scans[2],
        decay,
        ids,
        0.5,
        plan,
        reverse=True,
        transposed=False,
    )
    kernels._scan(
        v,
        do,
        q,
        scans[0],
        states,
        dfinal,
        None,
        decay,
        ids,
        0.5,
        plan,
        reverse=True,
        transposed=True,
    )
    for got, want in zip(fused, (scans[0], scans[1], scans[2] * 0.5), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
