"""The kernels of Lightning Attention, alone and as a whole mixer, against their definitions in
float64: see `ops.selftest`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.lightning_attn.chunked import (
    chunked_lightning_attn,
    chunked_lightning_state,
)
from megatron_hypenet.ops.rope import apply_rope
from megatron_hypenet.ops.selftest import (
    EPS,
    PRODUCT_LIMITS,
    TF32_LIMIT,
    KernelCheck,
    Pairs,
    check,
    normal_draws,
    with_gradients,
)

MIX_LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest accepted relative errors of the fused mixer: it computes several operations, each of
which rounds its result."""


def check_lightning(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    documents: bool,
    states: bool,
    pieces: bool,
    tokens: int = 1024,
) -> KernelCheck:
    """Check output and all gradients, with every way in which the kernels access memory here.
    `states`: a state enters and the final one is used; `pieces`: also the state alone, as context
    parallelism sends it. 1024 tokens are several segments."""

    def run() -> Pairs:
        from megatron_hypenet.ops.lightning_attn.triton import (
            triton_lightning_attn,
            triton_lightning_state,
            ways,
        )

        heads = 4
        draw = normal_draws(device)
        q, k = (draw(tokens, 1, heads, head_dim).to(dtype).transpose(0, 1) for _ in range(2))
        v = (
            draw(tokens, 1, 2 * heads * head_dim)
            .to(dtype)[..., : heads * head_dim]
            .unflatten(-1, (heads, head_dim))
            .transpose(0, 1)
        )
        do = draw(tokens, 1, heads, head_dim).to(dtype).transpose(0, 1)
        entering, leaving = (
            draw(1, heads, head_dim, head_dim) if states else None for _ in range(2)
        )
        ids = (
            (torch.arange(tokens, device=device) * 10 // (3 * tokens)).int()[None]
            if documents
            else None
        )
        decay = log_decay(heads)

        def found(
            op: Callable[..., tuple[Tensor, Tensor]],
            state: Callable[..., Tensor],
            compute_dtype: torch.dtype | None,
        ) -> list[Tensor]:
            inputs = [
                x.detach().to(compute_dtype or x.dtype).requires_grad_()
                for x in (q, k, v, *([] if entering is None else [entering]))
            ]
            initial = inputs[3] if states else None
            o, final = op(
                *inputs[:3], decay, scale=head_dim**-0.5, initial_state=initial, document_ids=ids
            )
            outputs, gradients = (
                ([o], [do.to(o.dtype)])
                if leaving is None
                else ([o, final], [do.to(o.dtype), leaving.to(final.dtype)])
            )
            together = [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]
            return [*together, *([state(*inputs[1:3], decay, document_ids=ids)] if pieces else [])]

        names = [
            "o",
            *(["final state"] if states else []),
            "dq",
            "dk",
            "dv",
            *(["d initial state"] if states else []),
            "state alone",
        ]
        wanted = found(chunked_lightning_attn, chunked_lightning_state, torch.float64)
        pairs: Pairs = {}
        for label, way in ways(device).items():
            with way:
                got = found(triton_lightning_attn, triton_lightning_state, None)
            pairs |= {
                name + label: (x.detach(), want.detach())
                for name, x, want in zip(names, got, wanted, strict=False)
            }
        return pairs

    limit = (
        TF32_LIMIT
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        else PRODUCT_LIMITS[dtype]
    )
    return check(
        f"lightning_attn head_dim {head_dim}{' packed' if documents else ''}", dtype, limit, run
    )


class _TwoChunks:
    """Carries states from the first of two chunks to the second, on one device. Where a document
    ends between the two (`continues` [1] is false) nothing is carried."""

    def __init__(self, continues: Tensor | float) -> None:
        self.continues = continues

    def send(self, *summary: Tensor) -> None:
        (self.states,) = summary

    def incoming(self) -> Tensor:
        return torch.stack([torch.zeros_like(self.states[0]), self.states[0] * self.continues])

    def send_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def summary_gradients(self) -> tuple[Tensor, ...]:
        first = self.gradient[1] * self.continues
        return (torch.stack([first, torch.zeros_like(first)]),)


def check_lightning_mix(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    heads: int = 4,
    documents: bool,
    tokens: int = 600,
    split: bool = False,
) -> KernelCheck:
    """Check output and gradients of the whole mixer between its projections, in several segments;
    `split` treats the tokens as two chunks, as context parallelism does."""

    def run() -> Pairs:
        from megatron_hypenet.ops.lightning_attn.triton import ways
        from megatron_hypenet.ops.lightning_mix import lightning_mix

        draw = normal_draws(device)
        width = heads * head_dim
        decay = log_decay(heads)
        projected = draw(tokens, 1, 4 * width).to(dtype)
        dy = draw(tokens, 1, width).to(dtype)
        weights = {
            name: (1 + 0.1 * draw(size)).to(dtype)
            for name, size in (("wq", head_dim), ("wk", head_dim), ("wo", width))
        }
        half = torch.linspace(0, 2000, tokens, device=device)[:, None] * 1e4 ** -torch.linspace(
            0, 1, head_dim // 2, device=device
        )
        angles = torch.cat((half, half), -1)[:, None, None]
        ids = (
            (torch.arange(tokens, device=device) * 10 // (3 * tokens)).int()[None]
            if documents
            else None
        )

        def exact(projected: Tensor, wq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
            q, k, v, gate = projected.chunk(4, -1)
            q, k, v = (x.unflatten(-1, (heads, head_dim)) for x in (q, k, v))
            q, k = (
                apply_rope(F.rms_norm(x, (head_dim,), w, EPS), angles.double())
                for x, w in ((q, wq), (k, wk))
            )
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            o, _ = chunked_lightning_attn(q, k, v, decay, scale=head_dim**-0.5, document_ids=ids)
            return F.rms_norm(o.transpose(0, 1).flatten(-2), (width,), wo, EPS) * torch.sigmoid(
                gate
            )

        def fused(projected: Tensor, wq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
            rows = ids
            transfer = None
            if split:
                continues: Tensor | float = 1.0
                if ids is not None:
                    rows = ids.view(2, -1)
                    continues = (rows[0, -1] == rows[1, 0]).float()
                transfer = _TwoChunks(continues)
            return lightning_mix(
                projected,
                wq,
                wk,
                wo,
                angles,
                decay,
                scale=head_dim**-0.5,
                eps=EPS,
                document_ids=rows,
                transfer=transfer,
            )

        pairs: Pairs = {}
        for label, way in ways(device).items():
            with way:
                found = with_gradients(fused, exact, {"projected": projected, **weights}, dy)
            pairs |= {name + label: pair for name, pair in found.items()}
        return pairs

    limit = (
        TF32_LIMIT
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        else MIX_LIMITS[dtype]
    )
    return check(
        f"lightning_mix head_dim {head_dim}{' packed' if documents else ''}"
        f"{' split' if split else ''}",
        dtype,
        limit,
        run,
    )


def check_lightning_attn_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family lightning_attn for a model's use of it."""
    pieces = use.thorough or use.context_ranks > 1
    sizes = {"tokens": 1000} if use.thorough else {}
    return check_lightning(
        where,
        use.dtype,
        head_dim=use.head_dim,
        documents=use.documents,
        states=use.thorough,
        pieces=pieces,
        **sizes,
    )


def check_lightning_mix_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family lightning_mix for a model's use of it."""
    return check_lightning_mix(
        where,
        use.dtype,
        head_dim=use.head_dim,
        documents=use.documents,
        split=use.context_ranks > 1,
    )
