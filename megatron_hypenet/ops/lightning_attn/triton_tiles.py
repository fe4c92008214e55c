"""What the Lightning Attention kernels share: tiles of a sequence, decays inside a chunk, and the
state that enters a segment.

A long sequence is cut into segments, one program each, so that a single sequence fills the GPU.
Each segment first stores its own state (`triton_scan.segment_states_kernel`), and a program then
sums the states of the segments before its own, decayed by their distance, until they no longer
count. Sequences are [b, t, h, d] with any strides but a contiguous last dim; positions along t are
int32, addresses int64. All decays are `exp2` of non-positive numbers: `log2_decay` [h] holds log2
of gamma."""

import triton
import triton.language as tl

# Terms decayed below 2^-32 of their first weight are dropped: far under fp32's own rounding of the
# sum, 2^-24.
NEGLIGIBLE_BITS = tl.constexpr(32.0)

# Arguments that stay run-time arguments even where they are 1: a compile-time 1 changes types
# inside loops.
SIZES = ["length", "heads", "segment_tokens", "num_segments"]


# How a kernel reaches a sequence: pointers with masks, pointers to whole chunks only, or the tensor
# memory accelerator of Hopper, whose descriptors know the bounds, and which needs neither registers
# nor instructions for addresses.
MASKED, WHOLE, DESCRIPTORS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def head_of(tensor, bh, heads, stride_b, stride_h, access: tl.constexpr):
    """Return the pointer to the first element of one head of one row; a descriptor addresses heads
    itself."""
    if access == DESCRIPTORS:
        return tensor
    else:
        return tensor + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h


