"""The kernels on this machine's GPU against the float64 definition: for `hypenet doctor --kernels` and for whoever ports them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn.chunked import chunked_lightning_attn
from megatron_hypenet.ops.lightning_attn.dispatch import lightning_attn

# Relative RMS error allowed per dtype; inputs rounded to bf16 give 2e-3..4e-3 in any kernel that multiplies bf16.
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
NAMES = ("o", "final state", "dq", "dk", "dv", "d initial state")


@dataclass(frozen=True)
class KernelCheck:
    """One run of the operator: its dtype and shape, the tensor that is furthest off, and by how much (relative RMS)."""

    name: str
    worst: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


def check_kernels(device: torch.device | str) -> list[KernelCheck]:
    """Every dtype, narrow and wide heads, packed documents, states in and out; a few seconds, most of it compilation."""
    checks = []
    for dtype, limit in LIMITS.items():
        for head_dim, documents in ((64, False), (128, True)):
            errors = relative_errors(device, dtype, head_dim=head_dim, documents=documents)
            worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN first
            name = f"lightning_attn {str(dtype).removeprefix('torch.')} head_dim {head_dim}{' packed' if documents else ''}"
            checks.append(KernelCheck(name, worst, errors[worst], limit))
    return checks


def relative_errors(
    device: torch.device | str, dtype: torch.dtype, *, head_dim: int, documents: bool, tokens: int = 1000
) -> dict[str, float]:
    """Relative RMS error of each output and gradient of `lightning_attn` in `dtype` against float64 on the same rounded inputs."""
    heads = 4
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    q, k, v, do = (draw(1, tokens, heads, head_dim).to(dtype) for _ in range(4))
    state, dstate = draw(1, heads, head_dim, head_dim), draw(1, heads, head_dim, head_dim)
    ids = (torch.arange(tokens, device=device) // 301).int()[None] if documents else None
    results = []
    for wide in (True, False):
        inputs = [(x.double() if wide else x).clone().requires_grad_() for x in (q, k, v, state)]
        op: Callable[..., tuple[Tensor, Tensor]] = chunked_lightning_attn if wide else lightning_attn
        o, final = op(*inputs[:3], log_decay(heads), scale=head_dim**-0.5, initial_state=inputs[3], document_ids=ids)
        torch.autograd.backward([o, final], [do.to(o.dtype), dstate.to(final.dtype)])
        results.append([o.detach(), final.detach(), *_gradients(inputs)])
    pairs = zip(NAMES, *results, strict=True)
    return {name: float((got.double() - want).norm() / want.norm()) for name, want, got in pairs}


def _gradients(inputs: list[Tensor]) -> list[Tensor]:
    gradients = [x.grad for x in inputs]
    return [gradient for gradient in gradients if gradient is not None]
