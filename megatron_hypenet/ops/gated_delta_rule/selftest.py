"""Check the kernels of the delta rules against chunks in float64, launched directly, on inputs like
a mixer's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hypenet.ops.gated_delta_rule.chunked import chunked_gated_delta_rule
from megatron_hypenet.ops.gated_delta_rule.dispatch import DeltaRule, gated_delta_rule
from megatron_hypenet.ops.gated_delta_rule.fla import run_kernel
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.selftest import KernelCheck, Pairs, check, normal_draws

LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 5e-3}
"""Relative RMS errors allowed. A triangular system of rounded products is solved in every chunk, so
errors grow beyond those of one product; fla multiplies fp32 inputs in TF32."""


def check_gated_delta_rule_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family gated_delta_rule for a model's use of it."""
    return check_delta_rule(gated_delta_rule, where, use)


def check_delta_rule(
    rule: DeltaRule,
    where: torch.device,
    use: KernelUse,
    *,
    per_channel: bool = False,
    tokens: int = 300,
    heads: int = 4,
) -> KernelCheck:
    """Check outputs, final state and gradients, with an initial state under context parallelism or
    for a thorough check. That the kernel cannot be imported is a finding too."""

    def run() -> Pairs:
        draw = normal_draws(where)
        d = use.head_dim
        shape = (1, tokens, heads, d)
        q, k = (torch.nn.functional.normalize(draw(*shape), dim=-1) for _ in range(2))
        v = draw(*shape)
        # a tenth of the tokens decay fast, the rest slowly
        gates = draw(*(shape if per_channel else shape[:3]))
        log_decay = -torch.nn.functional.softplus(3 * gates - 4)
        beta = torch.sigmoid(draw(*shape[:3])) * (1 if per_channel else 2)
        ids = None
        if use.documents:
            ids = (torch.arange(tokens, device=where) * 10 // (3 * tokens)).int()[None]
        state = draw(1, heads, d, d) if use.thorough or use.context_ranks > 1 else None
        names = ["q", "k", "v", "log decay", "beta"]
        given = [x.to(use.dtype) for x in (q, k, v)] + [log_decay.float(), beta.float()]
        if state is not None:
            names.append("initial state")
            given.append(state.float())
        do = draw(*shape).to(use.dtype)
        options = {"scale": d**-0.5, "document_ids": ids}

        def found(op: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype | None) -> Pairs:
            leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
            initial = leaves[5] if state is not None else None
            o, final = op(*leaves[:5], initial_state=initial, **options)
            gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
            results = [o, final, *gradients]
            labels = ["o", "final state", *(f"d {name}" for name in names)]
            return dict(zip(labels, results, strict=True))  # type: ignore[arg-type]

        kernel = rule.load_kernel()
        exact = found(chunked_gated_delta_rule, torch.float64)
        got = found(lambda *x, **y: run_kernel(kernel, *x, **y), None)
        return {
            label: (got[label].detach(), exact[label].detach())  # type: ignore[attr-defined]
            for label in exact
        }

    label = f"{rule.family} head_dim {use.head_dim}{' packed' if use.documents else ''}"
    return check(label, use.dtype, LIMITS[use.dtype], run)