@triton.jit
def load_tile(
    head,
    bh,
    heads,
    start,
    stride_t,
    length,
    first_col,
    dim: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    access: tl.constexpr,
):
    """Load a tile [rows, cols] of a head (from `head_of`) from token `start` and column
    `first_col`; zeros past the sequence and past the dim."""
    if access == DESCRIPTORS:
        return head.load([bh // heads, bh % heads, start, first_col]).reshape(rows, cols)
    else:
        row = tl.arange(0, rows)
        col = first_col + tl.arange(0, cols)
        at = head + start.to(tl.int64) * stride_t + row[:, None] * stride_t + col[None, :]
        if access == WHOLE and dim % cols == 0:
            return tl.load(at)
        else:
            return tl.load(
                at, mask=(start + row < length)[:, None] & (col < dim)[None, :], other=0.0
            )


@triton.jit
def store_tile(
    head,
    value,
    bh,
    heads,
    start,
    stride_t,
    length,
    first_col,
    dim: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    access: tl.constexpr,
):
    """Store a tile, the inverse of `load_tile`, in the dtype of the tensor."""
    if access == DESCRIPTORS:
        head.store(
            [bh // heads, bh % heads, start, first_col],
            value.to(head.dtype).reshape(1, 1, rows, cols),
        )
    else:
        row = tl.arange(0, rows)
        col = first_col + tl.arange(0, cols)
        at = head + start.to(tl.int64) * stride_t + row[:, None] * stride_t + col[None, :]
        if access == WHOLE and dim % cols == 0:
            tl.store(at, value.to(head.dtype.element_ty))
        else:
            tl.store(
                at,
                value.to(head.dtype.element_ty),
                mask=(start + row < length)[:, None] & (col < dim)[None, :],
            )


@triton.jit
def load_ids(ids, start, length, rows: tl.constexpr):
    """Load the document ids of a chunk, [rows]; past the end, that of the last token."""
    return tl.load(ids + tl.minimum(start + tl.arange(0, rows), length - 1))


@triton.jit
def state_at(
    ptr,
    index,
    first_z,
    stride_x,
    stride_z,
    dim_x: tl.constexpr,
    dim_z: tl.constexpr,
    block_x: tl.constexpr,
    block_z: tl.constexpr,
):
    """Return pointers to state `index` of an array of [k, v] states, as rows of z from `first_z`
    on, [block_z, block_x], and their mask."""
    z = first_z + tl.arange(0, block_z)
    x = tl.arange(0, block_x)
    at = ptr + index.to(tl.int64) * (dim_x * dim_z) + z[:, None] * stride_z + x[None, :] * stride_x
    return at, (z < dim_z)[:, None] & (x < dim_x)[None, :]


@triton.jit
def pair_decay(decay, chunk: tl.constexpr, reverse: tl.constexpr):
    """Return gamma^|i - j| of token i and the tokens j it sees, [chunk, chunk]: j <= i, or j >= i
    in a reverse scan."""
    i = tl.arange(0, chunk)[:, None]
    j = tl.arange(0, chunk)[None, :]
    if reverse:
        i, j = j, i
    return tl.where(i >= j, tl.exp2(decay * tl.maximum(i - j, 0).to(tl.float32)), 0.0)


@triton.jit
def edge_decays(decay, count, chunk: tl.constexpr, reverse: tl.constexpr):
    """Return the weights with which the tokens of a chunk of `count` tokens read the incoming
    state, and with which they enter the outgoing one, each [chunk]. Forward: gamma^(i+1) and
    gamma^(count-1-i); a reverse scan exchanges them."""
    i = tl.arange(0, chunk)
    from_start = tl.exp2(decay * (i + 1).to(tl.float32))
    to_end = tl.exp2(decay * tl.maximum(count - 1 - i, 0).to(tl.float32))
    if reverse:
        return to_end, from_start
    return from_start, to_end


@triton.jit
def entering_owner(ids, segment_index, segment_tokens, length, reverse: tl.constexpr):
    """Return the document that the state entering a segment belongs to."""
    if reverse:
        at = tl.minimum((segment_index + 1) * segment_tokens, length - 1)
    else:
        at = tl.maximum(tl.minimum(segment_index * segment_tokens, length) - 1, 0)
    return tl.load(ids + at)


@triton.jit
def entering_state(
    states, outer, ids, owner, decay, bh, segment_index, num_segments, segment_tokens, length,
    first_z, stride_x, stride_z,
    dim_x: tl.constexpr, dim_z: tl.constexpr, block_x: tl.constexpr, block_z: tl.constexpr,
    reverse: tl.constexpr,
    documents: tl.constexpr, has_outer: tl.constexpr,
):  # fmt: skip
    """Return the state that enters a segment, fp32 [block_z, block_x]: `states` [b*h, segments, k,
    v] of the segments on the far side, nearest first, and `outer` [b*h, k, v], the state at the far
    end of the sequence. A reverse scan comes from the right."""
    total = tl.zeros([block_z, block_x], dtype=tl.float32)
    if reverse:
        edge = tl.minimum((segment_index + 1) * segment_tokens, length)
        other = segment_index + 1
        left = num_segments - other
        step = 1
    else:
        edge = tl.minimum(segment_index * segment_tokens, length)
        other = segment_index - 1
        left = segment_index
        step = -1
    distance = edge * 0
    while left > 0:
        weight = tl.exp2(decay * distance.to(tl.float32))
        if reverse:
            last_seen = other * segment_tokens  # the token of `other` nearest to the edge
        else:
            last_seen = tl.minimum((other + 1) * segment_tokens, length) - 1
        if documents:
            same = tl.load(ids + last_seen) == owner
            weight = tl.where(same, weight, 0.0)
            left = tl.where(same, left, 0)
        at, inside = state_at(
            states,
            bh * num_segments + other,
            first_z,
            stride_x,
            stride_z,
            dim_x,
            dim_z,
            block_x,
            block_z,
        )
        total += weight * tl.load(at, mask=inside, other=0.0)
        if reverse:
            distance = tl.minimum((other + 1) * segment_tokens, length) - edge
        else:
            distance = edge - other * segment_tokens
        left = tl.where(decay * distance.to(tl.float32) < -NEGLIGIBLE_BITS, 0, left - 1)
        other += step
    if has_outer:
        if reverse:
            distance = length - edge
            far = length - 1
        else:
            distance = edge
            far = 0
        weight = tl.exp2(decay * distance.to(tl.float32))
        if documents:
            weight = tl.where(tl.load(ids + far) == owner, weight, 0.0)
        at, inside = state_at(
            outer, bh, first_z, stride_x, stride_z, dim_x, dim_z, block_x, block_z
        )
        total += weight * tl.load(at, mask=inside, other=0.0)
    return total


@triton.jit
def within_documents(
    ids,
    owner,
    start,
    count,
    length,
    pairs,
    enter,
    join,
    keep,
    chunk: tl.constexpr,
    reverse: tl.constexpr,
):
    """Return the weights of a chunk with every term between two documents set to 0, and the
    document of the state that leaves it.

    `owner` is the document of the state that enters; the arguments after `length` are those of
    `pair_decay`, of `edge_decays`, and the decay of the whole chunk."""
    chunk_ids = load_ids(ids, start, length, chunk)
    leaving = tl.load(ids + (start if reverse else start + count - 1))
    pairs = tl.where(chunk_ids[:, None] == chunk_ids[None, :], pairs, 0.0)
    enter = tl.where(chunk_ids == owner, enter, 0.0)
    join = tl.where(chunk_ids == leaving, join, 0.0)
    return pairs, enter, join, tl.where(leaving == owner, keep, 0.0), leaving
