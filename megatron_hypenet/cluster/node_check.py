"""Check that all nodes of an allocation are fit to train: each is measured and compared with the
others, and those that would slow the run down are named.

A collective waits for its slowest member: one throttled GPU, one bad cable or one full disk slows
hundreds of processes down. Measurements are compared with the median of the same allocation, not
with a data sheet, so the same rules serve any cluster.

First every process examines its node alone and reports through the launcher's store, so that a node
that fails, or never reports, is named and blocks no other. Links are measured only when all nodes
have reported without a fault.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron_hypenet.cluster import node_measure as measure
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import SetupError
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.rendezvous import Meeting, meeting_point
from megatron_hypenet.process_place import host_name

SLOW_COMPUTE = 0.85
"""Share of the median GEMM rate below which a node is to be left out."""
SLOW_LINK = 0.5
"""Share of the median link below which a link counts as slow."""
SLOW_DISK = 0.3
"""Share of the median disk rate below which a disk is reported as slow."""
CLOCK_SECONDS = 2.0
"""Difference of clocks from which logs of several nodes no longer show the order of events."""
PATIENCE_SECONDS = 180.0
"""How long the first process waits for the reports of the others after its own."""

_READ_SECONDS = 30.0
_ALL = "node-reports"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one process measured on its node."""

    host: str
    rank: int
    hardware: str
    gemm_tflops: float
    """0 where it could not be measured; `faults` says why."""
    disk_mib_per_second: float | None
    """One process of each node writes; None for the others, and where it could not be measured."""
    clock: float = 0.0
    """time.time() right after a barrier; 0 for all where there was none."""
    versions: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    """Checks that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Bandwidth between two nodes, both directions at once."""

    hosts: tuple[str, str]
    gib_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of the comparison."""

    problems: tuple[str, ...]
    exclude: tuple[str, ...]
    """Hosts to leave out, for sbatch --exclude."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """All measurements of an allocation."""

    nodes: tuple[NodeReport, ...]
    links: tuple[Link, ...] = ()
    """Not measured while a node fails or is missing."""
    all_reduce_gib_per_second: float | None = None
    """Bus bandwidth over all processes. None for one process, and where links are not measured."""
    missing: tuple[str, ...] = ()
    """Hosts that never reported."""


def measure_nodes(
    folder: Path, *, hosts: Sequence[str] = (), patience: float = PATIENCE_SECONDS
) -> Survey:
    """Measure all nodes; collective, called by every process of the launcher, the same answer on
    each. `folder` is where runs will lie, `hosts` the node of each rank where the launcher knows
    them. torch.distributed is running afterwards if all nodes were fit for it."""
    meeting = meeting_point(timedelta(seconds=2 * patience + 60))
    rank = meeting.rank if meeting else 0
    mine = examine(folder, rank)
    if meeting is None:
        groups.init_parallel(ParallelConfig())
        return Survey(nodes=(mine,))
    nodes, missing = exchange_reports(meeting, mine, hosts, patience)
    if (
        missing
        or any(node.faults for node in nodes)
        or len({node.hardware == measure.CPU for node in nodes}) > 1
    ):
        return Survey(nodes=nodes, missing=missing)
    groups.init_parallel(ParallelConfig(), timeout_minutes=patience / 60, meeting=meeting)
    groups.barrier()
    clocks: list[Any] = [None] * groups.world_size()
    dist.all_gather_object(clocks, time.time())
    nodes = tuple(replace(node, clock=clock) for node, clock in zip(nodes, clocks, strict=True))
    return Survey(
        nodes=nodes, links=tuple(_links(nodes)), all_reduce_gib_per_second=measure.all_reduce_rate()
    )


def examine(folder: Path, rank: int) -> NodeReport:
    """Measure this process's node alone. A failure becomes part of the report, because the other
    processes need it."""
    faults: list[str] = []
    writes = os.environ.get("LOCAL_RANK", "0") == "0"

    def tried(what: str, compute: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return compute()
        except (OSError, RuntimeError) as error:
            faults.append(f"{what}: {error}")
            return otherwise

    return NodeReport(
        host=host_name(),
        rank=rank,
        hardware=tried("finding the GPU", measure.hardware, "?"),
        gemm_tflops=tried("computing", measure.gemm_tflops, 0.0),
        disk_mib_per_second=tried(
            f"writing to {folder}", lambda: measure.disk_mib_per_second(folder), None
        )
        if writes
        else None,
        versions=tried("finding versions", measure.versions, {}),
        faults=tuple(faults),
    )


def exchange_reports(
    meeting: Meeting, mine: NodeReport, hosts: Sequence[str], patience: float
) -> tuple[tuple[NodeReport, ...], tuple[str, ...]]:
    """Return (the reports that came, by rank; hosts of those that did not). Raises SetupError where
    the first process gives no answer."""
    store = meeting.store
    all_ranks = range(meeting.world_size)
    store.set(_key(mine.rank), json.dumps(asdict(mine)))
    if mine.rank == 0:
        silent = _silent(store, [_key(rank) for rank in all_ranks], patience)
        came = [store.get(_key(rank)).decode() for rank in all_ranks if _key(rank) not in silent]
        missing = dict.fromkeys(
            hosts[rank] if rank < len(hosts) else f"rank {rank}"
            for rank in all_ranks
            if _key(rank) in silent
        )
        store.set(_ALL, json.dumps({"reports": came, "missing": list(missing)}))
    try:
        found = json.loads(store.get(_ALL).decode())
    except RuntimeError as error:
        raise SetupError(
            f"the first node ({os.environ['MASTER_ADDR']}) gives no answer: {error}; leave it out"
        ) from error
    store.set(f"{_key(mine.rank)}/read", "")
    if mine.rank == 0:  # the store ends with this process
        _silent(store, [f"{_key(json.loads(text)['rank'])}/read" for text in came], _READ_SECONDS)
    rows = [json.loads(text) for text in found["reports"]]
    return tuple(NodeReport(**{**row, "faults": tuple(row["faults"])}) for row in rows), tuple(
        found["missing"]
    )


def _key(rank: int) -> str:
    return f"node-report/{rank}"


def _silent(store: dist.Store, keys: Sequence[str], seconds: float) -> set[str]:
    """Return the `keys` that no process has set within `seconds`."""
    deadline = time.monotonic() + seconds
    silent = set()
    for key in keys:
        try:
            store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
        # the name of a timeout depends on torch's version; all are RuntimeErrors
        except RuntimeError:
            silent.add(key)
    return silent


def _links(nodes: Sequence[NodeReport]) -> Iterator[Link]:
    """Yield the bandwidth of pairs of nodes, several pairs at a time; every node meets two others
    where there are three."""
    leaders = [
        next(node.rank for node in nodes if node.host == host)
        for host in dict.fromkeys(node.host for node in nodes)
    ]
    for pairs in measure.rounds(leaders):
        partner = {a: b for pair in pairs for a, b in (pair, pair[::-1])}.get(groups.rank())
        rate = measure.exchange_rate(partner) if partner is not None else 0.0
        rates: list[Any] = [None] * groups.world_size()
        dist.all_gather_object(rates, rate)
        for a, b in pairs:
            yield Link(hosts=(nodes[a].host, nodes[b].host), gib_per_second=min(rates[a], rates[b]))


def judge(found: Survey) -> Verdict:
    """Compare the nodes with each other. Deterministic, without any measurement of its own."""
    problems = [
        f"{host}: no report within {PATIENCE_SECONDS:.0f} s; its processes do not start, or hang"
        for host in found.missing
    ]
    exclude = set(found.missing)
    for node in found.nodes:
        problems += [f"{node.host} (rank {node.rank}): {fault}" for fault in node.faults]
        exclude |= {node.host} if node.faults else set()
    sound = [node for node in found.nodes if not node.faults]
    usual = {
        kind: median(n.gemm_tflops for n in sound if n.hardware == kind)
        for kind in {n.hardware for n in sound}
    }
    disks = [n.disk_mib_per_second for n in sound if n.disk_mib_per_second is not None]
    clock = median(n.clock for n in sound) if sound else 0.0
    for node in sound:
        where = f"{node.host} (rank {node.rank})"
        if node.gemm_tflops < SLOW_COMPUTE * usual[node.hardware]:
            problems.append(
                f"{where}: {node.gemm_tflops:.3g} TFLOP/s, the median {node.hardware} here does "
                f"{usual[node.hardware]:.3g}"
            )
            exclude.add(node.host)
        if node.disk_mib_per_second is not None and node.disk_mib_per_second < SLOW_DISK * median(
            disks
        ):
            problems.append(
                f"{where}: writes {node.disk_mib_per_second:.0f} MiB/s, "
                f"the median here is {median(disks):.0f}"
            )
        if abs(node.clock - clock) > CLOCK_SECONDS:
            problems.append(f"{where}: its clock is {node.clock - clock:+.1f} s from the others'")
    for host, lines in _odd_versions(sound).items() if sound else ():
        problems += [f"{host}: {line}" for line in lines]
        exclude.add(host)
    for host, line in _slow_links(found.links).items():
        problems.append(line)
        exclude.add(host)
    return Verdict(problems=tuple(problems), exclude=tuple(sorted(exclude)))


def _odd_versions(nodes: Sequence[NodeReport]) -> dict[str, list[str]]:
    """Return hosts whose library versions or hardware are not those of most, with what differs."""
    odd: dict[str, list[str]] = {}
    for name in ("hardware", *sorted({name for node in nodes for name in node.versions})):
        has = {
            node.host: node.hardware
            if name == "hardware"
            else node.versions.get(name, "not installed")
            for node in nodes
        }
        usual, _ = Counter(has.values()).most_common(1)[0]
        for host, value in has.items():
            if value != usual:
                odd.setdefault(host, []).append(f"{name} is {value}, most nodes have {usual}")
    return odd


def _slow_links(links: Sequence[Link]) -> dict[str, str]:
    """Return hosts all of whose links are slow; one slow link between two nodes that have good
    links elsewhere counts for neither."""
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
