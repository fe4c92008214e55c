"""One scan for all four tensors of Lightning Attention: o forward, dq forward, dk and dv in
reverse.

Each is the same sum over tokens with its roles exchanged, `out_i = scale * sum_j gamma^|i-j| (x_i .
y_j) z_j`:
    o (x, y, z) = (q, k, v), j <= i      dq (do, v, k), j <= i
    dv (k, q, do), j >= i                dk (v, do, q), j >= i
A program takes one segment of one head and a block of z's columns; it walks the chunks and carries
the state [z block, x dim] in fp32 registers, so no state but one per segment ever reaches memory.

Everything is computed transposed, tokens as columns: `out^T = S^T x^T + z^T W`. So the state and
z^T are left operands, which stay in registers, and the pairs W are a right one, shared by all
warps; the other way round both W and S would cross between warps."""

import triton
import triton.language as tl

from megatron_hypenet.ops.lightning_attn.triton_tiles import (
    NEGLIGIBLE_BITS,
    SIZES,
    edge_decays,
    entering_owner,
    entering_state,
    head_of,
    load_ids,
    load_tile,
    pair_decay,
    state_at,
    store_tile,
    within_documents,
)


@triton.jit
def joined(state, y, z, weight, precision: tl.constexpr):
    """Return the state [z, x] after the tokens of one chunk: y [chunk, x], z [chunk, z] weighted by
    `weight` [chunk]."""
    weighted = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
    return tl.dot(tl.trans(weighted), y, state, input_precision=precision)


