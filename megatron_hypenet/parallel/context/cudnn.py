"""cuDNN's attention with what torch's public function hides: the log-sum-exps of a block, and
gradients from those of a longer row of blocks.

On an H100 it runs at about twice the speed of torch's flash kernel. Causal blocks are aligned
top-left, so they have to be square; it takes no packed documents here."""

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
MAX_HEAD_DIM = 128


def supports(q: Tensor, k: Tensor, *, causal: bool) -> bool:
    """Return whether the kernel takes a block of queries q [b, m, h, d] and keys k [b, n, g, d]:
    bf16 or fp16 on a GPU of compute capability 9.0 or newer, head_dim a multiple of 8 up to 128,
    causal blocks square, and cuDNN's attention not switched off in torch
    (`torch.backends.cuda.enable_cudnn_sdp`)."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= MAX_HEAD_DIM
        and (not causal or q.shape[1] == k.shape[1])
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `blocks.attend`: o [b, m, h, d] in q's dtype, log-sum-exp [b, h, m] in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, log_sum, *_ = _FORWARD(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return o.transpose(1, 2), log_sum.view(o.shape[:3])


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log_sum: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `blocks.attend_backward`: dq, dk, dv in q's dtype."""
    # state of the dropout that is off
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    o = o.to(q.dtype)
    grad, q, k, v, o = (x.transpose(1, 2) for x in (grad, q, k, v, o))
    m, n = q.shape[2], k.shape[2]
    sums = log_sum.contiguous()[..., None]
    gradients = _BACKWARD(
        grad, q, k, v, o, sums, unused, unused, None, None, None, m, n, 0.0, causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv
