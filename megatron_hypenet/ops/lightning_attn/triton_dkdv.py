"""dk and dv of Lightning Attention in one reverse scan: both need the same state gradient, so q and
do are read once.

    dv_j = scale * [ sum_(i >= j) gamma^(i-j) (k_j . q_i) do_i  +  gamma^(C-1-j) k_j R ]
    dk_j = scale * [ sum_(i >= j) gamma^(i-j) (v_j . do_i) q_i  +  gamma^(C-1-j) v_j R^T ]
R [k, v] is the gradient of the state after the chunk, divided by scale:
R' = gamma^C R + sum_i gamma^(i+1) q_i do_i^T. The whole R stays in registers, which fits up to 128
x 128."""

import triton
import triton.language as tl

from megatron_hypenet.ops.lightning_attn.triton_scan import joined
from megatron_hypenet.ops.lightning_attn.triton_tiles import (
    SIZES,
    edge_decays,
    entering_owner,
    entering_state,
    head_of,
    load_tile,
    pair_decay,
    state_at,
    store_tile,
    within_documents,
)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, states, outer, final, log2_decay, ids_ptr, scale,
    length, heads, segment_tokens,
    num_segments, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb,
    stride_vt, stride_vh, stride_ob,
    stride_ot, stride_oh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    dim_k: tl.constexpr,
    dim_v: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr, chunk: tl.constexpr,
    documents: tl.constexpr,
    has_outer: tl.constexpr, wants_final: tl.constexpr, access: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute dk, dv [b, t, h, .] and, if wanted, `final`: the state gradient before the first
    token. Grid: (b*h, segments).

    `outer` is the state gradient after the last token, divided by scale."""
    bh, segment = tl.program_id(0), tl.program_id(1)
    decay = tl.load(log2_decay + bh % heads)
    q_head = head_of(q_ptr, bh, heads, stride_qb, stride_qh, access)
    k_head = head_of(k_ptr, bh, heads, stride_kb, stride_kh, access)
    v_head = head_of(v_ptr, bh, heads, stride_vb, stride_vh, access)
    do_head = head_of(do_ptr, bh, heads, stride_ob, stride_oh, access)
    dk_head = head_of(dk_ptr, bh, heads, stride_dkb, stride_dkh, access)
    dv_head = head_of(dv_ptr, bh, heads, stride_dvb, stride_dvh, access)
    ids = ids_ptr + (bh // heads).to(tl.int64) * length
    owner = 0
    if documents:
        owner = entering_owner(ids, segment, segment_tokens, length, True)
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
        0,
        1,
        dim_v,
        dim_v,
        dim_k,
        block_v,
        block_k,
        True,
        documents,
        has_outer,
    )
    pairs = pair_decay(decay, chunk, False) * scale  # of token i and the earlier j that it reaches
    begin = segment * segment_tokens
    num_chunks = tl.cdiv(tl.minimum(segment_tokens, length - begin), chunk)
    for i in range(num_chunks):
        start = begin + (num_chunks - 1 - i) * chunk
        count = tl.minimum(chunk, length - start)
        q = load_tile(q_head, bh, heads, start, stride_qt, length, 0, dim_k, chunk, block_k, access)
        k = load_tile(k_head, bh, heads, start, stride_kt, length, 0, dim_k, chunk, block_k, access)
        v = load_tile(v_head, bh, heads, start, stride_vt, length, 0, dim_v, chunk, block_v, access)
        do = load_tile(
            do_head, bh, heads, start, stride_ot, length, 0, dim_v, chunk, block_v, access
        )
        enter, join = edge_decays(decay, count, chunk, True)
        keep = tl.exp2(decay * count.to(tl.float32))
        factors = pairs
        if documents:
            factors, enter, join, keep, owner = within_documents(
                ids, owner, start, count, length, pairs, enter, join, keep, chunk, True
            )
        # Columns are tokens j, so that the pairs (i, j) are a right operand: as a left one they
        # would have to cross between warps.
        state_rounded = state.to(k.dtype)
        weights = (tl.dot(do, tl.trans(v), input_precision=precision) * factors).to(v.dtype)
        dk = (
            tl.dot(state_rounded, tl.trans(v), input_precision=precision) * (enter * scale)[None, :]
        )
        dk = tl.dot(tl.trans(q), weights, dk, input_precision=precision)
        store_tile(
            dk_head,
            tl.trans(dk),
            bh,
            heads,
            start,
            stride_dkt,
            length,
            0,
            dim_k,
            chunk,
            block_k,
            access,
        )
        weights = (tl.dot(q, tl.trans(k), input_precision=precision) * factors).to(k.dtype)
        dv = (
            tl.dot(tl.trans(state_rounded), tl.trans(k), input_precision=precision)
            * (enter * scale)[None, :]
        )
        dv = tl.dot(tl.trans(do), weights, dv, input_precision=precision)
        store_tile(
            dv_head,
            tl.trans(dv),
            bh,
            heads,
            start,
            stride_dvt,
            length,
            0,
            dim_v,
            chunk,
            block_v,
            access,
        )
        state = joined(state * keep, do, q, join, precision)
    if wants_final:
        if segment == 0:
            at, inside = state_at(final, bh, 0, 1, dim_v, dim_v, dim_k, block_v, block_k)
            tl.store(at, state * scale, mask=inside)
