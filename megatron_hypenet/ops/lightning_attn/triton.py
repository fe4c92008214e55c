"""Lightning Attention on a GPU: launches of the Triton kernels, and their gradients.

Forward and backward recompute everything but one state per segment. No atomics: the same inputs
give the same bits. Under `torch.compile` each launch is a custom operator, so the graph is not
broken.

One file, because an operator, its launches and its gradient pass the same dozen tensors on; kernels
and plan are beside it. Most lines are arguments, one each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_hypenet.ops.lightning_attn.triton_dkdv import dkdv_kernel
from megatron_hypenet.ops.lightning_attn.triton_plan import (
    H100,
    Blocks,
    Gpu,
    Plan,
    make_plan,
    power_of_two,
)
from megatron_hypenet.ops.lightning_attn.triton_scan import (
    combine_kernel,
    scan_kernel,
    segment_states_kernel,
)
from megatron_hypenet.ops.lightning_attn.triton_tiles import DESCRIPTORS, MASKED, WHOLE

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

LOG2_E = 1.4426950408889634
SMALL_BYTES = 2**25
"""Up to this size of q, kernels launched one by one use pointers: making descriptors costs the host
more than they save the GPU (8 x 512 tokens, 16 heads of 128 on an H100: 0.73 ms forward and
backward against 1.29, of which the GPU works 0.17 and 0.12). A CUDA graph makes them once."""
_small_bytes = SMALL_BYTES


def triton_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `dispatch.lightning_attn` with the kernels, for bf16, fp16 and fp32 on CUDA, key and
    value dims up to 256, scale not 0.

    Products of fp32 inputs follow `torch.get_float32_matmul_precision()`; sums and states are fp32
    always."""
    decay = _log2_decay(log_decay, q.device)
    return _LightningAttn.apply(q, k, v, decay, float(scale), initial_state, _ids(document_ids))


def triton_lightning_state(
    k: Tensor, v: Tensor, log_decay: Tensor, *, document_ids: Tensor | None = None
) -> Tensor:
    """Compute `dispatch.lightning_state` with the kernels, for the same tensors."""
    return _LightningState.apply(k, v, _log2_decay(log_decay, k.device), _ids(document_ids))


class _LightningAttn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        scale: float,
        initial: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        initial_fp32 = None if initial is None else initial.float().contiguous()
        o, final, states = _pick(forward, _forward_op)(q, k, v, decay, scale, initial_fp32, ids)
        ctx.save_for_backward(q, k, v, decay, states, initial_fp32, ids)
        ctx.scale = scale
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, states, initial, ids = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else _dense_rows(do)
        dfinal = None if dfinal is None else dfinal.float().contiguous()
        dq, dk, dv, dinitial = _pick(_backward, _backward_op)(
            q, k, v, do, decay, ctx.scale, states, initial, dfinal, ids
        )
        return (
            dq,
            dk,
            dv,
            None,
            None,
            None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype),
            None,
        )


