"""The rates of a GPU and of its links, as the time of a step is estimated from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_hypenet.errors import UsageError
from megatron_hypenet.training.throughput import PEAK_BF16, peak_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Rates that a step reaches, not those of a data sheet. Floating-point operations are counted
    as in model/flops.py: causal attention over half the square, backward twice forward."""

    peak: float
    """Dense bf16 operations per second by the data sheet; MFU is a share of it."""
    products: float
    """Operations per second of a matrix product without end."""
    product_edge: float
    """A product of m x k by k x n takes 1 + product_edge * (1/m + 1/k + 1/n) times as long as at
    that rate."""
    attention_forward: float
    """Operations per second of softmax attention over a sequence without end, forward."""
    attention_backward: float
    attention_edge: float
    """Tokens of a sequence at which attention runs at half those rates."""
    memory: float
    """Bytes per second of the GPU's memory."""
    host_link: float
    """Bytes per second that one GPU sends to the others of its host in a collective."""
    network: float
    """Bytes per second of one GPU's network adapter in a collective between hosts."""
    host_latency: float
    """Seconds of a collective within a host without any data."""
    network_latency: float
    launch: float
    """Seconds of host time per layer and pass where steps are not CUDA graphs."""
    gathered_layer: float
    """Seconds of DeepSpeed's hooks per layer and pass under ZeRO-3."""
    gap: float
    """Seconds per layer and direction between kernels, and of kernels too small to be counted."""
    shared_clock: float
    """Time of products over that of one GPU alone, where several GPUs of a host work and their
    clocks are lower."""
    gpus_per_host: int = 8


H100 = Machine(
    peak=PEAK_BF16["H100"],
    # tools/bench/results/step_h100_202611.md and tools/bench/step.py --profile
    products=800e12,
    product_edge=150.0,
    # tools/bench/results/parallel_h100x2_202611.md: one GPU, 32,768 tokens
    attention_forward=607e12,
    attention_backward=419e12,
    attention_edge=2000.0,
    memory=3.0e12,
    # fp32 gradients over NVLink in the same file; the network was not measured: 400 Gbit/s for each
    # GPU, as hosts of eight H100s have, of which four fifths are reached
    host_link=300e9,
    network=40e9,
    # tools/bench/results/two_gpus_h100x2_202611.md; another machine was faster in both
    host_latency=180e-6,
    # not measured: twice as long over the network, and the host's time for about 60 kernels
    network_latency=360e-6,
    launch=0.6e-3,
    gathered_layer=3.9e-3,
    gap=60e-6,
    shared_clock=1.02,
)

_MEMORY = {
    "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "H200": 4.8e12, "H800": 3.35e12,
    "GH200": 4.0e12, "B200": 8.0e12, "A100": 2.0e12, "A800": 2.0e12, "L40S": 0.86e12,
}  # fmt: skip
"""Bytes per second of the memory by part of the device's name, from the makers' data sheets."""


def machine(gpu: str) -> Machine:
    """Return the rates of a GPU named as in `PEAK_BF16`; those other than an H100's are an H100's
    in the ratio of the data sheets. Raises UsageError for a GPU that is not listed."""
    peak = peak_flops(gpu)
    bandwidth = next((rate for part, rate in _MEMORY.items() if part in gpu), None)
    if peak is None or bandwidth is None:
        raise UsageError(f"--gpu {gpu}: its rates are not known; use one of {', '.join(PEAK_BF16)}")
    faster = peak / H100.peak
    return replace(
        H100,
        peak=peak,
        products=H100.products * faster,
        attention_forward=H100.attention_forward * faster,
        attention_backward=H100.attention_backward * faster,
        memory=H100.memory * bandwidth / _MEMORY["H100"],
    )
