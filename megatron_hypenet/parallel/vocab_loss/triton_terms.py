"""The terms of `torch_terms.py` as Triton kernels for fp32 logits: same functions, same statistics,
same shapes.

A program owns one tile of one token's vocabulary. Split form (tensor parallel): one kernel reads
the logits for the statistics, one reads them again for the gradient. One-pass form (whole
vocabulary here): a program keeps its exponentials in registers while the tiles of its token
synchronise at a counter, so logits are read once and only gradients are written: 10 instead of 18
bytes per token and vocabulary row. Programs number themselves when they start and a token's tiles
are consecutive, so the programs waited for are already running; that needs room for one token's
tiles on the device at once, else the split form is used.

One file, because both losses share the reductions and the form of their kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.parallel.vocab_loss.torch_terms import ce_loss, kl_loss

__all__ = ["ce_gradient", "ce_loss", "ce_merge", "ce_stats", "ce_stats_and_gradient"]
__all__ += ["kl_gradient", "kl_loss", "kl_merge", "kl_stats", "kl_stats_and_gradient"]

TILE = 2048
NUM_WARPS = 4
MERGE_TOKENS = 32


@triton.jit
def _larger(a, b, x, y):
    return tl.maximum(a, x), tl.maximum(b, y)


@triton.jit
def _sums(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _kl_numbers(s, t, inside):
    """Return the shifted exponentials of a tile and its five statistics; rows outside the
    vocabulary hold -inf and count as zero."""
    t_max, s_max = tl.reduce((t, s), 0, _larger)
    t, s = t - t_max, s - s_max
    p, q = tl.exp(t), tl.exp(s)
    t_sum, a, s_sum = tl.reduce((p, p * tl.where(inside, t - s, 0.0), q), 0, _sums)
    return p, q, t_max, t_sum, a, s_max, s_sum


@triton.jit
def _kl_merged(used, t_max, t_sum, a, s_max, s_sum):
    """Merge statistics of parts (first axis) -> statistics of the whole; `used` marks the parts
    that exist, the others hold -inf and 0."""
    t_top, s_top = tl.reduce((t_max, s_max), 0, _larger)
    t_shift, s_shift = tl.where(used, t_max - t_top, 0.0), tl.where(used, s_max - s_top, 0.0)
    scale = tl.exp(t_shift)
    a = scale * (a + t_sum * (t_shift - s_shift))
    t_total, a_total, s_total = tl.reduce((t_sum * scale, a, s_sum * tl.exp(s_shift)), 0, _sums)
    return t_top, t_total, a_total, s_top, s_total


@triton.jit
def _kl_stats_kernel(s_ptr, t_ptr, stats_ptr, n, v, tiles, TILE: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    inside = vocab_ids < v
    s = tl.load(s_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    t = tl.load(t_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    _, _, t_max, t_sum, a, s_max, s_sum = _kl_numbers(s, t, inside)
    at = stats_ptr + tile * 5 * n + row
    tl.store(at, t_max)
    tl.store(at + n, t_sum)
    tl.store(at + 2 * n, a)
    tl.store(at + 3 * n, s_max)
    tl.store(at + 4 * n, s_sum)


@triton.jit
def _kl_merge_kernel(stats_ptr, out_ptr, n, parts, PARTS: tl.constexpr, TOKENS: tl.constexpr):
    part = tl.arange(0, PARTS)[:, None]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[None, :]
    used = (part < parts) & (token < n)
    real = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = stats_ptr + part * 5 * n + token
    t_max = tl.load(at, mask=used, other=-float("inf"))
    t_sum = tl.load(at + n, mask=used, other=0.0)
    a = tl.load(at + 2 * n, mask=used, other=0.0)
    s_max = tl.load(at + 3 * n, mask=used, other=-float("inf"))
    s_sum = tl.load(at + 4 * n, mask=used, other=0.0)
    t_top, t_total, a_total, s_top, s_total = _kl_merged(used, t_max, t_sum, a, s_max, s_sum)
    tl.store(out_ptr + real, t_top, mask=real < n)
    tl.store(out_ptr + n + real, t_total, mask=real < n)
    tl.store(out_ptr + 2 * n + real, a_total, mask=real < n)
    tl.store(out_ptr + 3 * n + real, s_top, mask=real < n)
    tl.store(out_ptr + 4 * n + real, s_total, mask=real < n)


@triton.jit
def _kl_gradient_kernel(
    s_ptr,
    t_ptr,
    merged_ptr,
    weight_ptr,
    out_ptr,
    n,
    v,
    tiles,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    inside = vocab_ids < v
    w = tl.load(weight_ptr + row) if WEIGHTED else 1.0
    t_top = tl.load(merged_ptr + row)
    t_sum = tl.load(merged_ptr + n + row)
    s_top, s_sum = tl.load(merged_ptr + 3 * n + row), tl.load(merged_ptr + 4 * n + row)
    s = tl.load(s_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    t = tl.load(t_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    g = tl.exp(s - s_top) * (w / s_sum) - tl.exp(t - t_top) * (w / t_sum)
    tl.store(out_ptr + row * v + vocab_ids, g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _meet(count_ptr, tiles):
    """Publish what this program stored, and wait until all programs of the token have done so."""
    tl.debug_barrier()
    here = tl.atomic_add(count_ptr, 1, sem="acq_rel") + 1
    while here < tiles:
        here = tl.atomic_add(count_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _kl_one_pass_kernel(
    s_ptr, t_ptr, weight_ptr, out_ptr, tile_ptr, merged_ptr, count_ptr, n, v, tiles,
    TILE: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    number = tl.atomic_add(count_ptr + n, 1, sem="relaxed")
    row = (number // tiles).to(tl.int64)
    tile = number % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    inside = vocab_ids < v
    s = tl.load(s_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    t = tl.load(t_ptr + row * v + vocab_ids, mask=inside, other=-float("inf"))
    w = tl.load(weight_ptr + row) if WEIGHTED else 1.0
    p, q, t_max, t_sum, a, s_max, s_sum = _kl_numbers(s, t, inside)
    at = tile_ptr + row * 5 * PARTS
    tl.store(at + tile, t_max)
    tl.store(at + PARTS + tile, t_sum)
    tl.store(at + 2 * PARTS + tile, a)
    tl.store(at + 3 * PARTS + tile, s_max)
    tl.store(at + 4 * PARTS + tile, s_sum)
    _meet(count_ptr + row, tiles)
    part = tl.arange(0, PARTS)
    used = part < tiles
    # .cg: from L2, where the other programs' stores are
    t_maxes = tl.load(at + part, mask=used, other=-float("inf"), cache_modifier=".cg")
    t_sums = tl.load(at + PARTS + part, mask=used, other=0.0, cache_modifier=".cg")
    a_parts = tl.load(at + 2 * PARTS + part, mask=used, other=0.0, cache_modifier=".cg")
    s_maxes = tl.load(at + 3 * PARTS + part, mask=used, other=-float("inf"), cache_modifier=".cg")
    s_sums = tl.load(at + 4 * PARTS + part, mask=used, other=0.0, cache_modifier=".cg")
    t_top, t_total, a_total, s_top, s_total = _kl_merged(
        used, t_maxes, t_sums, a_parts, s_maxes, s_sums
    )
    g = q * (w * tl.exp(s_max - s_top) / s_total) - p * (w * tl.exp(t_max - t_top) / t_total)
    tl.store(out_ptr + row * v + vocab_ids, g.to(out_ptr.dtype.element_ty), mask=inside)
    if tile == 0:
        tl.store(merged_ptr + row, t_top)
        tl.store(merged_ptr + n + row, t_total)
        tl.store(merged_ptr + 2 * n + row, a_total)
        tl.store(merged_ptr + 3 * n + row, s_top)
        tl.store(merged_ptr + 4 * n + row, s_total)


@triton.jit
def _ce_stats_kernel(x_ptr, label_ptr, stats_ptr, n, v, tiles, TILE: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + row * v + vocab_ids, mask=vocab_ids < v, other=-float("inf"))
    label = tl.load(label_ptr + row)
    x_max = tl.max(x, 0)
    at = stats_ptr + tile * 3 * n + row
    tl.store(at, x_max)
    tl.store(at + n, tl.sum(tl.exp(x - x_max), 0))
    tl.store(at + 2 * n, tl.sum(tl.where((vocab_ids == label) & (vocab_ids < v), x, 0.0), 0))


@triton.jit
def _ce_merge_kernel(stats_ptr, out_ptr, n, parts, PARTS: tl.constexpr, TOKENS: tl.constexpr):
    part = tl.arange(0, PARTS)[:, None]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[None, :]
    used = (part < parts) & (token < n)
    real = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = stats_ptr + part * 3 * n + token
    x_max = tl.load(at, mask=used, other=-float("inf"))
    x_sum = tl.load(at + n, mask=used, other=0.0)
    top = tl.max(x_max, 0)
    total = tl.sum(x_sum * tl.exp(tl.where(used, x_max - top, 0.0)), 0)
    chosen = tl.sum(tl.load(at + 2 * n, mask=used, other=0.0), 0)
    tl.store(out_ptr + real, top, mask=real < n)
    tl.store(out_ptr + n + real, total, mask=real < n)
    tl.store(out_ptr + 2 * n + real, chosen, mask=real < n)


@triton.jit
def _ce_gradient_kernel(
    x_ptr,
    label_ptr,
    merged_ptr,
    weight_ptr,
    out_ptr,
    n,
    v,
    tiles,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    w = tl.load(weight_ptr + row) if WEIGHTED else 1.0
    label = tl.load(label_ptr + row)
    top = tl.load(merged_ptr + row)
    total = tl.load(merged_ptr + n + row)
    x = tl.load(x_ptr + row * v + vocab_ids, mask=vocab_ids < v, other=-float("inf"))
    g = tl.exp(x - top) * (w / total) - tl.where(vocab_ids == label, w, 0.0)
    tl.store(out_ptr + row * v + vocab_ids, g.to(out_ptr.dtype.element_ty), mask=vocab_ids < v)


@triton.jit
def _ce_one_pass_kernel(
    x_ptr, label_ptr, weight_ptr, out_ptr, tile_ptr, merged_ptr, count_ptr, n, v, tiles,
    TILE: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    number = tl.atomic_add(count_ptr + n, 1, sem="relaxed")
    row = (number // tiles).to(tl.int64)
    tile = number % tiles
    vocab_ids = tile * TILE + tl.arange(0, TILE)
    label = tl.load(label_ptr + row)
    x = tl.load(x_ptr + row * v + vocab_ids, mask=vocab_ids < v, other=-float("inf"))
    w = tl.load(weight_ptr + row) if WEIGHTED else 1.0
    x_max = tl.max(x, 0)
    q = tl.exp(x - x_max)
    at = tile_ptr + row * 3 * PARTS
    tl.store(at + tile, x_max)
    tl.store(at + PARTS + tile, tl.sum(q, 0))
    tl.store(
        at + 2 * PARTS + tile, tl.sum(tl.where((vocab_ids == label) & (vocab_ids < v), x, 0.0), 0)
    )
    _meet(count_ptr + row, tiles)
    part = tl.arange(0, PARTS)
    used = part < tiles
    maxes = tl.load(at + part, mask=used, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(at + PARTS + part, mask=used, other=0.0, cache_modifier=".cg")
    top = tl.max(maxes, 0)
    total = tl.sum(sums * tl.exp(tl.where(used, maxes - top, 0.0)), 0)
    g = q * (w * tl.exp(x_max - top) / total) - tl.where(vocab_ids == label, w, 0.0)
    tl.store(out_ptr + row * v + vocab_ids, g.to(out_ptr.dtype.element_ty), mask=vocab_ids < v)
    if tile == 0:
        chosen = tl.sum(
            tl.load(at + 2 * PARTS + part, mask=used, other=0.0, cache_modifier=".cg"), 0
        )
        tl.store(merged_ptr + row, top)
        tl.store(merged_ptr + n + row, total)
        tl.store(merged_ptr + 2 * n + row, chosen)


def kl_stats(student: Tensor, teacher: Tensor) -> Tensor:
    """fp32 logits [n, v] of both models -> statistics [tiles, 5, n]."""
    n, v, tiles = _sizes(student, teacher)
    stats = student.new_empty(tiles, 5, n)
    _kl_stats_kernel[(n * tiles,)](
        student, teacher, stats, n, v, tiles, TILE=TILE, num_warps=NUM_WARPS
    )
    return stats


def kl_merge(stats: Tensor) -> Tensor:
    """Merge statistics [parts, 5, n] -> [5, n]."""
    return _merge(_kl_merge_kernel, stats)


def kl_gradient(
    student: Tensor,
    teacher: Tensor,
    local: Tensor,
    merged: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """Compute `torch_terms.kl_gradient` from the logits as `kl_stats` left them: untouched; `local`
    is not needed."""
    n, v, tiles = _sizes(student, teacher, out)
    given = merged if weights is None else weights
    _kl_gradient_kernel[(n * tiles,)](
        student,
        teacher,
        merged,
        given,
        out,
        n,
        v,
        tiles,
        TILE=TILE,
        WEIGHTED=weights is not None,
        num_warps=NUM_WARPS,
    )


def kl_stats_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor | None, out: Tensor
) -> Tensor:
    """Compute `torch_terms.kl_stats_and_gradient` in one pass over the logits where the device
    holds a token's tiles at once."""
    n, v, tiles = _sizes(student, teacher, out)
    if not _fits(student, tiles):
        merged = kl_merge(kl_stats(student, teacher))
        kl_gradient(student, teacher, merged, merged, weights, out)
        return merged
    merged, tile_stats, count, parts = _meeting(student, n, tiles, 5)
    given = merged if weights is None else weights
    _kl_one_pass_kernel[(n * tiles,)](
        student, teacher, given, out, tile_stats, merged, count, n, v, tiles,
        TILE=TILE, PARTS=parts, WEIGHTED=weights is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    return merged


def ce_stats(logits: Tensor, labels: Tensor) -> Tensor:
    """fp32 logits [n, v], labels [n] counted from this shard's first row -> statistics [tiles, 3,
    n]."""
    n, v, tiles = _sizes(logits)
    stats = logits.new_empty(tiles, 3, n)
    _ce_stats_kernel[(n * tiles,)](
        logits, labels, stats, n, v, tiles, TILE=TILE, num_warps=NUM_WARPS
    )
    return stats


def ce_merge(stats: Tensor) -> Tensor:
    """Merge statistics [parts, 3, n] -> [3, n]."""
    return _merge(_ce_merge_kernel, stats)


def ce_gradient(
    logits: Tensor,
    labels: Tensor,
    local: Tensor,
    merged: Tensor,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """Compute `torch_terms.ce_gradient` from the logits as `ce_stats` left them: untouched; `local`
    is not needed."""
    n, v, tiles = _sizes(logits, out)
    given = merged if weights is None else weights
    _ce_gradient_kernel[(n * tiles,)](
        logits,
        labels,
        merged,
        given,
        out,
        n,
        v,
        tiles,
        TILE=TILE,
        WEIGHTED=weights is not None,
        num_warps=NUM_WARPS,
    )


def ce_stats_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor | None, out: Tensor
) -> Tensor:
    """Compute `torch_terms.ce_stats_and_gradient` in one pass over the logits where the device
    holds a token's tiles at once."""
    n, v, tiles = _sizes(logits, out)
    if not _fits(logits, tiles):
        merged = ce_merge(ce_stats(logits, labels))
        ce_gradient(logits, labels, merged, merged, weights, out)
        return merged
    merged, tile_stats, count, parts = _meeting(logits, n, tiles, 3)
    given = merged if weights is None else weights
    _ce_one_pass_kernel[(n * tiles,)](
        logits, labels, given, out, tile_stats, merged, count, n, v, tiles,
        TILE=TILE, PARTS=parts, WEIGHTED=weights is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    return merged


def _merge(kernel: triton.JITFunction, stats: Tensor) -> Tensor:
    parts, numbers, n = stats.shape
    out = stats.new_empty(numbers, n)
    grid = (triton.cdiv(n, MERGE_TOKENS),)
    kernel[grid](
        stats, out, n, parts, PARTS=triton.next_power_of_2(parts), TOKENS=MERGE_TOKENS, num_warps=4
    )
    return out


def _meeting(like: Tensor, n: int, tiles: int, numbers: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return what the programs of a token share: merged statistics, statistics per tile, arrivals
    per token (last: programs started), padded tiles."""
    parts = triton.next_power_of_2(tiles)
    count = torch.zeros(n + 1, dtype=torch.int32, device=like.device)
    return like.new_empty(numbers, n), like.new_empty(n, numbers, parts), count, parts


def _sizes(logits: Tensor, *others: Tensor) -> tuple[int, int, int]:
    assert all(x.is_contiguous() and x.shape == logits.shape for x in (logits, *others)), (
        "chunks of logits lie densely in memory"
    )
    return *logits.shape, triton.cdiv(logits.shape[-1], TILE)


def _fits(logits: Tensor, tiles: int) -> bool:
    """Return whether all programs of a token run at once: a device holds at least one program per
    multiprocessor; without a device (interpreter) programs run one after the other."""
    return tiles <= (
        torch.cuda.get_device_properties(logits.device).multi_processor_count
        if logits.is_cuda
        else 1
    )
