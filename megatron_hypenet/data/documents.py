"""Where documents meet inside one training sequence: ids that keep them apart, and weights that leave out what cannot be predicted.

A token stream holds document after document, each closed by an end-of-document token (data/prepare.py); a window of it may start and end
inside one. The end token still belongs to the document that it closes: the model learns when to stop, but not what comes next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(inputs: Tensor, end_of_document: int) -> Tensor:
    """Token ids [b, t] -> the document each token belongs to, int32 [b, t]: 0 at the start of a row, one more after every end token."""
    ends = inputs == end_of_document
    return (ends.cumsum(dim=1) - ends.long()).to(torch.int32)


def loss_weights(inputs: Tensor, end_of_document: int) -> Tensor:
    """Token ids [b, t] -> float32 [b, t]: 0 where the next token starts another document (the input is an end token), else 1."""
    return (inputs != end_of_document).to(torch.float32)
