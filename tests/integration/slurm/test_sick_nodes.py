"""`hypenet doctor --slurm` on real nodes: what it measures, and that a slow node and one that
cannot write are named for --exclude."""

import contextlib
import json
import os
import resource
import subprocess
import sys

import pytest

from tests.integration.slurm.runs import restart_slurmd, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

WORDS = ("doctor", "--slurm", "--nodes", "2", "--srun-arg=--nodelist=n1,n2")


def report(said):
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


def test_nodes_are_measured_beside_each_other(cluster, tmp_path):
    # rates of two nodes that share two cores with other tests may differ: they are judged below,
    # where the difference is made
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hypenet", *WORDS, "--folder", str(tmp_path), "--json"],
        env=cluster.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    found = report(done.stdout)
    assert [
        (node["host"], node["rank"], node["hardware"], node["faults"]) for node in found["nodes"]
    ] == [
        ("n1", 0, "CPU", []),
        ("n2", 1, "CPU", []),
    ]
    assert (
        min(
            rate
            for node in found["nodes"]
            for rate in (node["gemm_tflops"], node["disk_mib_per_second"])
        )
        > 0
    )
    assert (
        found["links"][0]["hosts"] == ["n1", "n2"]
        and min(found["links"][0]["gib_per_second"], found["all_reduce_gib_per_second"]) > 0
    )
    clocks, versions = zip(
        *((node["clock"], node["versions"]) for node in found["nodes"]), strict=True
    )
    assert (
        abs(clocks[0] - clocks[1]) < 2
        and versions[0] == versions[1]
        and {"torch", "python", "megatron-core"} <= set(versions[0])
    )
    assert all("TFLOP/s" in problem or "MiB/s" in problem for problem in found["problems"])
    assert done.returncode == (4 if found["exclude"] else 0)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def harmed(cluster, node, harm):
    """Provide a node whose tasks begin with what `harm` has set."""
    restart_slurmd(cluster, node, harm)
    try:
        yield
    finally:
        restart_slurmd(cluster, node)


def test_a_node_that_cannot_write_is_to_be_left_out(cluster, config, tmp_path):
    limit = 32 << 20  # of the size of a file, in bytes; less than what the check writes
    with harmed(cluster, "n2", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))):
        said = cluster.hypenet(*WORDS, "--folder", tmp_path, "--note", tmp_path, code=4)
    assert f"problem: n2 (rank 1): writing to {tmp_path}: [Errno 27] File too large" in said
    assert "error: 1 node is not fit to train with the others; leave out: --exclude=n2" in said

    # a job of a run beside the note goes to the other nodes; it waits, so that it costs nothing
    out = tmp_path / "run"
    words = ("cluster.requeue.exclude_faulty=1", "cluster.sbatch_args=['--begin=now+1hour']")
    job = submit(cluster, config, out, *words)["run"]
    assert "ExcNodeList=n2" in cluster.run("scontrol", "show", "job", job)
    assert "left out     n2: doctor: n2 (rank 1): writing" in cluster.hypenet("status", out)
    cluster.hypenet("requeue", out, "--include", "n2")
    assert "ExcNodeList=(null)" in cluster.run("scontrol", "show", "job", job)
    cluster.hypenet("cancel", out)


@contextlib.contextmanager
def busy(core):
    """Start processes that compete for a core; sessions of their own, or the kernel may count them
    as one.

    Many, because the other node shares its core too: with the processes of another test."""
    words = [
        sys.executable,
        "-c",
        f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass",
    ]
    load = [subprocess.Popen(words, start_new_session=True) for _ in range(10)]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def test_a_slow_node_is_to_be_left_out(cluster, tmp_path):
    core = max(os.sched_getaffinity(0))
    with harmed(cluster, "n2", lambda: os.sched_setaffinity(0, {core})), busy(core):
        said = cluster.hypenet(*WORDS, "--folder", tmp_path, code=4)
    assert (
        "n2 (rank 1): " in said
        and "TFLOP/s, the median CPU here does" in said
        and "leave out: --exclude=n2" in said
    )
