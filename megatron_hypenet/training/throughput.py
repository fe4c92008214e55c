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


FP8_RATE = 2.0
"""Dense FP8 operations per second over bf16's, in the same data sheets, of GPUs that have FP8."""


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
    """Peak bf16 FLOP/s of one device, None when unknown."""
    fp8_flops_per_token: float = 0.0
    """Operations among `flops_per_token` in FP8."""

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

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Return the time that the operations take at the peak of the precision in which each is
        computed, over the time that they take, between 0 and 1: `mfu` where there is no FP8."""
        share = self.mfu(tokens_per_second)
        if share is None:
            return None
        saved = self.fp8_flops_per_token * (1 - 1 / FP8_RATE)
        return share * (self.flops_per_token - saved) / self.flops_per_token
