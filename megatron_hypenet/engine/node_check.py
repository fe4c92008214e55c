"""Are all nodes of an allocation fit to train? Each is measured beside the others, and those that would slow all down are named.

A collective waits for its slowest member: one throttled GPU, one bad cable or one full disk sets the pace of hundreds. What is measured is
compared with the median of the same allocation, not with a data sheet, so the same rules serve any cluster."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_hypenet.checkpoint.manifest import library_versions
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device

SLOW_COMPUTE = 0.85
"""Share of the median GEMM rate below which a node is to be left out."""
SLOW_LINK = 0.5
"""Share of the median link below which a link counts as slow."""
SLOW_DISK = 0.3
"""Share of the median disk rate below which a node is to be looked at."""
CLOCK_SECONDS = 2.0
"""Difference of clocks from which logs of several nodes no longer tell what came first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one process measured on its node."""

    host: str
    rank: int
    hardware: str
    gemm_tflops: float
    disk_mib_per_second: float
    clock: float
    """time.time() right after a barrier."""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Bandwidth between two nodes, both directions at once."""

    hosts: tuple[str, str]
    gib_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What follows from the measurements."""

    problems: tuple[str, ...]
    exclude: tuple[str, ...]
    """Hosts to leave out, for sbatch --exclude."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """All measurements of an allocation."""

    nodes: tuple[NodeReport, ...]
    links: tuple[Link, ...]
    all_reduce_gib_per_second: float | None
    """Bus bandwidth over all processes: 2 (n - 1) / n times the bytes, over the time. None for one process."""


def survey(folder: Path) -> Survey:
    """Measure all nodes; collective, called by every process of the launcher, the same answer on each. `folder` is where runs will lie."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rate, disk = gemm_tflops(), disk_mib_per_second(folder)
    if groups.world_size() > 1:
        groups.barrier()
    mine = NodeReport(
        host=host_name(), rank=groups.rank(), hardware=name, gemm_tflops=rate, disk_mib_per_second=disk, clock=time.time(),
        versions=library_versions(),
    )  # fmt: skip
    nodes: list[Any] = [mine]
    if groups.world_size() > 1:
        nodes = [None] * groups.world_size()
        dist.all_gather_object(nodes, mine)
    return Survey(nodes=tuple(nodes), links=tuple(_links(nodes)), all_reduce_gib_per_second=_all_reduce_rate())


def host_name() -> str:
    """The node's name as SLURM knows it, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gemm_tflops(seconds: float = 1.0) -> float:
    """Rate of square matrix products, bf16 on a GPU and fp32 on a CPU: the median of repetitions over about `seconds`."""
    where = device()
    size, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    a @ b
    _wait()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        began = time.perf_counter()
        a @ b
        _wait()
        rates.append(2.0 * size**3 / (time.perf_counter() - began) / 1e12)
    return median(rates)


def disk_mib_per_second(folder: Path, mib: int = 64) -> float:
    """Rate of writing and syncing a file of `mib` MiB in `folder`, which has to exist."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".hypenet-disk-check-") as stream:
        began = time.perf_counter()
        for _ in range(mib):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        return mib / (time.perf_counter() - began)


def _links(nodes: Sequence[NodeReport]) -> Iterator[Link]:
    """Bandwidth of pairs of nodes, several pairs at a time; every node meets two others where there are three."""
    leaders = [next(node.rank for node in nodes if node.host == host) for host in dict.fromkeys(node.host for node in nodes)]
    for pairs in rounds(leaders):
        partner = {a: b for pair in pairs for a, b in (pair, pair[::-1])}.get(groups.rank())
        rate = _exchange_rate(partner) if partner is not None else 0.0
        rates: list[Any] = [None] * groups.world_size()
        dist.all_gather_object(rates, rate)
        for a, b in pairs:
            yield Link(hosts=(nodes[a].host, nodes[b].host), gib_per_second=min(rates[a], rates[b]))


