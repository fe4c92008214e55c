"""Check the kernels of the operations against their definitions in float64, launched directly, on
inputs like a mixer's.

For `hypenet doctor --kernels`, for the check at the start of a run (`model/kernel_guard.py`), and
for porting them. Everything here imports Triton; a machine without it gets the ImportError."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.adamw import AdamWStep, fused_adamw
from megatron_hypenet.ops.fp8_linear import quantize_rows, torch_quantize_rows
from megatron_hypenet.ops.gated_norm import fused_gated_norm
from megatron_hypenet.ops.gradient_sum import fused_gradient_sum
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.norm_rope import fused_norm_rope
from megatron_hypenet.ops.rms_norm import fused_residual_rms_norm, fused_rms_norm
from megatron_hypenet.ops.rope import apply_rope
from megatron_hypenet.ops.sigmoid_gate import fused_sigmoid_gate
from megatron_hypenet.ops.swiglu import fused_swiglu

# Relative RMS errors allowed per dtype. Inputs rounded to bf16 give 2e-3..4e-3 in any kernel that
# multiplies bf16; a kernel that only rounds its results to bf16 is at 1.7e-3.
PRODUCT_LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
ROUNDING_LIMITS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
TF32_LIMIT = 5e-3
"""Limit for fp32 products where `torch.set_float32_matmul_precision` allows TF32."""
EPS = 1e-6
Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KernelCheck:
    """One run of a kernel: what ran, the tensor that is furthest off, by how much (relative RMS),
    or why it did not run."""

    name: str
    worst: str
    error: float
    limit: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Return whether it ran and its error is within the limit; NaN is not."""
        return not self.failure and self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: " + (
            self.failure or f"{self.worst} is off by {self.error:.1e}, limit {self.limit:.1e}"
        )