@triton.jit(do_not_specialize=SIZES)
def segment_states_kernel(
    y_ptr, z_ptr, states, log2_decay, ids_ptr, length, heads, segment_tokens, num_segments,
    stride_yb, stride_yt, stride_yh,
    stride_zb, stride_zt, stride_zh, dim_x: tl.constexpr, dim_z: tl.constexpr,
    block_x: tl.constexpr, block_z: tl.constexpr,
    chunk: tl.constexpr, reverse: tl.constexpr, documents: tl.constexpr, access: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute what each segment alone adds to the state at its end (its start in a reverse scan):
    `states` [b*h, segments, x, z], fp32.

    Only the tokens near that end count, fewer of them for heads that decay faster; the rest is not
    read. Grid: (z blocks, b*h, segments)."""
    first_col = tl.program_id(0) * block_z
    bh = tl.program_id(1)
    segment = tl.program_id(2)
    decay = tl.load(log2_decay + bh % heads)
    y_head = head_of(y_ptr, bh, heads, stride_yb, stride_yh, access)
    z_head = head_of(z_ptr, bh, heads, stride_zb, stride_zh, access)
    begin = segment * segment_tokens
    num_chunks = tl.cdiv(tl.minimum(segment_tokens, length - begin), chunk)
    # a tensor on the left: triton 3.7's interpreter wraps what a constant divided by a tensor gives
    bits = tl.full([], NEGLIGIBLE_BITS, tl.float32)
    window = tl.minimum(bits / tl.maximum(-decay, 1e-20), segment_tokens.to(tl.float32)).to(
        tl.int32
    )
    counted = tl.minimum(tl.cdiv(window, chunk) + 1, num_chunks)
    ids = ids_ptr + (bh // heads).to(tl.int64) * length
    if documents:
        edge = begin if reverse else tl.minimum(begin + segment_tokens, length) - 1
        owner = tl.load(ids + edge)
    state = tl.zeros([block_z, block_x], dtype=tl.float32)
    for i in range(counted):
        start = begin + (counted - 1 - i if reverse else num_chunks - counted + i) * chunk
        count = tl.minimum(chunk, length - start)
        y = load_tile(y_head, bh, heads, start, stride_yt, length, 0, dim_x, chunk, block_x, access)
        z = load_tile(
            z_head, bh, heads, start, stride_zt, length, first_col, dim_z, chunk, block_z, access
        )
        _, join = edge_decays(decay, count, chunk, reverse)
        if documents:
            join = tl.where(load_ids(ids, start, length, chunk) == owner, join, 0.0)
        state = joined(state * tl.exp2(decay * count.to(tl.float32)), y, z, join, precision)
    at, inside = state_at(
        states, bh * num_segments + segment, first_col, dim_z, 1, dim_x, dim_z, block_x, block_z
    )
    tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    states, final, log2_decay, ids_ptr, length, heads, segment_tokens, num_segments,
    dim_x: tl.constexpr, dim_z: tl.constexpr,
    block_x: tl.constexpr, block_z: tl.constexpr, reverse: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """Compute the state after the whole sequence (before it in a reverse scan), `final` [b*h, x,
    z], from those of its segments. Grid: (z blocks, b*h)."""
    first_col = tl.program_id(0) * block_z
    bh = tl.program_id(1)
    decay = tl.load(log2_decay + bh % heads)
    ids = ids_ptr + (bh // heads).to(tl.int64) * length
    # the state that would enter a segment on the other side
    beyond = num_segments * 0 - 1 if reverse else num_segments
    owner = 0
    if documents:
        owner = entering_owner(ids, beyond, segment_tokens, length, reverse)
    state = entering_state(
        states,
        final,
        ids,
        owner,
        decay,
        bh,
        beyond,
        num_segments,
        segment_tokens,
        length,
        first_col,
        dim_z,
        1,
        dim_x,
        dim_z,
        block_x,
        block_z,
        reverse,
        documents,
        False,
    )
    at, inside = state_at(final, bh, first_col, dim_z, 1, dim_x, dim_z, block_x, block_z)
    tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    x_ptr, y_ptr, z_ptr, out_ptr, states, outer, final, log2_decay, ids_ptr, scale, length, heads,
    segment_tokens, num_segments,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_zb, stride_zt,
    stride_zh, stride_ob, stride_ot,
    stride_oh, stride_sx, stride_sz, dim_x: tl.constexpr, dim_z: tl.constexpr,
    block_x: tl.constexpr, block_z: tl.constexpr,
    chunk: tl.constexpr, reverse: tl.constexpr, documents: tl.constexpr, has_outer: tl.constexpr,
    wants_final: tl.constexpr,
    access: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Compute out [b, t, h, z] and, from the program at the far end, the state that leaves the
    sequence. Grid: (z blocks, b*h, segments).

    States are [k, v] in memory; `stride_sx`, `stride_sz` read them as [x, z], transposed where x is
    a value and z a key."""
    first_col = tl.program_id(0) * block_z
    bh = tl.program_id(1)
    segment = tl.program_id(2)
    decay = tl.load(log2_decay + bh % heads)
    x_head = head_of(x_ptr, bh, heads, stride_xb, stride_xh, access)
    y_head = head_of(y_ptr, bh, heads, stride_yb, stride_yh, access)
    z_head = head_of(z_ptr, bh, heads, stride_zb, stride_zh, access)
    out_head = head_of(out_ptr, bh, heads, stride_ob, stride_oh, access)
    ids = ids_ptr + (bh // heads).to(tl.int64) * length
    owner = 0
    if documents:
        owner = entering_owner(ids, segment, segment_tokens, length, reverse)
    state = entering_state(
        states,
        outer,
        ids,
        owner,
        decay,
        bh,
        segment,
        num_segments,
        segment_tokens,
        length,
        first_col,
        stride_sx,
        stride_sz,
        dim_x,
        dim_z,
        block_x,
        block_z,
        reverse,
        documents,
        has_outer,
    )
    pairs = pair_decay(decay, chunk, not reverse) * scale  # rows: the seen token
    begin = segment * segment_tokens
    num_chunks = tl.cdiv(tl.minimum(segment_tokens, length - begin), chunk)
    for i in range(num_chunks):
        start = begin + (num_chunks - 1 - i if reverse else i) * chunk
        count = tl.minimum(chunk, length - start)
        x = load_tile(x_head, bh, heads, start, stride_xt, length, 0, dim_x, chunk, block_x, access)
        y = load_tile(y_head, bh, heads, start, stride_yt, length, 0, dim_x, chunk, block_x, access)
        z = load_tile(
            z_head, bh, heads, start, stride_zt, length, first_col, dim_z, chunk, block_z, access
        )
        enter, join = edge_decays(decay, count, chunk, reverse)
        keep = tl.exp2(decay * count.to(tl.float32))
        factors = pairs
        if documents:
            factors, enter, join, keep, owner = within_documents(
                ids, owner, start, count, length, pairs, enter, join, keep, chunk, reverse
            )
        weights = tl.dot(y, tl.trans(x), input_precision=precision) * factors
        out = (
            tl.dot(state.to(x.dtype), tl.trans(x), input_precision=precision)
            * (enter * scale)[None, :]
        )
        out = tl.dot(tl.trans(z), weights.to(z.dtype), out, input_precision=precision)
        store_tile(
            out_head,
            tl.trans(out),
            bh,
            heads,
            start,
            stride_ot,
            length,
            first_col,
            dim_z,
            chunk,
            block_z,
            access,
        )
        state = joined(state * keep, y, z, join, precision)
    if wants_final:
        if segment == (0 if reverse else num_segments - 1):
            at, inside = state_at(
                final, bh, first_col, stride_sx, stride_sz, dim_x, dim_z, block_x, block_z
            )
            tl.store(at, state, mask=inside)
