"""The launch parameters of the Lightning Attention kernels: block shapes, warps, pipeline depth,
and tokens per segment.

Nothing is tuned at run time: the same call always runs the same code, so results repeat bit for
bit. The parameters come from the sweep in tools/bench/results/."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# Cost of starting a segment (its own state, the entering state, filling the pipeline), in tokens of
# the main loop.
SEGMENT_COST_TOKENS = 384
MIN_SEGMENT_TOKENS = 256
# What the fused kernel of dk and dv needs at 128 dims, and the pipelines at 256: data-centre GPUs
# have it, others about 99 KiB.
SHARED_BYTES_OF_WIDE = 160 * 1024
# What four pipeline stages of the scan need at 128 dims: Hopper and later have it.
SHARED_BYTES_OF_DEEP = 200 * 1024


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which a plan depends."""

    processors: int
    shared_bytes: int
    """The most shared memory of one program."""
    all_products: bool = True
    """Whether Triton compiles every product for it: for Hopper, versions before 3.4 fail with
    16-bit types over 8 warps, and 3.2 with TF32."""


H100 = Gpu(132, 227 * 1024)


@dataclass(frozen=True)
class Blocks:
    """Launch parameters of one kernel."""

    chunk: int
    """Tokens per step."""
    columns: int
    """Columns of the outermost dim that one program holds."""
    warps: int
    stages: int
    """Depth of the load pipeline; 1 loads when needed."""


@dataclass(frozen=True)
class Plan:
    """Everything that `triton.py` decides before it launches."""

    states: Blocks
    scan: Blocks
    dkdv: Blocks | None
    """None: the state is too large for one program, so dk and dv are two scans."""
    segment_tokens: int
    num_segments: int
    precision: str
    """Precision of float32 products; 16-bit types ignore it."""


def power_of_two(dim: int) -> int:
    """Return the block that holds `dim` columns: the next power of two, at least 16 (the smallest
    matrix unit)."""
    return max(16, 1 << (dim - 1).bit_length())


def make_plan(
    *, batch: int, tokens: int, heads: int, dim_k: int, dim_v: int, dtype: torch.dtype, gpu: Gpu
) -> Plan:
    """Return the plan for q, k [batch, tokens, heads, dim_k] and v [.., dim_v] on this GPU."""
    widest = max(power_of_two(dim_k), power_of_two(dim_v))
    wide = widest >= 128
    if dtype == torch.float32:
        chunk = 32
        fused = widest <= 64
        scan = states = Blocks(chunk, widest if widest <= 128 else 32, 8 if wide else 4, 2)
    else:
        chunk = 64
        fused = widest <= 128
        # deep pipelines where shared memory lets them: one program of four stages beats two of two
        # stages (0.72 and 0.81 ms of 0.72 ms that the bytes take, T = 131,072 and H = 16 on an
        # H100)
        deep = widest <= 128 and gpu.shared_bytes >= SHARED_BYTES_OF_DEEP
        scan = Blocks(chunk, min(widest, 64), 4, 4 if deep else 2)
        # q and k are read once for each block of columns, so large blocks are faster: 0.24 ms
        # instead of 0.32. Chunks of 32 would take
        if widest > 128:
            # 0.20, but more then passes through the state, which products see rounded: errors grow
            # by 2%
            scan = (
                Blocks(chunk, 128, 8, 2)
                if gpu.shared_bytes >= SHARED_BYTES_OF_WIDE
                else Blocks(chunk, 64, 8, 2)
            )
        states = Blocks(chunk, min(widest, 64), 4 if widest <= 128 else 8, 3)
    small = gpu.shared_bytes < SHARED_BYTES_OF_WIDE
    if small or not gpu.all_products:
        fused = fused and not wide
    if not gpu.all_products and dtype != torch.float32:
        scan, states = replace(scan, warps=4), replace(states, warps=4)
    if small and wide and dtype == torch.float32:
        # 64 KiB; 128 columns want 160 KiB of Triton 3.2
        scan = replace(scan, columns=min(scan.columns, 64), stages=1)
    if small and widest > 128:
        scan, states = replace(scan, stages=1), replace(states, stages=1)
    dkdv = Blocks(chunk, widest, 8 if wide else 4, 2) if fused else None
    segment_tokens = choose_segment(batch * heads, tokens, chunk, gpu.processors)
    precision = float32_precision() if gpu.all_products else "tf32x3"
    return Plan(states, scan, dkdv, segment_tokens, -(-tokens // segment_tokens), precision)


@lru_cache(maxsize=1024)
def choose_segment(sequences: int, tokens: int, chunk: int, processors: int) -> int:
    """Return the tokens per segment, a multiple of `chunk`: as few segments as keep all processors
    evenly busy.

    `sequences` is batch * heads. The slowest processor runs ceil(sequences * segments / processors)
    segments one after another."""
    best = 0
    best_cost = float("inf")
    for segments in range(1, max(1, min(128, tokens // MIN_SEGMENT_TOKENS)) + 1):
        segment = round_up(round_up(tokens, segments) // segments, chunk)
        rounds = -(-sequences * segments // processors)
        cost = rounds * (segment + (SEGMENT_COST_TOKENS if segments > 1 else 0))
        if cost < best_cost:
            best = segment
            best_cost = cost
    return best


def round_up(count: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-count // multiple) * multiple


def float32_precision() -> str:
    """Return the precision of products of float32 inputs, by torch's own switch: full unless
    `torch.set_float32_matmul_precision` lowered it."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
