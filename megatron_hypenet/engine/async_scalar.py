"""Scalars that the device computes and the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalar:
    """A scalar that is copied to the host after the work that computes it, and read later, so that
    the device can be given more work meanwhile."""

    def __init__(self, number: Tensor) -> None:
        """Start the copy of `number`, which is 0-dimensional and, on a GPU, computed on the current
        stream."""
        self._copied: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(
                number, non_blocking=True
            )
            self._copied = torch.cuda.Event()
            self._copied.record()

    def value(self) -> float:
        """Wait for the copy and return the value."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)