def check(name: str, dtype: torch.dtype, limit: float, run: Callable[[], Pairs]) -> KernelCheck:
    """Call `run` and compare its {name: (got, wanted in float64)}; any exception (also of a
    compiler) becomes the finding."""
    name = f"{name} {str(dtype).removeprefix('torch.')}"
    try:
        errors = {key: relative_error(got, want) for key, (got, want) in run().items()}
    except Exception as error:
        said = str(error).strip().splitlines()
        return KernelCheck(
            name,
            "",
            math.inf,
            limit,
            f"{type(error).__name__}: {said[0] if said else 'no message'}",
        )
    worst = max(errors, key=lambda key: (math.isnan(errors[key]), errors[key]))
    return KernelCheck(name, worst, errors[worst], limit)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the root mean square of the error over that of `want`; NaN where `got` has one."""
    return float((got.double() - want).norm() / want.norm())


def check_norm_rope(
    device: torch.device, dtype: torch.dtype, *, head_dim: int, tokens: int = 256
) -> KernelCheck:
    """Check output and gradients, at positions up to 131,072 and without positions."""

    def run() -> Pairs:
        heads = 4
        draw = normal_draws(device)
        x = (
            draw(tokens, 1, 2 * heads * head_dim)
            .to(dtype)[..., : heads * head_dim]
            .unflatten(-1, (heads, head_dim))
        )
        weight = (1 + 0.1 * draw(head_dim)).to(dtype)
        dy = draw(tokens, 1, heads, head_dim).to(dtype)
        half = torch.linspace(0, 131_072, tokens, device=device)[:, None] * 1e6 ** -torch.linspace(
            0, 1, head_dim // 2, device=device
        )
        angles = torch.cat((half, half), -1)[:, None, None]

        def exact(x: Tensor, weight: Tensor) -> Tensor:
            return apply_rope(normal(x, weight), angles.double())

        def normal(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (head_dim,), weight, EPS)

        leaves = {"x": x, "weight": weight}
        pairs = with_gradients(lambda x, w: fused_norm_rope(x, w, angles, EPS), exact, leaves, dy)
        alone = with_gradients(lambda x, w: fused_norm_rope(x, w, None, EPS), normal, leaves, dy)
        return pairs | {f"{name} without angles": pair for name, pair in alone.items()}

    return check(f"norm_rope head_dim {head_dim}", dtype, ROUNDING_LIMITS[dtype], run)


def check_gated_norm(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int = 600
) -> KernelCheck:
    """Check output and gradients. 600 rows are more than the programs of the backward kernel."""

    def run() -> Pairs:
        draw = normal_draws(device)
        x = draw(tokens, 1, width).to(dtype)
        gate = draw(tokens, 1, 2 * width).to(dtype)[..., width:]
        weight = (1 + 0.1 * draw(width)).to(dtype)
        dy = draw(tokens, 1, width).to(dtype)

        def exact(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (width,), weight, EPS) * torch.sigmoid(gate)

        leaves = {"x": x, "gate": gate, "weight": weight}
        return with_gradients(
            lambda x, gate, w: fused_gated_norm(x, gate, w, EPS), exact, leaves, dy
        )

    return check(f"gated_norm width {width}", dtype, ROUNDING_LIMITS[dtype], run)


def check_sigmoid_gate(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int = 64
) -> KernelCheck:
    """Check output and gradients; the gate is a slice of a wider projection."""

    def run() -> Pairs:
        draw = normal_draws(device)
        x = draw(tokens, 1, width).to(dtype)
        gate = draw(tokens, 1, 2 * width).to(dtype)[..., width:]

        def exact(x: Tensor, gate: Tensor) -> Tensor:
            return x * torch.sigmoid(gate)

        return with_gradients(
            fused_sigmoid_gate, exact, {"x": x, "gate": gate}, draw(tokens, 1, width).to(dtype)
        )

    return check(f"sigmoid_gate width {width}", dtype, ROUNDING_LIMITS[dtype], run)


def check_rms_norm(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int = 600
) -> KernelCheck:
    """Check output and gradients, without and with a residual, on more rows than the backward
    kernel has programs."""

    def run() -> Pairs:
        draw = normal_draws(device)
        x, residual, dy, dtotal = (draw(tokens, 1, width).to(dtype) for _ in range(4))
        leaves = {"x": x, "weight": (1 + 0.1 * draw(width)).to(dtype)}

        def exact(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (width,), weight, EPS)

        def both(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
            return torch.stack(fused_residual_rms_norm(x, residual, weight, EPS))

        def exact_both(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
            return torch.stack((exact(x + residual, weight), x + residual))

        pairs = with_gradients(lambda x, w: fused_rms_norm(x, w, EPS), exact, leaves, dy)
        beside = with_gradients(
            both, exact_both, leaves | {"residual": residual}, torch.stack((dy, dtotal))
        )
        return pairs | {f"{name} with a residual": pair for name, pair in beside.items()}

    return check(f"rms_norm width {width}", dtype, ROUNDING_LIMITS[dtype], run)


def check_swiglu(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int = 64
) -> KernelCheck:
    """Check output and gradient of rows that are not adjacent in memory, as in a slice of a wider
    projection."""

    def run() -> Pairs:
        draw = normal_draws(device)
        x = draw(tokens, 1, 3 * width).to(dtype)[..., : 2 * width]
        dy = draw(tokens, 1, width).to(dtype)

        def exact(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

        return with_gradients(fused_swiglu, exact, {"x": x}, dy)

    return check(f"swiglu width {width}", dtype, ROUNDING_LIMITS[dtype], run)


def check_fp8_rows(
    device: torch.device, dtype: torch.dtype, *, width: int, tokens: int = 64
) -> KernelCheck:
    """Check scales and values against rounding in float64, with rows of zeros and of tiny and huge
    values."""

    def run() -> Pairs:
        x = (normal_draws(device)(tokens, width)).to(dtype)
        x[1] = 0.0
        x[2] *= 1e-20
        x[3] *= 1e20
        values, scales = quantize_rows(x)
        wanted, exact = torch_quantize_rows(x.double())
        assert torch.equal(values[1].float(), torch.zeros(width, device=device)), "zeros stay zero"
        return {
            "scales": (scales, exact),
            "values": (values.double(), wanted.double()),
        }

    return check(f"fp8_rows width {width}", dtype, ROUNDING_LIMITS[dtype], run)


def check_gradient_sum(
    device: torch.device, dtype: torch.dtype, *, count: int = 10_000
) -> KernelCheck:
    """Check both forms, bit for bit, for aligned and unaligned memory. The expected value is
    rounded once, from float64 to fp32."""

    def run() -> Pairs:
        draw = normal_draws(device)
        pairs = {}
        sums = draw(count + 3)
        gradients = draw(count + 3).to(dtype)
        for start, stop in (
            (0, count // 16 * 16),
            (0, count - 1),
            (1, count),
            (2, count + 2),
            (3, count + 3),
        ):
            total = sums.clone()[start:stop]
            gradient = gradients[start:stop]
            fused_gradient_sum(total, gradient, add=False)
            pairs[f"copy of {start}:{stop}"] = (total.clone(), gradient.double())
            fused_gradient_sum(total.copy_(sums[start:stop]), gradient, add=True)
            pairs[f"sum of {start}:{stop}"] = (
                total,
                (sums[start:stop].double() + gradient.double()).float().double(),
            )
        return pairs

    return check("gradient_sum", dtype, 0.0, run)


def check_adamw(device: torch.device, dtype: torch.dtype, *, count: int = 10_000) -> KernelCheck:
    """Check two clipped steps, the second from the first one's moments: the changes of the weights,
    and bit for bit the weights of `dtype`. Then check that a step with a NaN scale changes
    nothing."""

    def run() -> Pairs:
        draw = normal_draws(device)
        betas = (0.9, 0.95)
        # tensors in a flat buffer begin at any offset
        weight, exp_avg, exp_avg_sq = (
            x[1:] for x in (draw(count + 1), *torch.zeros(2, count + 1, device=device))
        )
        compute_weight = torch.zeros(count + 1, dtype=dtype, device=device)[1:]
        want = weight.double()
        m = torch.zeros(count, device=device).double()
        s = torch.zeros(count, device=device).double()
        before = want
        pairs = {}
        scale = torch.tensor(0.3, device=device)
        for turn in (1, 2):
            gradient = draw(count + 1)[1:]
            step = AdamWStep(count=turn, lr=0.1, betas=betas, eps=EPS, weight_decay=0.1)
            fused_adamw(weight, gradient, exp_avg, exp_avg_sq, compute_weight, step, scale)
            g = gradient.double() * 0.3
            m = betas[0] * m + (1 - betas[0]) * g
            s = betas[1] * s + (1 - betas[1]) * g * g
            denominator = (s / (1 - betas[1] ** turn)).sqrt() + step.eps
            want = (
                want * (1 - step.lr * step.weight_decay)
                - step.lr * m / (1 - betas[0] ** turn) / denominator
            )
            for name, got, exact in (
                ("first moment", exp_avg, m),
                ("second moment", exp_avg_sq, s),
                ("change", weight - before, want - before),
            ):
                pairs[f"{name} of step {turn}"] = (got.clone(), exact)
            assert torch.equal(compute_weight, weight.to(dtype)), (
                "the weights in the compute dtype are not the fp32 weights rounded"
            )
        state = (weight, exp_avg, exp_avg_sq, compute_weight)
        kept = [x.clone() for x in state]
        fused_adamw(
            weight,
            draw(count + 1)[1:],
            exp_avg,
            exp_avg_sq,
            compute_weight,
            step,
            scale * torch.nan,
        )
        assert all(torch.equal(x, y) for x, y in zip(state, kept, strict=True)), (
            "a refused update changed something"
        )
        return pairs

    return check("adamw", dtype, ROUNDING_LIMITS[torch.float32], run)


def with_gradients(
    op: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: dict[str, Tensor], dy: Tensor
) -> Pairs:
    """Return the output `y` and the gradient of each leaf, of the op and of its definition in
    float64 on the same inputs."""
    results = []
    for form, dtype in ((op, None), (exact, torch.float64)):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves.values()]
        y = form(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
    return {
        name: (got, want)
        for name, got, want in zip(["y", *(f"d {leaf}" for leaf in leaves)], *results, strict=True)
    }


def normal_draws(device: torch.device) -> Callable[..., Tensor]:
    """Return a function that draws normal fp32 tensors, the same on every device and in every
    process, without a global generator."""
    generator = torch.Generator().manual_seed(5)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


def check_gated_norm_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family gated_norm for a model's use of it."""
    return check_gated_norm(where, use.dtype, width=use.width)


def check_rms_norm_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family rms_norm for a model's use of it."""
    return check_rms_norm(where, use.dtype, width=use.hidden)


def check_sigmoid_gate_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family sigmoid_gate for a model's use of it."""
    return check_sigmoid_gate(where, use.dtype, width=use.width)


def check_adamw_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family adamw for a model's use of it."""
    return check_adamw(where, use.dtype)


def check_swiglu_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family swiglu for a model's use of it."""
    return check_swiglu(where, use.dtype, width=use.ffn)


def check_fp8_rows_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family fp8_rows for a model's use of it."""
    return check_fp8_rows(where, use.dtype, width=use.ffn)


def check_gradient_sum_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family gradient_sum for a model's use of it."""
    return check_gradient_sum(where, use.dtype)


def check_norm_rope_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family norm_rope for a model's use of it."""
    return check_norm_rope(where, use.dtype, head_dim=use.head_dim)