class _LightningState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, decay: Tensor, ids: Tensor | None) -> Tensor:
        k, v = _dense_rows(k), _dense_rows(v)
        ctx.save_for_backward(k, v, decay, ids)
        return _pick(_final_state, _final_state_op)(k, v, decay, ids)

    @staticmethod
    def backward(ctx: Any, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        k, v, decay, ids = ctx.saved_tensors
        t = k.shape[1]
        age = torch.arange(t - 1, -1, -1, device=k.device)
        weights = torch.exp2(decay[None, :] * age[:, None])[None, :, :, None]  # [1, t, h, 1]
        if ids is not None:
            weights = weights * (ids == ids[:, -1:])[:, :, None, None]
        dfinal_rounded = dfinal.to(k.dtype)
        dk = weights * torch.einsum("bthv,bhkv->bthk", v, dfinal_rounded)
        dv = weights * torch.einsum("bthk,bhkv->bthv", k, dfinal_rounded)
        return dk.to(k.dtype), dv.to(v.dtype), None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final state, and the states of the segments (empty when there is one
    segment)."""
    plan = _plan(q, v)
    b, t, h, dk = q.shape
    states = _segment_states(k, v, decay, ids, plan, reverse=False)
    o = _empty_like_rows(q, v.shape[-1])
    final = q.new_empty(b, h, dk, v.shape[-1], dtype=torch.float32)
    _scan(
        q, k, v, o, states, initial, final, decay, ids, scale, plan, reverse=False, transposed=False
    )
    return o, final, states


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    decay: Tensor,
    scale: float,
    states: Tensor,
    initial: Tensor | None,
    dfinal: Tensor | None,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and the gradient of the initial state (empty without one). `states` are
    those of `forward`."""
    dq, dk, dv = (_empty_like_rows(x, x.shape[-1]) for x in (q, k, v))
    dinitial = None if initial is None else torch.empty_like(initial)
    backward_into(q, k, v, do, decay, scale, states, initial, dfinal, ids, dq, dk, dv, dinitial)
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dinitial is None else dinitial


def backward_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    decay: Tensor,
    scale: float,
    states: Tensor,
    initial: Tensor | None,
    dfinal: Tensor | None,
    ids: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dinitial: Tensor | None,
) -> None:
    """Fill dq, dk, dv (any strides, each head contiguous) and, with an initial state, dinitial."""
    plan = _plan(q, v)
    _scan(
        do, v, k, dq, states, initial, None, decay, ids, scale, plan, reverse=False, transposed=True
    )
    # the reverse scans carry the state gradient divided by scale
    outer = None if dfinal is None else dfinal / scale
    reverse_states = _segment_states(q, do, decay, ids, plan, reverse=True)
    if plan.dkdv is not None:
        _dkdv(
            q, k, v, do, dk, dv, reverse_states, outer, dinitial, decay, ids, scale, plan, plan.dkdv
        )
    else:
        _scan(
            k,
            q,
            do,
            dv,
            reverse_states,
            outer,
            dinitial,
            decay,
            ids,
            scale,
            plan,
            reverse=True,
            transposed=False,
        )
        _scan(
            v,
            do,
            q,
            dk,
            reverse_states,
            outer,
            None,
            decay,
            ids,
            scale,
            plan,
            reverse=True,
            transposed=True,
        )
        if dinitial is not None:
            dinitial *= scale


def final_state(
    y: Tensor, z: Tensor, decay: Tensor, ids: Tensor | None, *, reverse: bool = False
) -> Tensor:
    """Return sum_t gamma^(T-1-t) y_t z_t^T over the last document of each row, fp32 [b, h, y dim, z
    dim]; in reverse sum_t gamma^(t+1) y_t z_t^T over the first one. Only tokens near that end are
    read."""
    plan = _plan(y, z)
    blocks = plan.states
    b, t, h, dim_y = y.shape
    dim_z = z.shape[-1]
    states = _segment_states(y, z, decay, ids, plan, reverse=reverse, always=True)
    if plan.num_segments == 1:
        return states.view(b, h, dim_y, dim_z)
    final = y.new_empty(b, h, dim_y, dim_z, dtype=torch.float32)
    combine_kernel[(triton.cdiv(dim_z, blocks.columns), b * h)](
        states,
        final,
        decay,
        decay if ids is None else ids,
        t,
        h,
        plan.segment_tokens,
        plan.num_segments,
        dim_x=dim_y,
        dim_z=dim_z,
        block_x=power_of_two(dim_y),
        block_z=blocks.columns,
        reverse=reverse,
        documents=ids is not None,
        num_warps=blocks.warps,
    )
    return final


def _final_state(k: Tensor, v: Tensor, decay: Tensor, ids: Tensor | None) -> Tensor:
    """Return the final state [b, h, k, v], fp32."""
    return final_state(k, v, decay, ids)


