"""The head's matrix products: logits in the accumulation dtype from operands in the compute dtype,
and the gradients of hidden states and weight summed over chunks.

bf16 products are accumulated and returned in fp32: logits rounded to bf16 alone give 4-23% gradient
error near p = q. Memory for n tokens at a time: logits in fp32 for one chunk, their gradient in the
model's dtype for `CHUNKS_PER_PRODUCT` chunks, because each weight-gradient product reads and writes
the whole fp32 sum [v, h]: fewer, larger products move fewer bytes."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype

CHUNKS_PER_PRODUCT = 2
"""Chunks whose logit gradients are kept for one weight-gradient product."""
BUFFER_BYTES = {"cuda": 2_000_000_000, "cpu": 32_000_000}
"""Bound on logits and their gradients together where the caller gives no chunk size: what large
products need on a GPU, what caches hold on a CPU (4096 tokens and 2048 words there: 116 ms, and 186
ms for all tokens at once)."""
ROW_MULTIPLE = 128
"""Chunk sizes are rounded to whole GEMM tiles."""


class HeadGradients:
    """d loss / d hidden [n, h] in hidden's dtype and d loss / d weight [v, h] in fp32 (float64 for
    float64), filled block by block."""

    def __init__(self, hidden: Tensor, weight: Tensor, *, want_weight: bool) -> None:
        self._inputs = hidden
        self._weight = weight
        self.hidden = torch.empty_like(hidden)
        self.weight = (
            torch.empty_like(weight, dtype=accumulation_dtype(weight.dtype))
            if want_weight
            else None
        )
        self._empty = True

    def add(self, rows: slice, logit_grad: Tensor) -> None:
        """Use the gradient [tokens in rows, v] of these tokens' logits, in hidden's dtype."""
        torch.mm(logit_grad, self._weight, out=self.hidden[rows])
        if self.weight is not None:
            accumulate(self.weight, logit_grad.t(), self._inputs[rows], fresh=self._empty)
            self._empty = False


def blocks(count: int, chunk: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield the tokens of one weight-gradient product, with the chunks in it: consecutive slices of
    range(count)."""
    block = chunk * CHUNKS_PER_PRODUCT
    for start in range(0, count, block):
        stop = min(start + block, count)
        yield (
            slice(start, stop),
            [slice(at, min(at + chunk, stop)) for at in range(start, stop, chunk)],
        )


def chunk_size(count: int, limit: int | None, bytes_per_token: int, device: torch.device) -> int:
    """Return the tokens per chunk for `count` tokens: at most `limit` (None: what BUFFER_BYTES
    holds), and chunks of nearly equal size.

    bytes_per_token: logits of a token plus CHUNKS_PER_PRODUCT times the gradient of its logits.
    Raises ValueError for a limit below 1."""
    if limit is None:
        budget = BUFFER_BYTES.get(device.type, BUFFER_BYTES["cuda"])
        limit = max(budget // bytes_per_token // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)
    if limit < 1:
        raise ValueError(f"chunk_tokens={limit}: at least one token per chunk")
    even = -(-count // max(-(-count // limit), 1))
    return max(min(limit, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE, count), 1)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Multiply a [m, k] @ b [k, n] into out [m, n] of the accumulation dtype, never rounded to the
    operands' dtype in between."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    if _has_wide_products():
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return _tf32_product(a, b, out)


def accumulate(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """Add a [m, k] @ b [k, n] to total [m, n] in total's dtype; `fresh` means that total is not
    initialised, not even with zeros."""
    beta = 0 if fresh else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and _wide_addmm_works(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif fresh:
        product(a, b, total)
    else:
        step = -(-total.shape[0] // 8)  # an eighth of the sum as a temporary, not all of it
        for start in range(0, total.shape[0], step):
            part = slice(start, start + step)
            total[part] += product(a[part], b, torch.empty_like(total[part]))


def _tf32_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Multiply under torch < 2.8: bf16 and fp16 values are exact in TF32, so TF32 tensor cores
    multiply their fp32 copies without rounding.

    The copies are made for each product: 4 bytes for each element of a and b, beyond
    BUFFER_BYTES."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _has_wide_products() -> bool:
    """Return whether torch's products take an `out_dtype`, as they do since 2.8."""
    return hasattr(torch.ops.aten.mm, "dtype_out") and hasattr(torch.ops.aten.addmm, "dtype_out")


@functools.cache
def _wide_addmm_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether addmm adds products of bf16 operands to an fp32 sum in place: some versions
    since 2.8 require the sum in the operands' dtype."""
    if not _has_wide_products():
        return False
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
