"""The measurements give plausible numbers on one process, and leave nothing behind."""

import pytest

from megatron_hypenet.cluster import node_measure
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups


def test_rates_of_this_machine(tmp_path):
    assert node_measure.gemm_tflops(seconds=0.01) > 0
    assert (
        node_measure.disk_mib_per_second(tmp_path, mib=1, turns=2) > 0
        and list(tmp_path.iterdir()) == []
    )
    with pytest.raises(FileNotFoundError):
        node_measure.disk_mib_per_second(tmp_path / "nowhere", mib=1)


def test_versions_name_what_has_to_be_alike(tmp_path, monkeypatch):
    assert {"python", "torch", "megatron-core"} <= set(node_measure.versions())
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    )
    monkeypatch.setattr(node_measure, "_DRIVER", driver)
    assert node_measure.versions()["nvidia-driver"] == "550.54.15"


@pytest.mark.parametrize("count", range(1, 9))
def test_every_node_meets_its_neighbours_and_nobody_talks_to_two_at_once(count):
    leaders = [10 * i for i in range(count)]
    found = node_measure.rounds(leaders)
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    met = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(met) == len(set(met)) == (count if count > 2 else count - 1)


def test_one_process_reduces_with_nobody():
    groups.init_parallel(ParallelConfig())
    assert node_measure.all_reduce_rate() is None
