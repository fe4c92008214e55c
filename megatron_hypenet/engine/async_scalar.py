"""Numbers that the host needs and the device makes."""

from __future__ import annotations

import torch
from torch import Tensor


class OnItsWay:
    """A number that is copied to the host behind the work that makes it, and asked for later: the
    device is given more work meanwhile."""

    def __init__(self, number: Tensor) -> None:
        """`number` is 0-dimensional and, on a GPU, made on the current stream."""
        self._copied: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True).copy_(
                number, non_blocking=True
            )
            self._copied = torch.cuda.Event()
            self._copied.record()

    def value(self) -> float:
        """The number, once it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._number)
