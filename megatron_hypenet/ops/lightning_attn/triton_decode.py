"""The step of `decode.py` as one Triton kernel: each state is read and written once, in place."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hypenet.ops.lightning_attn import triton as scan
from megatron_hypenet.ops.lightning_attn.triton_plan import power_of_two

if TYPE_CHECKING:
    from megatron_hypenet.ops.lightning_attn.decode import StateSlots

_TILE_ELEMENTS = 4096
"""Elements of a state that one program holds: four programs work on a head of 128 x 128."""


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, states, slots, new_ptr, log2_decay_ptr, scale,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    stride_state,
    dim_k: tl.constexpr, dim_v: tl.constexpr, block_k: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """Compute o and the state of some value columns of one head of one request. Grid: (value
    blocks, heads, requests)."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, block_k)
    values = tl.program_id(0) * block_v + tl.arange(0, block_v)
    in_k = keys < dim_k
    in_v = values < dim_v
    slot = tl.load(slots + row)
    continues = tl.load(new_ptr + row) == 0
    at = states + slot * stride_state + head * dim_k * dim_v
    at = at + keys[:, None] * dim_v + values[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(at, mask=inside & continues, other=0.0)
    q = tl.load(q_ptr + row * stride_qn + head * stride_qh + keys, mask=in_k, other=0.0)
    k = tl.load(k_ptr + row * stride_kn + head * stride_kh + keys, mask=in_k, other=0.0)
    v = tl.load(v_ptr + row * stride_vn + head * stride_vh + values, mask=in_v, other=0.0)
    decay = tl.exp2(tl.load(log2_decay_ptr + head))
    state = state * decay + k.to(tl.float32)[:, None] * v.to(tl.float32)[None, :]
    tl.store(at, state, mask=inside)
    o = tl.sum(state * (q.to(tl.float32) * scale)[:, None], axis=0)
    place = out_ptr + row * stride_on + head * stride_oh + values
    tl.store(place, o.to(out_ptr.dtype.element_ty), mask=in_v)


def triton_lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: "StateSlots", *, scale: float
) -> Tensor:
    """Compute `decode.lightning_decode` with the kernels, for bf16, fp16 and fp32 on CUDA, key and
    value dims up to 256."""
    n, h, dim_k = q.shape
    dim_v = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cache = states.cache
    assert cache.dtype == torch.float32 and cache[0].is_contiguous()
    decay = scan._log2_decay(log_decay, q.device)
    out = torch.empty(n, h, dim_v, dtype=q.dtype, device=q.device)
    block_k = power_of_two(dim_k)
    block_v = min(power_of_two(dim_v), max(16, _TILE_ELEMENTS // block_k))
    decode_kernel[(triton.cdiv(dim_v, block_v), h, n)](
        q, k, v, out, cache, states.places, states.new.to(torch.uint8), decay, scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], cache.stride(0),
        dim_k=dim_k, dim_v=dim_v, block_k=block_k, block_v=block_v,
    )  # fmt: skip
    return out
