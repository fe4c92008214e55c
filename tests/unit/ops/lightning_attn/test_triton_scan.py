"""The scan with its roles exchanged, forward and in reverse, against sums written out in
float64."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.lightning_attn import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_kernel_computes_every_direction(reverse, transposed):
    t = 150
    dx = 16
    dz = 32
    x, y, z = (torch.randn(1, t, 2, d, device=DEVICE) for d in (dx, dx, dz))
    outer = torch.randn(1, 2, *((dz, dx) if transposed else (dx, dz)), device=DEVICE)
    log2 = torch.tensor([-0.1, -0.7], device=DEVICE)
    plan = dataclasses.replace(kernels._plan(x, z), segment_tokens=64, num_segments=3)
    out, final = torch.empty_like(z), torch.empty_like(outer)
    left, right = (z, y) if transposed else (y, z)
    states = kernels._segment_states(left, right, log2, None, plan, reverse=reverse)
    kernels._scan(
        x,
        y,
        z,
        out,
        states,
        outer,
        final,
        log2,
        None,
        0.5,
        plan,
        reverse=reverse,
        transposed=transposed,
    )

    i = torch.arange(t, device=DEVICE)
    distance = (i[None, :] - i[:, None]) if reverse else (i[:, None] - i[None, :])
    weights = torch.where(
        distance >= 0, torch.exp2(log2.double()[:, None, None] * distance.clamp(min=0)), 0.0
    )
    state = (outer.transpose(2, 3) if transposed else outer).double()
    far = (t - 1 - i) if reverse else i + 1  # distance to the outer state
    seen = torch.exp2(log2.double()[:, None] * far)
    xs, ys, zs = x.double(), y.double(), z.double()
    want = torch.einsum("bihx,bjhx,hij,bjhz->bihz", xs, ys, weights, zs) + torch.einsum(
        "bihx,bhxz,hi->bihz", xs, state, seen
    )
    torch.testing.assert_close(out.double(), want * 0.5, rtol=1e-4, atol=1e-5)
    joins = torch.exp2(log2.double()[:, None] * ((i + 1) if reverse else (t - 1 - i)))
    last = torch.exp2(log2.double() * t)[:, None, None] * state + torch.einsum(
        "bjhx,hj,bjhz->bhxz", ys, joins, zs
    )
    torch.testing.assert_close(
        (final.transpose(2, 3) if transposed else final).double(), last, rtol=1e-4, atol=1e-5
    )