def rounds(leaders: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs that can talk at the same time: neighbours on a ring, in two rounds (three for an odd number)."""
    count = len(leaders)
    if count < 2:
        return []
    if count == 2:
        return [[(leaders[0], leaders[1])]]
    ring = [(leaders[i], leaders[(i + 1) % count]) for i in range(count)]
    even, odd = ring[0 : count - count % 2 : 2], ring[1 : count - count % 2 : 2]
    return [even, odd] + ([[ring[-1]]] if count % 2 else [])


def _exchange_rate(partner: int, repetitions: int = 3) -> float:
    """GiB/s to and from one other process: the best of several, after one to open the connection."""
    count = (256 << 20) if device().type == "cuda" else (8 << 20)
    out, back = (torch.empty(count, dtype=torch.uint8, device=device()) for _ in range(2))
    best = 0.0
    for turn in range(repetitions + 1):
        began = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, partner), dist.P2POp(dist.irecv, back, partner)]):
            work.wait()
        _wait()
        if turn:
            best = max(best, 2 * count / 2**30 / (time.perf_counter() - began))
    return best


def _all_reduce_rate(repetitions: int = 3) -> float | None:
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
        _wait()
        if turn:
            best = max(best, 2 * (size - 1) / size * 4 * count / 2**30 / (time.perf_counter() - began))
    return best


def judge(found: Survey) -> Verdict:
    """Compare the nodes with each other. Deterministic, without any measurement of its own."""
    problems: list[str] = []
    exclude: set[str] = set()
    usual = {kind: median(n.gemm_tflops for n in found.nodes if n.hardware == kind) for kind in {n.hardware for n in found.nodes}}
    disk, clock = median(n.disk_mib_per_second for n in found.nodes), median(n.clock for n in found.nodes)
    for node in found.nodes:
        where = f"{node.host} (rank {node.rank})"
        if node.gemm_tflops < SLOW_COMPUTE * usual[node.hardware]:
            problems.append(f"{where}: {node.gemm_tflops:.3g} TFLOP/s, the median {node.hardware} here does {usual[node.hardware]:.3g}")
            exclude.add(node.host)
        if node.disk_mib_per_second < SLOW_DISK * disk:
            problems.append(f"{where}: writes {node.disk_mib_per_second:.0f} MiB/s, the median here is {disk:.0f}")
        if abs(node.clock - clock) > CLOCK_SECONDS:
            problems.append(f"{where}: its clock is {node.clock - clock:+.1f} s from the others'")
    for host, lines in _odd_versions(found.nodes).items():
        problems += [f"{host}: {line}" for line in lines]
        exclude.add(host)
    for host, line in _slow_links(found.links).items():
        problems.append(line)
        exclude.add(host)
    return Verdict(problems=tuple(problems), exclude=tuple(sorted(exclude)))


def _odd_versions(nodes: Sequence[NodeReport]) -> dict[str, list[str]]:
    """Hosts whose library versions or hardware are not those of most, with what differs."""
    odd: dict[str, list[str]] = {}
    for name in ("hardware", *sorted({name for node in nodes for name in node.versions})):
        has = {node.host: node.hardware if name == "hardware" else node.versions.get(name, "not installed") for node in nodes}
        usual, _ = Counter(has.values()).most_common(1)[0]
        for host, value in has.items():
            if value != usual:
                odd.setdefault(host, []).append(f"{name} is {value}, most nodes have {usual}")
    return odd


def _slow_links(links: Sequence[Link]) -> dict[str, str]:
    """Hosts all of whose links are slow; one slow link between two nodes with good ones elsewhere blames neither."""
    if len(links) < 3:
        return {}
    usual = median(link.gib_per_second for link in links)
    slow = {}
    for host in dict.fromkeys(host for link in links for host in link.hosts):
        own = [link for link in links if host in link.hosts]
        if len(own) > 1 and all(link.gib_per_second < SLOW_LINK * usual for link in own):
            rates = ", ".join(f"{link.gib_per_second:.2f}" for link in own)
            slow[host] = f"{host}: {rates} GiB/s to its neighbours, the median link has {usual:.2f}"
    return slow


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
