"""Measurements of `hypenet doctor --slurm`: on one node (matrix products, disk, versions) and
between nodes (links, all-reduce)."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megatron_hypenet.checkpoint.manifest import library_versions
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device

CPU = "CPU"
"""`hardware()` of a process without a GPU."""

_DRIVER = Path("/proc/driver/nvidia/version")


def hardware() -> str:
    """Return what this process computes on, by name."""
    return torch.cuda.get_device_name(local_device()) if torch.cuda.is_available() else CPU


def versions() -> dict[str, str]:
    """Return the versions of libraries, and on a node with GPUs of what has to fit together there:
    CUDA, NCCL and the driver."""
    found = library_versions()
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return {**found, "nvidia-driver": driver.group()} if driver else found


def local_device() -> torch.device:
    """Return this process's own GPU, before torch.distributed has chosen it; else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def gemm_tflops(seconds: float = 1.0) -> float:
    """Measure the rate of square matrix products over about `seconds`, bf16 on a GPU and fp32 on a
    CPU, in units of 1e12 operations per second.

    The mean over the time, not the best: an occasional slowdown of a node slows every collective at
    that time.
    """
    where = local_device()
    size, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    for _ in range(2):  # the first calls load libraries
        a @ b
    wait(where)
    count = 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or count < 3:
        a @ b
        wait(where)
        count += 1
    return count * 2.0 * size**3 / elapsed / 1e12


def disk_mib_per_second(folder: Path, mib: int = 64, turns: int = 3) -> float:
    """Measure the rate of writing and syncing a file of `mib` MiB in `folder`, which has to exist:
    the median of `turns`. Raises OSError."""
    block = os.urandom(1 << 20)
    rates = []
    for _ in range(turns):
        with tempfile.NamedTemporaryFile(
            dir=folder, prefix=".hypenet-disk-check-", buffering=0
        ) as stream:
            began = time.perf_counter()
            for _ in range(mib):
                if stream.write(block) != len(block):
                    raise OSError(f"{folder} took only part of 1 MiB")
            os.fsync(stream.fileno())
            rates.append(mib / (time.perf_counter() - began))
    return median(rates)


def rounds(leaders: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the pairs that can exchange data at the same time: neighbours on a ring, in two rounds
    (three for an odd number)."""
    count = len(leaders)
    if count < 2:
        return []
    if count == 2:
        return [[(leaders[0], leaders[1])]]
    ring = [(leaders[i], leaders[(i + 1) % count]) for i in range(count)]
    even, odd = ring[0 : count - count % 2 : 2], ring[1 : count - count % 2 : 2]
    return [even, odd] + ([[ring[-1]]] if count % 2 else [])


def exchange_rate(partner: int, repetitions: int = 3) -> float:
    """Measure GiB/s to and from one other process: the best of several, after one to open the
    connection."""
    count = (256 << 20) if device().type == "cuda" else (8 << 20)
    out, back = (torch.empty(count, dtype=torch.uint8, device=device()) for _ in range(2))
    best = 0.0
    for turn in range(repetitions + 1):
        began = time.perf_counter()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, partner), dist.P2POp(dist.irecv, back, partner)]
        ):
            work.wait()
        wait(device())
        if turn:
            best = max(best, 2 * count / 2**30 / (time.perf_counter() - began))
    return best


def all_reduce_rate(repetitions: int = 3) -> float | None:
    """Measure the bus bandwidth over all processes in GiB/s: 2 (n - 1) / n times the bytes, over
    the time. None for one process."""
    size = groups.world_size()
    if size == 1:
        return None
    count = (128 << 20) if device().type == "cuda" else (2 << 20)
    data = torch.zeros(count, dtype=torch.float32, device=device())
    best = 0.0
    for turn in range(repetitions + 1):
        groups.barrier()
        began = time.perf_counter()
        dist.all_reduce(data)
        wait(device())
        if turn:
            best = max(
                best, 2 * (size - 1) / size * 4 * count / 2**30 / (time.perf_counter() - began)
            )
    return best


def wait(where: torch.device) -> None:
    """Wait until the device has finished its work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
