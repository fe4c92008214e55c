import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_hypenet.ops import kernels as switches
from megatron_hypenet.ops import rms_norm as module
from megatron_hypenet.ops.rms_norm import (
    fused_residual_rms_norm,
    fused_rms_norm,
    kernel_fits,
    residual_rms_norm,
    rms_norm,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bf16 off where a GPU rounds
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
USED = {"both": (True, True), "norm": (True, False), "total": (False, True)}


@pytest.fixture(autouse=True)
def triton_or_skip(request):
    if "op" in request.fixturenames and request.getfixturevalue("op") in (
        fused_rms_norm,
        fused_residual_rms_norm,
    ):
        pytest.importorskip("triton")


def definition(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def residual_definition(x, residual, weight, eps):
    total = x if residual is None else x + residual
    return definition(total, weight, eps), total


def gradients(op, x, weight, dy, dtype):
    inputs = [a.detach().to(dtype).requires_grad_() for a in (x, weight)]
    y = op(*inputs, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]


def residual_gradients(op, leaves, upstream, dtype):
    """Return both outputs, and the gradients of the leaves (x, residual or None, weight);
    `upstream` has None for an output that is not used."""
    inputs = [None if a is None else a.to(dtype).detach().requires_grad_() for a in leaves]
    outputs = op(*inputs, 1e-6)
    used, grads = zip(
        *(
            (output, grad.to(dtype))
            for output, grad in zip(outputs, upstream, strict=True)
            if grad is not None
        ),
        strict=True,
    )
    wanted = [a for a in inputs if a is not None]
    return [
        *(a.detach() for a in outputs),
        *torch.autograd.grad(used, wanted, grads, allow_unused=True),
    ]


def draw(*shape):
    return torch.randn(shape, device=DEVICE)


def assert_close(found, wanted, rtol=1e-4, atol=2e-5):
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize(
    "shape", [(9, 2, 520), (1, 1, 1000), (600, 16), (4, 512), (3, 0, 520), (1, 1)]
)
def test_matches_float64_with_gradients(op, shape):
    x = 3 * torch.randn(shape, device=DEVICE)
    weight = torch.randn(shape[-1], device=DEVICE)
    dy = torch.randn(shape, device=DEVICE)
    want = gradients(definition, x, weight, dy, torch.float64)
    for got, exact in zip(gradients(op, x, weight, dy, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", [residual_rms_norm, fused_residual_rms_norm])
@pytest.mark.parametrize(
    "shape", [(9, 2, 520), (1, 1, 1000), (600, 16), (4, 512), (3, 0, 520), (1, 1)]
)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("used", USED)
def test_residual_form_matches_float64_with_gradients(op, shape, adds, used):
    leaves = (3 * draw(*shape), draw(*shape) if adds else None, draw(shape[-1]))
    upstream = [draw(*shape) if use else None for use in USED[used]]
    want = residual_gradients(residual_definition, leaves, upstream, torch.float64)
    assert_close(residual_gradients(op, leaves, upstream, torch.float32), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [True, False])
def test_the_kernels_sum_is_torchs_and_its_norm_that_of_the_rounded_sum(dtype, adds):
    """Bit for bit; the gradient of both parts is the norm's and the residual's, rounded once."""
    pytest.importorskip("triton")
    x, other, weight, dy, dtotal = (
        a.to(dtype)
        for a in (draw(7, 520), 30 * draw(7, 520), draw(520), draw(7, 520), draw(7, 520))
    )
    residual = other if adds else None
    y, total, *grads = residual_gradients(
        fused_residual_rms_norm, (x, residual, weight), (dy, dtotal), dtype
    )
    summed = x + other if adds else x
    assert torch.equal(total, summed) and torch.equal(y, fused_rms_norm(summed, weight, 1e-6))
    _, _, dweight = gradients(fused_rms_norm, summed, weight, dy, dtype)
    assert torch.equal(grads[-1], dweight) and (not adds or torch.equal(grads[0], grads[1]))
    _, exact, _ = gradients(definition, summed.double(), weight, dy, torch.float64)
    torch.testing.assert_close(
        grads[0].double(), exact + dtotal.double(), rtol=torch.finfo(dtype).eps, atol=4e-6
    )


def test_without_a_residual_the_total_is_x_in_its_own_memory():
    pytest.importorskip("triton")
    x = draw(5, 520).requires_grad_()
    weight = draw(520)
    _, total = fused_residual_rms_norm(x, None, weight, 1e-6)
    assert total.data_ptr() == x.data_ptr() and total.grad_fn is not None and x._version == 0


@pytest.mark.parametrize("adds", [True, False])
def test_the_residual_form_keeps_the_total_and_the_weight(adds):
    pytest.importorskip("triton")
    kept = []
    x = draw(5, 520).requires_grad_()
    residual = draw(5, 520) if adds else None
    weight = draw(520)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        y, total = fused_residual_rms_norm(x, residual, weight, 1e-6)
    assert [a.data_ptr() for a in kept] == [total.data_ptr(), weight.data_ptr()]
    assert not y._is_view() and y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize("op", [residual_rms_norm, fused_residual_rms_norm])
@pytest.mark.parametrize("adds", [True, False])
def test_nothing_needs_a_gradient_without_grad(op, adds):
    x = draw(5, 520).requires_grad_()
    residual = draw(5, 520) if adds else None
    weight = draw(520).requires_grad_()
    with torch.no_grad():
        y, total = op(x, residual, weight, 1e-6)
    assert y.grad_fn is None and total.grad_fn is None and (not adds or not total.requires_grad)


@pytest.mark.parametrize("op", [residual_rms_norm, fused_residual_rms_norm])
def test_hooks_see_the_whole_gradient_once_and_a_checkpoint_changes_nothing(op):
    x = draw(5, 520)
    residual = draw(5, 520)
    weight = draw(520).requires_grad_()
    seen = []
    results = []

    def step(x, residual):
        y, x = op(x, residual, weight, 1e-6)
        z, x = op(x * y, None, weight, 1e-6)
        return x + z

    for again in (False, True):
        inputs = [a.clone().requires_grad_() for a in (x, residual)]
        inputs[0].register_hook(lambda grad: seen.append(grad.clone()))
        out = checkpoint(step, *inputs, use_reentrant=True) if again else step(*inputs)
        out.square().sum().backward()
        results.append([inputs[0].grad, inputs[1].grad, weight.grad])
        weight.grad = None
    assert all(torch.equal(kept, made) for kept, made in zip(*results, strict=True))
    assert len(seen) == 2 and torch.equal(seen[0], results[0][0])


def test_the_form_without_a_kernel_has_right_gradients():
    x, residual, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (3, 5), (5,))
    )
    assert torch.autograd.gradcheck(
        lambda *inputs: residual_rms_norm(*inputs, 1e-6), (x, residual, weight)
    )
    assert torch.autograd.gradcheck(
        lambda x, weight: residual_rms_norm(x, None, weight, 1e-6), (x, weight)
    )


def test_both_forms_go_by_the_same_switch(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "fused_rms_norm", lambda *args: "kernel")
    monkeypatch.setattr(module, "fused_residual_rms_norm", lambda *args: "kernel")
    for on, width in ((True, 512), (True, 500), (False, 512)):
        monkeypatch.setattr(switches, "_enabled", dict.fromkeys(switches.FAMILIES, on))
        x = torch.ones(3, width).as_subclass(OnGpu)
        weight = torch.ones(width)
        found = [
            rms_norm(x, weight, 1e-6),
            residual_rms_norm(x, None, weight, 1e-6),
            residual_rms_norm(x, x, weight, 1e-6),
        ]
        assert [isinstance(result, str) for result in found] == [on and width == 512] * 3


LAYOUTS = {
    "batch first": lambda wide: wide.transpose(0, 1),
    "part of a projection": lambda wide: wide[..., 20:60],
    "batch first, part": lambda wide: wide.transpose(0, 1)[..., 20:60],
    "columns apart": lambda wide: wide[..., ::3],
    "one row for all": lambda wide: wide[:1, :1].expand(4, 6, 60),
}


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_lie_anywhere_in_memory(op, layout):
    wide = torch.randn(4, 6, 60, device=DEVICE)
    x = LAYOUTS[layout](wide)
    dy = LAYOUTS[layout](torch.randn(4, 6, 60, device=DEVICE))
    weight = torch.randn(x.shape[-1], device=DEVICE)
    x.requires_grad_()  # the same layout reaches the kernel
    y = op(x, weight.requires_grad_(), 1e-6)
    assert y.is_contiguous() or op is rms_norm
    found = [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
    for got, want in zip(found, gradients(definition, x, weight, dy, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", [residual_rms_norm, fused_residual_rms_norm])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_added_may_lie_anywhere_in_memory(op, layout):
    x, residual, dy, dtotal = (LAYOUTS[layout](draw(4, 6, 60)) for _ in range(4))
    # the same layout reaches the kernel
    leaves = (x.requires_grad_(), residual.requires_grad_(), draw(x.shape[-1]).requires_grad_())
    outputs = op(*leaves, 1e-6)
    found = [*(a.detach() for a in outputs), *torch.autograd.grad(outputs, leaves, (dy, dtotal))]
    assert_close(
        found, residual_gradients(residual_definition, leaves, (dy, dtotal), torch.float64)
    )


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
def test_a_gradient_without_memory_of_its_own(op):
    """Such a gradient comes from `sum`: one number for all."""
    x = torch.randn(5, 520, device=DEVICE)
    weight = torch.randn(520, device=DEVICE)
    dy = torch.ones((), device=DEVICE).expand(5, 520)
    for got, want in zip(
        gradients(op, x, weight, dy, torch.float32),
        gradients(definition, x, weight, dy, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


def test_the_kernel_keeps_its_inputs_and_returns_a_storage_of_its_own():
    """What is dropped and recomputed frees exactly the output."""
    pytest.importorskip("triton")
    kept = []
    x = torch.randn(3, 2, 520, device=DEVICE, requires_grad=True)
    weight = torch.ones(520, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        y = fused_rms_norm(x, weight, 1e-6)
    assert [a.data_ptr() for a in kept] == [x.data_ptr(), weight.data_ptr()]
    assert not y._is_view() and y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_of_the_two_may_need_no_gradient(op, frozen):
    x = torch.randn(5, 520, device=DEVICE)
    weight = torch.randn(520, device=DEVICE)
    dy = torch.randn(5, 520, device=DEVICE)
    _, dx, dweight = gradients(definition, x, weight, dy, torch.float64)
    trained, want = (weight, dweight) if frozen == "x" else (x, dx)
    trained.requires_grad_()
    op(x, weight, 1e-6).backward(dy)
    torch.testing.assert_close(trained.grad.double(), want, rtol=1e-4, atol=2e-5)
    assert (x if frozen == "x" else weight).grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_the_kernel_every_bit_is_torchs(dtype):
    x = torch.randn(5, 2, 520).to(dtype)
    weight = torch.randn(520).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (520,), weight, 1e-6))


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [
        (torch.bfloat16, 2048, True),
        (torch.float32, 520, True),
        (torch.float64, 2048, False),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 8192, True),
        (torch.bfloat16, 8193, False),
    ],
)
def test_whole_rows_of_narrow_dtypes_have_a_kernel(dtype, width, fits):
    assert kernel_fits(dtype, width) is fits


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops.rms_norm import triton as kernels

    x = torch.randn(2, 5, 520, device=DEVICE).transpose(0, 1)
    dy = torch.randn(5, 2, 520, device=DEVICE)
    weight = torch.ones(520, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.forward_op, (x, weight, 1e-6), test_utils=checks)
    torch.library.opcheck(kernels.add_forward_op, (x, dy, weight, 1e-6), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, weight, dy, 1e-6), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, weight, dy, 1e-6, x), test_utils=checks)


@pytest.mark.parametrize("adds", [True, False])
def test_compiled_code_is_one_graph_with_the_same_numbers(adds):
    pytest.importorskip("triton")
    inputs = [draw(5, 520).requires_grad_() for _ in range(1 + adds)] + [draw(520).requires_grad_()]

    def step(*inputs):
        x, residual, weight = inputs if adds else (inputs[0], None, inputs[1])
        y, total = fused_residual_rms_norm(x, residual, weight, 1e-6)
        return (y * total).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(form(*inputs), inputs) for form in (compiled, step))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
