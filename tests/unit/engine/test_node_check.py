"""Nodes are judged by comparison; the measurements themselves give plausible numbers on one process and on several."""

from dataclasses import replace

import pytest

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.node_check import Link, NodeReport, Survey, disk_mib_per_second, gemm_tflops, judge, rounds, survey
from megatron_hypenet.parallel import groups

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
    ],
)
def test_the_odd_one_is_named(changes, said, excluded):
    found = verdict(changed(2, **changes))
    assert len(found.problems) == 1 and said in found.problems[0] and found.problems[0].startswith("n2")
    assert found.exclude == (("n2",) if excluded else ())


def test_a_node_with_slow_links_on_both_sides_is_left_out():
    both = [replace(link, gib_per_second=5.0) if "n3" in link.hosts else link for link in LINKS]
    assert verdict(links=both).exclude == ("n3",)
    one = [replace(link, gib_per_second=5.0) if link.hosts == ("n3", "n4") else link for link in LINKS]
    assert verdict(links=one).exclude == ()


@pytest.mark.parametrize("count", range(1, 9))
def test_every_node_meets_its_neighbours_and_nobody_talks_to_two_at_once(count):
    leaders = [10 * i for i in range(count)]
    found = rounds(leaders)
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    met = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(met) == len(set(met)) == (count if count > 2 else count - 1)


def test_one_process_measures_itself(tmp_path):
    groups.init_parallel(ParallelConfig())
    assert gemm_tflops(seconds=0.01) > 0 and disk_mib_per_second(tmp_path, mib=1) > 0 and list(tmp_path.iterdir()) == []
    found = survey(tmp_path)
    assert len(found.nodes) == 1 and found.links == () and found.all_reduce_gib_per_second is None
    assert judge(found).problems == ()
