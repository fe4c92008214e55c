"""Losses of every token of a text under a model of transformers, in pieces that bound memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE_TOKENS = 2048
"""Tokens whose logits are in memory at once."""


@torch.inference_mode()
def token_scores(model: Any, ids: Tensor, piece: int = PIECE_TOKENS) -> tuple[Tensor, Tensor]:
    """ids [b, t] -> negative log likelihoods of the next tokens in nats, fp32 [b, t - 1], and
    whether each was the model's first choice, bool [b, t - 1]; on the CPU."""
    from megatron_hypenet.export.hf_remote.generation_hypenet import CACHE

    ids = ids.to(model.device)
    cache = None
    losses, firsts = [], []
    for start in range(0, ids.shape[1] - 1, piece):
        stop = min(start + piece, ids.shape[1] - 1)
        out = model(ids[:, start:stop], use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = out[CACHE]
        logits = out.logits.float().flatten(0, 1)
        targets = ids[:, start + 1 : stop + 1]
        found = F.cross_entropy(logits, targets.flatten(), reduction="none")
        losses.append(found.view_as(targets).cpu())
        firsts.append((logits.argmax(-1).view_as(targets) == targets).cpu())
    return torch.cat(losses, dim=1), torch.cat(firsts, dim=1)
