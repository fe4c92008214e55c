"""One node of the graph gives the bits of its five steps, and runs only where all of their kernels
do."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.model.mixers.lightning_attn import decay_algebra
from megatron_hypenet.ops import kernels, lightning_mix
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.gated_norm import fused_gated_norm
from megatron_hypenet.ops.lightning_attn.triton import triton_lightning_attn
from megatron_hypenet.ops.norm_rope import fused_norm_rope
from megatron_hypenet.parallel.context.layout import local_part, natural_order
from megatron_hypenet.parallel.context.state_exchange import StateTransfer, split_chunks
from tests.threaded_ranks import on_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 2
DIM = 32
SCALE = DIM**-0.5
EPS = 1e-6


def steps(projected, q_weight, k_weight, o_weight, angles, ids):
    """Run the same kernels, one node each."""
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


# Triton's interpreter runs one kernel at a time: there one rank, whose two chunks are the sequence
@pytest.mark.parametrize("size", [1, 2] if DEVICE.type == "cuda" else [1])
@pytest.mark.parametrize("document_tokens", [None, 20, 48])
def test_chunks_on_ranks_are_the_whole_sequence(size, document_tokens):
    """Outputs and gradients of two chunks per rank, whose states cross through `StateTransfer`, are
    those of the whole."""
    tokens = 96 * size
    width = HEADS * DIM
    torch.manual_seed(2)
    projected = torch.randn(tokens, 1, 4 * width, device=DEVICE)
    dy = torch.randn(tokens, 1, width, device=DEVICE)
    weights = [torch.rand(n, device=DEVICE) + 0.5 for n in (DIM, DIM, width)]
    half = torch.arange(tokens, device=DEVICE)[:, None] * torch.rand(1, DIM // 2, device=DEVICE)
    angles = torch.cat((half, half), -1)[:, None, None]
    ids = None
    if document_tokens:
        ids = (torch.arange(tokens, device=DEVICE) // document_tokens).int()[None]

    def gradients(inputs, y, d_out):
        return [y.detach(), *torch.autograd.grad(y, inputs, d_out)]

    inputs = [x.clone().requires_grad_() for x in (projected, *weights)]
    whole = gradients(inputs, fused(*inputs, angles, ids), dy)

    def one_rank(group):
        def mine(x):
            return local_part(x, group.rank(), size, 0)

        inputs = [x.clone().requires_grad_() for x in (mine(projected), *weights)]
        chunks = split_chunks(tokens // size, group, ids)
        decay = log_decay(HEADS).to(DEVICE)
        transfer = StateTransfer(group, decay_algebra(decay, chunks))
        y = lightning_mix.lightning_mix(
            *inputs,
            mine(angles),
            decay,
            scale=SCALE,
            eps=EPS,
            document_ids=chunks.rows,
            transfer=transfer,
        )
        return gradients(inputs, y, mine(dy))

    found = on_ranks(size, one_rank)
    for index in (0, 1):  # outputs and the gradient of the projection, per token
        got = natural_order([rank[index] for rank in found], 0)
        torch.testing.assert_close(got, whole[index], rtol=1e-4, atol=1e-4)
    for index in (2, 3, 4):  # gradients of weights, summed over the ranks
        got = sum(rank[index] for rank in found)
        torch.testing.assert_close(got, whole[index], rtol=1e-4, atol=1e-3)


def test_sequences_on_ranks_come_one_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", dict.fromkeys(kernels.FAMILIES, True))
    two = torch.zeros(4, 2, 4 * HEADS * DIM, device=DEVICE)
    assert not lightning_mix.fits(two, DIM, split=True)


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
