"""Nodes are judged by comparison; one that fails or never reports is named; reports pass between
real processes' stores."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_hypenet.cluster import node_check
from megatron_hypenet.cluster.node_check import (
    Link,
    NodeReport,
    Survey,
    examine,
    exchange_reports,
    judge,
    measure_nodes,
)
from megatron_hypenet.errors import SetupError
from megatron_hypenet.parallel.rendezvous import Meeting

NODES = tuple(
    NodeReport(
        host=f"n{i}",
        rank=i,
        hardware="NVIDIA H100",
        gemm_tflops=600.0 + i,
        disk_mib_per_second=900.0,
        clock=1e9,
        versions={"torch": "2.11"},
    )
    for i in range(5)
)
LINKS = tuple(Link(hosts=(f"n{i}", f"n{(i + 1) % 5}"), gib_per_second=40.0) for i in range(5))


def verdict(nodes=NODES, links=LINKS):
    return judge(Survey(nodes=tuple(nodes), links=tuple(links), all_reduce_gib_per_second=30.0))


def changed(index, **changes):
    return [replace(node, **changes) if i == index else node for i, node in enumerate(NODES)]


def test_equal_nodes_pass():
    assert verdict() == type(verdict())(problems=(), exclude=())


@pytest.mark.parametrize(
    ("changes", "said", "excluded"),
    [
        ({"gemm_tflops": 400.0}, "400 TFLOP/s, the median NVIDIA H100 here does 601", True),
        ({"versions": {"torch": "2.9"}}, "torch is 2.9, most nodes have 2.11", True),
        ({"versions": {}}, "torch is not installed", True),
        ({"hardware": "NVIDIA A100", "gemm_tflops": 250.0}, "hardware is NVIDIA A100", True),
        ({"disk_mib_per_second": 100.0}, "writes 100 MiB/s, the median here is 900", False),
        ({"clock": 1e9 + 7}, "its clock is +7.0 s", False),
        (
            {"faults": ("writing to /runs: Read-only file system",), "gemm_tflops": 0.0},
            "writing to /runs: Read-only file system",
            True,
        ),
    ],
)
def test_the_odd_one_is_named(changes, said, excluded):
    found = verdict(changed(2, **changes))
    assert (
        len(found.problems) == 1
        and said in found.problems[0]
        and found.problems[0].startswith("n2")
    )
    assert found.exclude == (("n2",) if excluded else ())


def test_a_node_with_slow_links_on_both_sides_is_left_out():
    both = [replace(link, gib_per_second=5.0) if "n3" in link.hosts else link for link in LINKS]
    assert verdict(links=both).exclude == ("n3",)
    one = [
        replace(link, gib_per_second=5.0) if link.hosts == ("n3", "n4") else link for link in LINKS
    ]
    assert verdict(links=one).exclude == ()


def test_what_never_reported_or_failed_everywhere_is_named():
    found = judge(Survey(nodes=NODES[:2], missing=("n7",)))
    assert found.exclude == ("n7",) and found.problems[0].startswith("n7: no report within 180 s")
    broken = tuple(replace(node, faults=("computing: no CUDA device",)) for node in NODES)
    assert judge(Survey(nodes=broken)).exclude == tuple(node.host for node in NODES)


def meetings(count):
    """Return the same store as each of `count` processes sees it."""
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    clients = [
        dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        for _ in range(count - 1)
    ]
    return [Meeting(store, rank, count) for rank, store in enumerate([server, *clients])]


def test_reports_reach_everybody_and_a_silent_node_is_missing():
    points = meetings(4)
    found = {}

    def take_part(rank):
        hosts = [f"n{i}" for i in range(4)] if rank == 0 else ()
        found[rank] = exchange_reports(points[rank], NODES[rank], hosts, patience=1.0)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (0, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == dict.fromkeys((0, 1, 3), ((NODES[0], NODES[1], NODES[3]), ("n2",)))


def test_a_silent_first_node_is_an_error(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    points = meetings(2)
    points[1].store.set_timeout(timedelta(seconds=0.5))
    with pytest.raises(SetupError, match=r"the first node \(10.0.0.1\) gives no answer"):
        exchange_reports(points[1], NODES[1], (), patience=0.5)


def test_a_node_that_cannot_write_or_compute_says_so(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("uncorrectable ECC error")

    monkeypatch.setattr(node_check.measure, "gemm_tflops", fails)
    found = examine(tmp_path / "nowhere", 3)
    assert (found.rank, found.gemm_tflops, found.disk_mib_per_second) == (3, 0.0, None)
    assert found.faults[0] == "computing: uncorrectable ECC error" and found.faults[1].startswith(
        f"writing to {tmp_path / 'nowhere'}"
    )
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of a node writes for all
    assert len(examine(tmp_path / "nowhere", 3).faults) == 1


def test_one_process_measures_itself(tmp_path):
    found = measure_nodes(tmp_path)
    assert len(found.nodes) == 1 and found.links == () and found.all_reduce_gib_per_second is None
    assert found.nodes[0].gemm_tflops > 0 and judge(found).problems == ()