def _segment_states(
    y: Tensor,
    z: Tensor,
    decay: Tensor,
    ids: Tensor | None,
    plan: Plan,
    *,
    reverse: bool,
    always: bool = False,
) -> Tensor:
    """Return what each segment alone adds to the state, [b*h, segments, y dim, z dim], fp32; empty
    when there is a single segment."""
    b, t, h, dy = y.shape
    dz = z.shape[-1]
    blocks = plan.states
    if plan.num_segments == 1 and not always:
        return y.new_empty(0, dtype=torch.float32)
    states = y.new_empty(b * h, plan.num_segments, dy, dz, dtype=torch.float32)
    access = _access((y, z), t % blocks.chunk == 0)
    segment_states_kernel[(triton.cdiv(dz, blocks.columns), b * h, plan.num_segments)](
        *_tiles((y, power_of_two(dy)), (z, blocks.columns), chunk=blocks.chunk, access=access),
        states,
        decay,
        decay if ids is None else ids,
        t,
        h,
        plan.segment_tokens,
        plan.num_segments,
        *y.stride()[:3],
        *z.stride()[:3],
        dim_x=dy,
        dim_z=dz,
        block_x=power_of_two(dy),
        block_z=blocks.columns,
        chunk=blocks.chunk,
        reverse=reverse,
        documents=ids is not None,
        access=access,
        precision=plan.precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return states


def _scan(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    out: Tensor,
    states: Tensor,
    outer: Tensor | None,
    final: Tensor | None,
    decay: Tensor,
    ids: Tensor | None,
    scale: float,
    plan: Plan,
    *,
    reverse: bool,
    transposed: bool,
) -> None:
    """Fill `out` and, where given, `final`. `transposed`: x holds values and z keys, so states [k,
    v] are read as [z, x]."""
    b, t, h, dx = x.shape
    dz = z.shape[-1]
    bx = power_of_two(dx)
    blocks = plan.scan
    access = _access((x, y, z, out), t % blocks.chunk == 0)
    scan_kernel[(triton.cdiv(dz, blocks.columns), b * h, plan.num_segments)](
        *_tiles(
            (x, bx),
            (y, bx),
            (z, blocks.columns),
            (out, blocks.columns),
            chunk=blocks.chunk,
            access=access,
        ),
        states,
        decay if outer is None else outer,
        decay if final is None else final,
        decay,
        decay if ids is None else ids,
        scale,
        t,
        h,
        plan.segment_tokens,
        plan.num_segments,
        *x.stride()[:3],
        *y.stride()[:3],
        *z.stride()[:3],
        *out.stride()[:3],
        *((1, dx) if transposed else (dz, 1)),
        dim_x=dx,
        dim_z=dz,
        block_x=bx,
        block_z=blocks.columns,
        chunk=blocks.chunk,
        reverse=reverse,
        documents=ids is not None,
        has_outer=outer is not None,
        wants_final=final is not None,
        access=access,
        precision=plan.precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def _dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dk: Tensor,
    dv: Tensor,
    states: Tensor,
    outer: Tensor | None,
    final: Tensor | None,
    decay: Tensor,
    ids: Tensor | None,
    scale: float,
    plan: Plan,
    blocks: Blocks,
) -> None:
    """Fill `dk`, `dv` and, where given, `final`, the gradient of the initial state."""
    b, t, h, dim_k = q.shape
    dim_v = v.shape[-1]
    bk = power_of_two(dim_k)
    bv = power_of_two(dim_v)
    access = _access((q, k, v, do, dk, dv), t % blocks.chunk == 0)
    strides = [stride for x in (q, k, v, do, dk, dv) for stride in x.stride()[:3]]
    dkdv_kernel[(b * h, plan.num_segments)](
        *_tiles(
            (q, bk),
            (k, bk),
            (v, bv),
            (do, bv),
            (dk, bk),
            (dv, bv),
            chunk=blocks.chunk,
            access=access,
        ),
        states,
        decay if outer is None else outer,
        decay if final is None else final,
        decay,
        decay if ids is None else ids,
        scale,
        t,
        h,
        plan.segment_tokens,
        plan.num_segments,
        *strides,
        dim_k=dim_k,
        dim_v=dim_v,
        block_k=bk,
        block_v=bv,
        chunk=blocks.chunk,
        documents=ids is not None,
        has_outer=outer is not None,
        wants_final=final is not None,
        access=access,
        precision=plan.precision,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


_forward_op = torch.library.custom_op("hypenet::lightning_forward", forward, mutates_args=())
_backward_op = torch.library.custom_op("hypenet::lightning_backward", _backward, mutates_args=())
_final_state_op = torch.library.custom_op("hypenet::lightning_state", _final_state, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, decay, scale, initial, ids):  # type: ignore[no-untyped-def]
    b, t, h, dk = q.shape
    plan = _plan(q, v)
    shape = (b * h, plan.num_segments, dk, v.shape[-1]) if plan.num_segments > 1 else (0,)
    final = q.new_empty(b, h, dk, v.shape[-1], dtype=torch.float32)
    return _empty_like_rows(q, v.shape[-1]), final, q.new_empty(shape, dtype=torch.float32)


@_backward_op.register_fake
def _(q, k, v, do, decay, scale, states, initial, dfinal, ids):  # type: ignore[no-untyped-def]
    dinitial = q.new_empty(0, dtype=torch.float32) if initial is None else torch.empty_like(initial)
    return *(_empty_like_rows(x, x.shape[-1]) for x in (q, k, v)), dinitial


@_final_state_op.register_fake
def _(k, v, decay, ids):  # type: ignore[no-untyped-def]
    return k.new_empty(k.shape[0], k.shape[2], k.shape[3], v.shape[-1], dtype=torch.float32)


def _pick(direct: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    """Choose the plain function in eager mode (an operator costs host time), the operator under
    torch.compile."""
    return operator if torch.compiler.is_compiling() else direct


def _plan(q: Tensor, v: Tensor) -> Plan:
    b, t, h, dk = q.shape
    return make_plan(
        batch=b, tokens=t, heads=h, dim_k=dk, dim_v=v.shape[-1], dtype=q.dtype, gpu=_gpu(q.device)
    )


def _access(tensors: tuple[Tensor, ...], whole: bool) -> int:
    """Choose descriptors where the GPU and this Triton support them, the memory is aligned, and
    they are faster; else pointers."""
    if (
        _has_descriptors(tensors[0].device)
        and _descriptors_pay(tensors[0])
        and all(_aligned(x) for x in tensors)
    ):
        return int(DESCRIPTORS.value)
    return int(WHOLE.value if whole else MASKED.value)


@lru_cache
def _has_descriptors(device: torch.device) -> bool:
    """Compute capability 9.0 or later, and a Triton that makes descriptors on the host."""
    # AMD's capabilities are numbered differently
    nvidia = device.type == "cuda" and torch.version.hip is None
    return (
        TensorDescriptor is not None
        and nvidia
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _descriptors_pay(x: Tensor) -> bool:
    return x.numel() * x.element_size() > _small_bytes or torch.cuda.is_current_stream_capturing()


def ways(device: torch.device) -> dict[str, AbstractContextManager[None]]:
    """Return contexts, by label, in which small inputs too are accessed in every way that the
    kernels have on `device`; used by checks."""
    return {
        "": nullcontext(),
        **({" by descriptors": descriptors_for_all()} if _has_descriptors(device) else {}),
    }


@contextmanager
def descriptors_for_all() -> Iterator[None]:
    """Access small inputs like large ones inside this context."""
    global _small_bytes
    _small_bytes = -1
    try:
        yield
    finally:
        _small_bytes = SMALL_BYTES


def _aligned(x: Tensor) -> bool:
    """Check the rule of the tensor memory accelerator: start and strides are multiples of 16 bytes,
    and no stride is 0."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (s > 0 and s % unit == 0)
        for size, s in zip(x.shape[:3], x.stride(), strict=False)
    )


def _tiles(*tensors: tuple[Tensor, int], chunk: int, access: int) -> list[Any]:
    """Return the kernels' argument for each (tensor, columns per tile): the tensor, or its
    descriptor for tiles of `chunk` tokens of one head."""
    if access != DESCRIPTORS.value:
        return [x for x, _ in tensors]
    found = []
    for x, columns in tensors:
        # [b, h, t, d]: a tile's outer dims are ones, so that it needs no shuffling to become a
        # matrix
        view = x.transpose(1, 2)
        strides = [
            x.shape[-1] * 16 if size == 1 else stride
            for size, stride in zip(view.shape, view.stride(), strict=True)
        ]
        found.append(
            TensorDescriptor(x, list(view.shape), [*strides[:3], 1], [1, 1, chunk, columns])
        )
    return found


@lru_cache
def _gpu(device: torch.device) -> Gpu:
    """Return the properties of this GPU; those of an H100 where Triton's interpreter runs the
    kernels."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    # torch 2.6 and builds for AMD do not say
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    if shared is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    # Triton 3.3 fails to compile some of these products for Hopper, and 3.2 crashes the process
    all_products = TensorDescriptor is not None or torch.cuda.get_device_capability(device) < (9, 0)
    return Gpu(properties.multi_processor_count, shared, all_products)


def _log2_decay(log_decay: Tensor, device: torch.device) -> Tensor:
    """Return the decays in powers of two, fp32 on the device. Decays kept on the CPU are copied to
    each device once: a mixer's never change."""
    if log_decay.device.type == "cpu" and not torch.compiler.is_compiling():
        return _constant(tuple(log_decay.tolist()), device)
    return (log_decay.double() * LOG2_E).float().to(device)


@lru_cache(maxsize=256)
def _constant(log_decay: tuple[float, ...], device: torch.device) -> Tensor:
    return (torch.tensor(log_decay, dtype=torch.float64) * LOG2_E).to(device, torch.float32)


def _ids(document_ids: Tensor | None) -> Tensor | None:
    return None if document_ids is None else document_ids.to(torch.int32).contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    """Return x with each head contiguous; the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like_rows(like: Tensor, dim: int) -> Tensor:
    """Allocate [b, t, h, dim] with batch and tokens in the memory order of `like`, so that the
    caller's transpose back is free."""
    b, t, h, _ = like.shape
    if b > 1 and like.stride(0) < like.stride(1):
        return like.new_empty(t, b, h, dim).transpose(0, 1)
    return like.new_empty(b, t, h, dim)
