"""The kernels of the vocabulary losses against float64, launched directly: as `ops.selftest` does
for the kernels of the ops."""

import torch
from torch import Tensor

from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.selftest import ROUNDING_LIMITS, KernelCheck, Pairs, check


def check_vocab(
    device: torch.device, dtype: torch.dtype, *, vocab_rows: int, shards: int = 1, tokens: int = 32
) -> KernelCheck:
    """Check KL, cross entropy and scores of fp32 logits [tokens, vocab_rows * shards], and their
    gradients rounded to dtype.

    One shard takes the one-pass kernels where the GPU has room for them, two the kernels of a split
    vocabulary."""

    def run() -> Pairs:
        from megatron_hypenet.parallel.vocab_loss import triton_terms as terms

        generator = torch.Generator().manual_seed(6)
        s = 3 * torch.randn(tokens, vocab_rows * shards, generator=generator)
        t = (s + torch.randn(s.shape, generator=generator)).to(device)
        labels = torch.randint(0, vocab_rows * shards, (tokens,), generator=generator).to(device)
        s = s.to(device)
        cut = lambda x: [part.contiguous() for part in x.chunk(shards, -1)]  # noqa: E731
        starts = [shard * vocab_rows for shard in range(shards)]
        gradients = [torch.empty(2, tokens, vocab_rows, dtype=dtype, device=device) for _ in starts]
        kl_parts = list(zip(cut(s), cut(t), strict=True))
        ce_parts = [(part, labels - start) for part, start in zip(cut(s), starts, strict=True)]
        scores = terms.ce_merge(
            torch.stack([terms.ce_merge(terms.ce_stats(*part)) for part in ce_parts])
        )
        if shards == 1:
            kl = terms.kl_stats_and_gradient(*kl_parts[0], None, gradients[0][0])
            ce = terms.ce_stats_and_gradient(*ce_parts[0], None, gradients[0][1])
        else:
            own = [terms.kl_merge(terms.kl_stats(*part)) for part in kl_parts]
            kl = terms.kl_merge(torch.stack(own))
            ce = scores
            for kl_part, ce_part, local, out in zip(
                kl_parts, ce_parts, own, gradients, strict=True
            ):
                terms.kl_gradient(*kl_part, local, kl, None, out[0])
                terms.ce_gradient(*ce_part, local, ce, None, out[1])
        kl_gradient, ce_gradient = torch.cat(gradients, -1)
        found = (
            terms.kl_loss(kl),
            kl_gradient,
            terms.ce_loss(ce),
            ce_gradient,
            terms.ce_loss(scores),
        )
        names = ("KL", "gradient of KL", "cross entropy", "gradient of cross entropy", "score")
        return {
            name: (got, want)
            for name, got, want in zip(names, found, _exact(s, t, labels), strict=True)
        }

    return check(
        f"vocab_loss {vocab_rows} rows{' of two shards' if shards > 1 else ''}",
        dtype,
        ROUNDING_LIMITS[dtype],
        run,
    )


def _exact(s: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return KL [n] and its gradient [n, v], cross entropy and its gradient, and the score, which
    is the cross entropy."""
    log_q, log_p = s.double().log_softmax(-1), t.double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    nll = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    return kl, q - p, nll, q.scatter_add(-1, labels[:, None], -torch.ones_like(q[:, :1])), nll


def check_vocab_loss_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family vocab_loss for a model's use of it."""
    return check_vocab(where, use.dtype, vocab_rows=use.vocab_rows, shards=min(use.tensor_ranks, 2))
