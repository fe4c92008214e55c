"""Documents inside one training sequence: ids that keep them apart, and loss weights that leave out
predictions across a boundary.

A token stream is a sequence of documents; a window of it may start and end inside one. The last
token of a document is its end-of-document token (data/prepare.py), or, in a file without such
tokens, its last token by the file's index. The end token still belongs to its document: the model
learns when to stop, but not what follows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(ends: Tensor) -> Tensor:
    """Return whether each token is the last of its document, bool [b, t] -> the document it belongs
    to, int32 [b, t], from 0 in every row."""
    return (ends.cumsum(dim=1) - ends.long()).to(torch.int32)


def loss_weights(ends: Tensor) -> Tensor:
    """Return whether each token is the last of its document, bool [b, t] -> float32 [b, t]: 0 there
    (the next token is another's), else 1."""
    return (~ends).to(torch.float32)
