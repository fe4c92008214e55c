"""One node of the graph gives the bits of its five steps, and runs only where all of their kernels
do."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops import kernels, lightning_mix
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.gated_norm import fused_gated_norm
from megatron_hypenet.ops.lightning_attn.triton import triton_lightning_attn
from megatron_hypenet.ops.norm_rope import fused_norm_rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 2
DIM = 32
SCALE = DIM**-0.5
EPS = 1e-6


def steps(projected, q_weight, k_weight, o_weight, angles, ids):
    """The same kernels, one node each."""
    q, k, v, gate = projected.chunk(4, -1)
    q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in (q, k, v))
    q, k = fused_norm_rope(q, q_weight, angles, EPS), fused_norm_rope(k, k_weight, angles, EPS)
    o, _ = triton_lightning_attn(
        *(x.transpose(0, 1) for x in (q, k, v)), log_decay(HEADS), scale=SCALE, document_ids=ids
    )
    return fused_gated_norm(o.transpose(0, 1).flatten(-2), gate, o_weight, EPS)


def fused(projected, q_weight, k_weight, o_weight, angles, ids):
    return lightning_mix.lightning_mix(
        projected,
        q_weight,
        k_weight,
        o_weight,
        angles,
        log_decay(HEADS),
        scale=SCALE,
        eps=EPS,
        document_ids=ids,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "tokens", "documents"), [(1, 70, False), (2, 33, True), (1, 600, True)]
)
def test_bits_of_its_steps(dtype, batch, tokens, documents):
    width = HEADS * DIM
    draw = lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)  # noqa: E731
    projected = draw(tokens, batch, 4 * width)
    dy = draw(tokens, batch, width)
    weights = [draw(DIM), draw(DIM), draw(width)]
    half = torch.arange(tokens, device=DEVICE)[:, None] * 1e4 ** -(
        torch.arange(DIM // 2, device=DEVICE) / (DIM // 2)
    )
    angles = torch.cat((half, half), -1)[:, None, None]
    ids = (
        (torch.arange(tokens, device=DEVICE) // 20).int().expand(batch, tokens)
        if documents
        else None
    )
    results = []
    for op in (fused, steps):
        inputs = [x.detach().clone().requires_grad_() for x in (projected, *weights)]
        y = op(*inputs, angles, ids)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want) and torch.isfinite(got).all()


def test_runs_where_all_its_kernels_do(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", dict.fromkeys(kernels.FAMILIES, True))
    assert lightning_mix.kernel_fits(torch.bfloat16, 128, 2048)
    assert not lightning_mix.kernel_fits(
        torch.float64, 128, 2048
    ) and not lightning_mix.kernel_fits(torch.bfloat16, 48, 2048)
    projected = torch.zeros(4, 1, 4 * HEADS * DIM, device=DEVICE)
    assert lightning_mix.fits(projected, DIM) == (DEVICE.type == "cuda")
    assert kernels.enabled("lightning_mix")
    kernels.disable("gated_norm")
    assert not kernels.enabled("lightning_mix") and not lightning_mix.fits(projected, DIM)
