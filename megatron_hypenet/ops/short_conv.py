"""The short convolution before a delta rule: depthwise, causal, followed by SiLU.

Source: Kimi Delta Attention (arXiv 2510.26692), Gated DeltaNet (arXiv 2412.06464)."""

import torch
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype


def short_conv(x: Tensor, weight: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return silu(sum_j weight[:, j] * x_(i + j)) for every token i after the first W - 1, in x's
    dtype: the last tap is the token itself.

    Args:
        x: [rows, W - 1 + t, channels]; the tokens before a row's first one come first, zeros at the
            start of a sequence (`preceding_tokens`).
        weight: [channels, W].
        document_ids: [rows, W - 1 + t] of the same tokens (`preceding_ids`): no token reads another
            document's. None for one document a row.

    Returns [rows, t, channels]. Products and sums are done in float32, in float64 for float64."""
    dtype = accumulation_dtype(x.dtype)
    taps = weight.to(dtype)
    window = weight.shape[1]
    count = x.shape[1] - window + 1
    total = torch.zeros((), dtype=dtype, device=x.device)
    for tap in range(window):
        part = x[:, tap : tap + count] * taps[:, tap]
        if document_ids is not None:
            same = document_ids[:, tap : tap + count] == document_ids[:, window - 1 :]
            part = part * same[..., None]
        total = total + part
    return torch.nn.functional.silu(total).to(x.dtype)
