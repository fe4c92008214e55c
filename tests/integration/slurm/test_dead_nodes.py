"""A node fails without a message in the middle of a stage: the run goes on elsewhere, and later on
fewer nodes, to the same result.

Prints the seconds from the failure to each stage of the recovery (pytest -s).
"""

import json
import re
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.stages.spec import stage_spec
from tests.integration.slurm.runs import (
    STAGES,
    event_time,
    events,
    jobs_of,
    parent_of,
    restart_slurmd,
    run_log,
    send,
    slurmd_of,
    state_of,
    status,
    submit,
    task_of,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


class DeadNode:
    """All processes of a node are stopped: nothing is closed, nothing answers, as when the power is
    gone."""

    def __init__(self, cluster, node, task):
        self.cluster = cluster
        self.node = node
        self.jobs = [task, parent_of(task)]
        self.daemon = slurmd_of(cluster, node)
        self.since = time.time()
        send(signal.SIGSTOP, self.daemon, *self.jobs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        send(signal.SIGKILL, *self.jobs, self.daemon)
        restart_slurmd(self.cluster, self.node)


def points(folder, tag):
    """Return (step, value) of all points of a tag, as TensorBoard shows them."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(point.step, point.value) for point in board.Scalars(tag)]


def recorded(out, stage):
    return [json.loads(line) for line in (out / stage / "losses.jsonl").read_text().splitlines()]


def test_a_dead_node_is_replaced_and_the_run_ends_on_a_single_node(
    cluster, config, calm, tmp_path, capfd
):
    out = tmp_path / "run"
    first = submit(cluster, config, out)["run"]
    (out / "SAVE_NOW").touch()
    cluster.until(
        "a save of align",
        (out / "align" / "checkpoints" / "iter_0000010" / "COMMITTED").is_file,
        60,
    )
    with DeadNode(cluster, "n2", task_of(cluster, first, 1)) as dead:
        cluster.until("SLURM's verdict", lambda: state_of(cluster, "n2") == "down*", 60)
        noticed = time.time()
        cluster.until("the next start", lambda: "resumed from" in run_log(out), 90, every=0.02)
        goes_on = time.time()
        (out / "STOP").touch()
        cluster.until("the stop", lambda: "not started again" in events(out, first), 60)
    begun = event_time(out, first, 1, "started on n[1,3]")
    with capfd.disabled():
        times = ", ".join(
            f"{what} after {then - dead.since:.0f} s"
            for what, then in (("SLURM knows", noticed), ("next start", begun))
        )
        print(f"\ndead node: {times}, its first step after {goes_on - dead.since:.0f} s")
    assert event_time(out, first, 1, "starts again due to node failure") <= begun
    assert "rank 1 on n2: its node failed: SLURM reached it no more" in cluster.hypenet(
        "logs", out, "--first-error"
    )
    found = status(cluster, out)
    assert found["jobs"][0]["requeues"] == 1 and "STOP is there" in found["jobs"][0]["note"]
    stopped = found["iteration"]["number"]
    assert 10 < stopped < 40 and found["last_save"]["checkpoint"].endswith(f"iter_{stopped:07d}")
    assert "checkpoints/iter_0000001 in" in run_log(out) and not (out / "SAVE_NOW").exists()
    assert re.search(
        r"resumed from .*/align/checkpoints/iter_00000(\d\d) at iter \1/40\n", run_log(out)
    )

    (out / "STOP").unlink()
    last = submit(cluster, config, out, "--nodes", "1")["run"]
    cluster.until("the end", lambda: "ended with code" in events(out, last), 120)
    assert "ended with code 0" in events(out, last)
    # SLURM still cleans up for a moment
    cluster.until(
        "the job's end", lambda: jobs_of(cluster, out)["run"]["state"] != "COMPLETING", 60
    )
    assert jobs_of(cluster, out)["run"]["state"] == "COMPLETED"
    layout = (
        "on another layout (world 2 -> 1, data 2 -> 1); the global batch stays 2: "
        "2 micro-batches of 1 per process and step"
    )
    assert f"at iter {stopped}/40 {layout}" in run_log(out)
    settings = load_run_config(out / "config.yaml")
    for stage in STAGES:
        mine, undisturbed = recorded(out, stage), recorded(calm, stage)
        assert [row["step"] for row in mine] == [row["step"] for row in undisturbed]
        assert [row["loss"] for row in mine] == pytest.approx(
            [row["loss"] for row in undisturbed], rel=1e-5
        )
        shown = points(out / "tb" / stage, f"train/{stage_spec(stage).loss(settings.stage(stage))}")
        assert [step for step, _ in shown] == [row["step"] for row in mine]
        assert [value for _, value in shown] == pytest.approx(
            [row["loss"] for row in mine], rel=1e-6
        )
