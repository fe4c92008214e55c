"""What `hypenet doctor --slurm` starts and prints; real nodes are measured in tests/integration."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_hypenet.cli.node_doctor import (
    as_text,
    examine_nodes,
    exclude_option,
    srun_command,
    tasks_per_node,
)
from megatron_hypenet.cluster.node_check import Link, NodeReport, Survey, Verdict
from megatron_hypenet.errors import SetupError, UsageError

NODES = tuple(
    NodeReport(
        host=f"n{i}",
        rank=i,
        hardware="CPU",
        gemm_tflops=1.0,
        disk_mib_per_second=900.0,
        clock=1e9,
        versions={"torch": "2.11"},
    )
    for i in range(2)
)
FOUND = Survey(
    nodes=NODES,
    links=(Link(hosts=("n0", "n1"), gib_per_second=40.0),),
    all_reduce_gib_per_second=30.0,
)


def test_report():
    text = as_text(FOUND, Verdict(problems=(), exclude=()))
    assert (
        "link n0 - n1: 40.00 GiB/s" in text
        and "all-reduce over 2 processes: 30.00" in text
        and text.endswith("all nodes are alike")
    )
    bad = Verdict(problems=("n1: slow",), exclude=("n1", "n7"))
    assert (
        as_text(FOUND, bad).endswith("problem: n1: slow\nleave out: --exclude=n1,n7")
        and exclude_option(bad) == "--exclude=n1,n7"
    )


def test_what_could_not_be_measured_is_a_dash_and_common_faults_exclude_nobody():
    failing = tuple(replace(node, gemm_tflops=0.0, disk_mib_per_second=None) for node in NODES)
    text = as_text(
        Survey(nodes=failing), Verdict(problems=("n0: ...", "n1: ..."), exclude=("n0", "n1"))
    )
    assert "n1       1        -           -  CPU" in text and "--exclude" not in text


def test_srun_gets_one_task_per_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    command = srun_command(tmp_path, nodes=16, srun_arguments=["--partition=gpu"], as_json=True)
    assert command[:6] == [
        "srun",
        "--ntasks-per-node=1",
        "--nodes=16",
        "--time=15",
        "--wait=30",
        "--partition=gpu",
    ]
    assert command[6:] == [
        sys.executable,
        "-m",
        "launchers.slurm",
        "doctor",
        "--slurm",
        "--folder",
        str(tmp_path),
        "--json",
    ]
    assert [
        tasks_per_node([], {}),
        tasks_per_node(["--gpus-per-node=h100:8"], {}),
        tasks_per_node([], {"SLURM_GPUS_ON_NODE": "4"}),
    ] == [
        1,
        8,
        4,
    ]


def test_without_slurm_or_nodes_it_says_what_is_missing(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    options = {"nodes": None, "srun_arguments": [], "as_json": False}
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SetupError, match="srun, which is not on the PATH"):
        examine_nodes(tmp_path, note=None, **options)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/srun")
    with pytest.raises(UsageError, match="--nodes N"):
        examine_nodes(tmp_path, note=None, **options)


@pytest.mark.distributed
def test_two_processes_measure_each_other(repo_root, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megatron_hypenet",
    ]
    environment = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "doctor", "--slurm", "--folder", str(tmp_path), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=repo_root,
    )
    found = json.loads(result.stdout.splitlines()[0])
    assert [node["rank"] for node in found["nodes"]] == [0, 1] and found[
        "all_reduce_gib_per_second"
    ] > 0
    assert (result.returncode == 0) == (not found["exclude"])  # torchrun makes 1 of any other code
