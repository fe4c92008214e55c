"""One step of AdamW on flat fp32 weights that also clips the gradient and writes the model's
weights in the compute dtype.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101). Scaling
the gradient, torch's fused step, and the copy to the model's weights move 8, 28 and 6 bytes per
weight one after the other; in one pass they move 30."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megatron_hypenet.ops.kernels import enabled, kernel_family

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one step; `count` begins with 1."""

    count: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def step_size(self) -> float:
        """Return the learning rate over the first moment's bias correction."""
        return self.lr / (1.0 - self.betas[0] ** self.count)

    @property
    def root_correction(self) -> float:
        """Return the square root of the second moment's bias correction."""
        return math.sqrt(1.0 - self.betas[1] ** self.count)


@kernel_family(
    "adamw",
    fits=lambda use: kernel_fits(use.dtype),
    check="megatron_hypenet.ops.selftest:check_adamw_use",
)
@torch.no_grad()
def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute_weight: Tensor,
    step: AdamWStep,
    scale: Tensor,
) -> None:
    """Update `weight`, `exp_avg`, `exp_avg_sq` [n], fp32, and overwrite `compute_weight` [n] with
    the weight in its own dtype; all contiguous.

    `scale` (0-dimensional, fp32, on the same device) multiplies the gradient first; where it is NaN
    nothing changes. On CUDA one kernel, and the host does not wait; elsewhere torch's fused step,
    with the gradient scaled in place before it and the copy after it."""
    if (
        weight.is_cuda
        and enabled("adamw")
        and kernel_fits(compute_weight.dtype)
        and weight.dtype == torch.float32
    ):
        fused_adamw(weight, gradient, exp_avg, exp_avg_sq, compute_weight, step, scale)
        return
    factor = float(scale)
    if math.isnan(factor):
        return
    if factor != 1.0:
        gradient.mul_(factor)
    before = torch.tensor(step.count - 1.0, device=weight.device)
    torch_adamw(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [before],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=step.betas[0],
        beta2=step.betas[1],
        lr=step.lr,
        weight_decay=step.weight_decay,
        eps=step.eps,
    )
    compute_weight.copy_(weight)


def kernel_fits(dtype: torch.dtype) -> bool:
    """Return whether the kernel writes weights of this dtype."""
    return dtype in KERNEL_DTYPES


def fused_adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute_weight: Tensor,
    step: AdamWStep,
    scale: Tensor,
) -> None:
    """Run the kernel; arguments as in `adamw`. ValueError unless all five have the same number of
    elements and are contiguous."""
    from megatron_hypenet.ops.adamw import triton as kernels

    tensors = (weight, gradient, exp_avg, exp_avg_sq, compute_weight)
    if len({x.numel() for x in tensors}) > 1 or not all(x.is_contiguous() for x in tensors):
        raise ValueError(
            "weights, gradients and moments do not belong together: "
            f"{', '.join(str(tuple(x.shape)) for x in tensors)}"
        )
    kernels.run(*tensors, step, scale)
