"""The hardware's peak performance, and the share of it that a run reaches."""

from __future__ import annotations

from dataclasses import dataclass

PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 tensor-core operations per second by part of the device's name, from the makers' data
sheets; the first match counts."""


def peak_flops(name: str | None = None) -> float | None:
    """Return the peak dense bf16 operations per second of a GPU, this process's unless named; None
    on a CPU and for a GPU that is not listed."""
    if name is None:
        import torch

        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


@dataclass(frozen=True, slots=True)
class Workload:
    """The cost of a token and the devices that share the work: turns tokens per second into
    utilisation."""

    flops_per_token: float
    """FLOPs per token of a training step, over all devices; see model/flops.py."""
    num_devices: int = 1
    peak: float | None = None
    """Peak FLOP/s of one device, None when unknown."""

    def tflops_per_device(self, tokens_per_second: float) -> float:
        """Return the operations per second of one device, in units of 1e12."""
        return tokens_per_second * self.flops_per_token / self.num_devices / 1e12

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOP utilisation between 0 and 1: useful operations over the device's
        peak; None when the peak is unknown."""
        return (
            None
            if self.peak is None
            else self.tflops_per_device(tokens_per_second) * 1e12 / self.peak
        )
