"""Held-out text: mean next-token loss and accuracy over given sequences."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_hypenet.errors import DataError

TokenScores = Callable[[Tensor], tuple[Tensor, Tensor]]
"""ids int64 [b, t] -> nll fp32 [b, t - 1] (nats) and correct bool [b, t - 1]; position p scores
ids[:, p + 1]."""


def heldout_loss(
    token_scores: TokenScores, texts: Tensor, *, batch_size: int
) -> tuple[float, float]:
    """Return mean loss in nats per token and next-token accuracy in % over `texts`, int64 [count,
    t]; sums accumulate in float64.

    Raises DataError when `texts` has no sequence.
    """
    losses, accuracy = sequence_losses(token_scores, texts, batch_size=batch_size)
    return sum(losses) / len(losses), accuracy


def sequence_losses(
    token_scores: TokenScores, texts: Tensor, *, batch_size: int
) -> tuple[list[float], float]:
    """Return the mean loss of each sequence of `texts`, in nats per token, and the next-token
    accuracy in % over all of them; otherwise as `heldout_loss`."""
    if texts.ndim != 2 or texts.shape[0] == 0 or texts.shape[1] < 2:
        raise DataError(
            f"held-out evaluation got sequences of shape {list(texts.shape)}; "
            "give more held-out text or a shorter seq_length."
        )
    losses: list[float] = []
    correct = 0
    for start in range(0, texts.shape[0], batch_size):
        nll, right = token_scores(texts[start : start + batch_size])
        losses += nll.double().mean(dim=1).tolist()
        correct += int(right.sum().item())
    return losses, 100.0 * correct / (texts.shape[0] * (texts.shape[1] - 1))
