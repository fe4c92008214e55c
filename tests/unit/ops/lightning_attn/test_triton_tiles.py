"""The pieces of the kernels that plain torch can state: decays of a chunk, and tiles with their
masks."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from megatron_hypenet.ops.lightning_attn import triton_tiles as tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def decays_kernel(pairs, enter, join, decay, count, chunk: tl.constexpr, reverse: tl.constexpr):
    i = tl.arange(0, chunk)
    tl.store(pairs + i[:, None] * chunk + i[None, :], tiles.pair_decay(decay, chunk, reverse))
    first, second = tiles.edge_decays(decay, count, chunk, reverse)
    tl.store(enter + i, first)
    tl.store(join + i, second)


@triton.jit
def copy_kernel(
    source,
    target,
    start,
    length,
    stride,
    dim: tl.constexpr,
    cols: tl.constexpr,
    access: tl.constexpr,
):
    tile = tiles.load_tile(source, 0, 1, tl.load(start), stride, length, 0, dim, 16, cols, access)
    tiles.store_tile(
        target, tile * 2, 0, 1, tl.load(start), stride, length, 0, dim, 16, cols, access
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [-0.25, -300.0])
def test_decays_of_a_chunk(decay, reverse):
    pairs = torch.empty(16, 16, device=DEVICE)
    enter = torch.empty(16, device=DEVICE)
    join = torch.empty(16, device=DEVICE)
    decays_kernel[(1,)](pairs, enter, join, decay, 10, chunk=16, reverse=reverse)
    i = torch.arange(16, device=DEVICE, dtype=torch.float64)
    distance = (i[None, :] - i[:, None]) if reverse else (i[:, None] - i[None, :])
    want = torch.where(distance >= 0, torch.exp2(decay * distance.clamp(min=0)), 0.0)
    torch.testing.assert_close(pairs.double(), want, rtol=1e-6, atol=1e-30)
    from_start = torch.exp2(decay * (i + 1))
    to_end = torch.exp2(decay * (9 - i).clamp(min=0))
    for got, expected in zip(
        (enter, join), (to_end, from_start) if reverse else (from_start, to_end), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-30)


def test_tiles_stop_at_the_end_of_the_sequence_and_of_the_dim():
    source = torch.randn(40, 24, device=DEVICE)
    target = torch.full((40, 24), -1.0, device=DEVICE)
    start = torch.tensor(30, device=DEVICE, dtype=torch.int32)
    copy_kernel[(1,)](source, target, start, 40, 24, dim=20, cols=32, access=tiles.MASKED)
    assert torch.equal(target[30:, :20], source[30:, :20] * 2)
    assert (target[:30] == -1).all() and (target[:, 20:] == -1).all()
