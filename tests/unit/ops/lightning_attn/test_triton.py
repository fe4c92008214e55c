"""The kernels against the float64 definition: on a GPU where there is one, in Triton's interpreter
elsewhere.

The interpreter cannot multiply bf16 (it multiplies the bit patterns), so there fp16 stands for the
narrow types."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import (
    chunked_lightning_attn,
    lightning_attn,
    naive_lightning_attn,
)
from megatron_hypenet.ops.lightning_attn import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
# measured relative RMS errors: fp32 1e-7..3e-7 (interpreter); fp16 4e-4; bf16 3e-3 (FLA's kernels:
# the same)
LIMITS = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def ids_of(*rows):
    return (
        torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
        )
        .int()
        .to(DEVICE)
    )


def errors(
    t,
    dims=(16, 16),
    heads=2,
    batch=2,
    dtype=torch.float32,
    decay=None,
    state=True,
    order="bthd",
    **kwargs,
):
    """Return relative RMS errors of o, the final state and all gradients."""
    decay = log_decay(heads) if decay is None else decay
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    shapes = [(batch, t, heads, dims[0]), (batch, t, heads, dims[0]), (batch, t, heads, dims[1])]
    inputs = [draw(*shape).to(DEVICE, dtype) for shape in shapes]
    if order == "tbhd":  # as the mixers hand them over: tokens outermost in memory
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    states = [draw(batch, heads, *dims).to(DEVICE)] if state else []
    do = draw(batch, t, heads, dims[1]).to(DEVICE, dtype)
    dstate = draw(batch, heads, *dims).to(DEVICE)
    results = []
    for op, in_float64 in ((naive_lightning_attn, True), (kernels.triton_lightning_attn, False)):
        xs = [(x.double() if in_float64 else x.clone()).requires_grad_() for x in inputs + states]
        o, final = op(*xs[:3], decay, scale=SCALE, initial_state=xs[3] if state else None, **kwargs)
        torch.autograd.backward([o, final], [do.to(o.dtype), dstate.to(final.dtype)])
        if not in_float64:
            assert o.dtype == dtype and final.dtype == torch.float32
            assert [x.grad.dtype for x in xs] == [x.dtype for x in xs]
        results.append([x.double() for x in (o.detach(), final.detach(), *(x.grad for x in xs))])
    names = ["o", "state", "dq", "dk", "dv", "dstate"]
    return {
        name: float((got - want).norm() / want.norm())
        for name, want, got in zip(names, *results, strict=False)
    }


def assert_close(found, dtype):
    assert all(error < LIMITS[dtype] for error in found.values()), found


@pytest.fixture
def short_segments(monkeypatch):
    """Plan segments of 64 tokens, so that small tensors have several."""
    make = kernels.make_plan

    def cut(**shape):
        return dataclasses.replace(
            make(**shape), segment_tokens=64, num_segments=-(-shape["tokens"] // 64)
        )

    monkeypatch.setattr(kernels, "make_plan", cut)


@pytest.mark.parametrize("t", [1, 31, 32, 64, 100])
def test_one_segment_matches_the_definition(t):
    assert_close(errors(t), torch.float32)


@pytest.mark.parametrize("dims", [(16, 32), (20, 16), (32, 24)])
@pytest.mark.parametrize("t", [65, 192, 200])
def test_segments_join_exactly(short_segments, t, dims):
    assert_close(errors(t, dims=dims, batch=1), torch.float32)


@pytest.mark.parametrize(
    "rows", [([10, 54, 1, 70, 5, 60], [130, 70]), ([200], [1] * 200), ([64, 64, 72], [63, 1, 136])]
)
def test_packed_documents_never_mix(short_segments, rows):
    assert_close(errors(200, document_ids=ids_of(*rows)), torch.float32)


def test_without_an_initial_state_and_with_tokens_outermost(short_segments):
    assert_close(errors(100, state=False, order="tbhd"), torch.float32)


def test_narrow_inputs_accumulate_in_fp32(short_segments):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert_close(errors(150, dtype=dtype), dtype)


def test_a_state_too_large_for_one_program_takes_two_scans(short_segments):
    assert_close(errors(70, dims=(128, 128), heads=1, batch=1), torch.float32)


@pytest.mark.parametrize("order", ["bthd", "tbhd"])
def test_descriptors_read_and_write_what_pointers_do(short_segments, monkeypatch, order):
    monkeypatch.setattr(
        kernels, "_has_descriptors", lambda device: kernels.TensorDescriptor is not None
    )
    with kernels.descriptors_for_all():
        assert_close(
            errors(150, dims=(20, 32), order=order, document_ids=ids_of([100, 50], [149, 1])),
            torch.float32,
        )
        assert_close(errors(100, dims=(128, 32), heads=1, batch=1), torch.float32)


def test_small_inputs_are_reached_by_pointers_unless_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(kernels, "_has_descriptors", lambda device: True)
    x = torch.empty(1, 64, 2, 16)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert (
        kernels._access((x,), True) == kernels.WHOLE.value
        and kernels._access((x,), False) == kernels.MASKED.value
    )
    assert (
        kernels._access((torch.empty(1, 2**19, 1, 32, dtype=torch.bfloat16),), True)
        == kernels.WHOLE.value
    )
    assert (
        kernels._access((torch.empty(1, 2**19 + 1, 1, 32, dtype=torch.bfloat16),), True)
        == kernels.DESCRIPTORS.value
    )
    capturing = True
    assert kernels._access((x,), True) == kernels.DESCRIPTORS.value


@pytest.mark.filterwarnings("error")
def test_decays_that_underflow_within_a_chunk_are_exact(short_segments):
    assert_close(
        errors(130, decay=torch.tensor([-50.0, -1e-9], dtype=torch.float64)), torch.float32
    )
    assert_close(
        errors(130, decay=torch.tensor([-2000.0, 0.0], dtype=torch.float64)), torch.float32
    )


def test_the_same_call_gives_the_same_bits():
    q = torch.randn(1, 100, 2, 16, device=DEVICE)
    first, second = (
        kernels.triton_lightning_attn(q, q, q, log_decay(2), scale=SCALE)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("ids", [None, ids_of([100, 50, 1], [120, 31])])
def test_the_state_alone_and_its_gradients(short_segments, ids):
    k, v, weight = torch.randn(2, 151, 2, 16), torch.randn(2, 151, 2, 24), torch.randn(2, 2, 16, 24)
    results = []
    for in_float64 in (True, False):
        a, b = (
            (x.double() if in_float64 else x).clone().to(DEVICE).requires_grad_() for x in (k, v)
        )
        if in_float64:
            _, state = naive_lightning_attn(a, a, b, log_decay(2), scale=1.0, document_ids=ids)
        else:
            state = kernels.triton_lightning_state(a, b, log_decay(2), document_ids=ids)
        (state * weight.to(state)).sum().backward()
        results.append([x.double() for x in (state.detach(), a.grad, b.grad)])
    for want, got in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < LIMITS[torch.float32]


def test_the_operators_agree_with_their_fake_forms():
    q, k, v, do = torch.randn(4, 1, 40, 2, 16, device=DEVICE).unbind(0)
    decay = kernels._log2_decay(log_decay(2), q.device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        kernels._forward_op, (q, k, v, decay, SCALE, None, None), test_utils=checks
    )
    _, _, states = kernels._forward_op(q, k, v, decay, SCALE, None, None)
    torch.library.opcheck(
        kernels._backward_op,
        (q, k, v, do, decay, SCALE, states, None, None, None),
        test_utils=checks,
    )
    torch.library.opcheck(kernels._final_state_op, (k, v, decay, None), test_utils=checks)


def test_traced_as_one_graph_with_the_same_gradients():
    q, k, v = torch.randn(3, 1, 40, 2, 16, device=DEVICE).unbind(0)
    decay = log_decay(2)
    q.requires_grad_()

    def step(q, k, v):
        return kernels.triton_lightning_attn(q * 2, k, v, decay, scale=SCALE)[0].square().sum()

    want = torch.autograd.grad(step(q, k, v), q)[0]
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(traced(q, k, v), q)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_sequences_on_a_gpu(dtype, dim):
    found = errors(
        1500, dims=(dim, dim), heads=3, batch=1, dtype=dtype, document_ids=ids_of([700, 3, 797])
    )
    assert_close(found, dtype)


@pytest.mark.gpu
def test_a_compiled_function_has_one_graph():
    q, k, v = torch.randn(3, 1, 200, 2, 64, device=DEVICE, dtype=torch.bfloat16).unbind(0)
    decay = log_decay(2).to(DEVICE)
    q.requires_grad_()
    step = lambda q, k, v: (lightning_attn(q * 2, k, v, decay, scale=SCALE)[0].float() ** 2).sum()  # noqa: E731
    want = torch.autograd.grad(step(q, k, v), q)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v), q)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_a_million_tokens_address_beyond_32_bits():
    q = torch.randn(1, 2**20, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        o, state = lightning_attn(q, q, q, log_decay(32), scale=SCALE)
        tail = q[:, -8192:].float()
        want, want_state = chunked_lightning_attn(tail, tail, tail, log_decay(32), scale=SCALE)
    assert (
        float((o[:, -512:].float() - want[:, -512:]).norm() / want[:, -512:].norm())
        < LIMITS[torch.bfloat16]
    )
    assert float((state - want_state).norm() / want_state.norm()) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize(
    ("capability", "descriptors", "all_products"),
    [((8, 0), False, True), ((9, 0), False, False), ((9, 0), True, True), ((12, 0), True, True)],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_plan_knows_the_gpu_and_the_triton_at_hand(
    monkeypatch, capability, descriptors, all_products, told
):
    """Torch 2.6 does not tell the shared memory of a program; Triton's driver does."""
    properties = SimpleNamespace(
        multi_processor_count=46, **({"shared_memory_per_block_optin": 101_376} if told else {})
    )
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 101_376})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        kernels.triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils))
    )
    monkeypatch.setattr(kernels, "TensorDescriptor", object() if descriptors else None)
    found = kernels._gpu.__wrapped__(torch.device("cuda", 3))
    assert (found.processors, found.shared_bytes, found.all_products) == (46, 101_376, all_products)


@pytest.mark.parametrize(
    ("capability", "hip", "has"),
    [((8, 9), None, False), ((9, 0), None, True), ((9, 4), "6.4", False)],
)
def test_descriptors_are_for_nvidia_from_hopper_on(monkeypatch, capability, hip, has):
    monkeypatch.setattr(kernels, "TensorDescriptor", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels._has_descriptors.__wrapped__(torch.device("cuda", 0)) is has
