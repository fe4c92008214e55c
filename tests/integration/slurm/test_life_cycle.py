"""Runs on a real SLURM of two nodes, and what happens to runs there: a killed step, a time limit, a
more urgent job, cancelling, starting again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_hypenet.checkpoint.load import verify_files
from tests.integration.slurm.runs import (
    PROFILE,
    ROOT,
    event_time,
    events,
    jobs_of,
    losses,
    run_log,
    status,
    submit,
    task_of,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


def test_chained_run_whose_step_is_killed_ends_like_an_undisturbed_one(
    cluster, config, calm, folder
):
    out = folder / "run"
    jobs = submit(cluster, config, out, "--chain")
    assert list(jobs) == ["align", "distill", "finetune", "finish"]
    assert {
        part: row["state"] for part, row in jobs_of(cluster, out).items() if part != "align"
    } == dict.fromkeys(list(jobs)[1:], "PENDING")

    cluster.until(
        "a save of align",
        (out / "align" / "checkpoints" / "iter_0000010" / "COMMITTED").is_file,
        60,
    )
    os.kill(task_of(cluster, jobs["align"], 1), signal.SIGKILL)
    cluster.until(
        "the requeue",
        lambda: (
            "ended with code 137" in events(out, jobs["align"])
            and "starting again" in events(out, jobs["align"])
        ),
        40,
    )
    assert "rank 1 on n2: task ended by a signal: Killed" in cluster.hypenet(
        "logs", out, "--first-error"
    )

    cluster.until(
        "the end of the chain", lambda: "ended with code 0" in events(out, jobs["finish"]), 200
    )
    assert "resumed from" in run_log(out)
    found = status(cluster, out)
    assert [row["requeues"] for row in found["jobs"]] == [1, 0, 0, 0]
    assert found["finished"][-1] == "report" and found["step"]["name"] == "report"
    assert found["last_save"]["checkpoint"].endswith("finetune/checkpoints/iter_0000004")
    assert (out / "export" / "model.safetensors").is_file() and (
        out / "report" / "report.json"
    ).is_file()
    assert losses(out) == losses(calm)


def test_time_limit_saves_and_starts_again_then_cancel_and_requeue(cluster, config, folder):
    out = folder / "run_limit"
    endless = ("align.train_iters=100000", "align.save_interval=100000", "cluster.grace_seconds=15")
    jobs = submit(cluster, config, out, "--chain", *endless)
    cluster.until("a step", lambda: "iter 2/100000" in run_log(out), 60)
    # SLURM looks at its jobs every 30 s and warns of what ends before it looks again: 15 s to 45 s
    # after the start for a limit of 60 s
    minutes = 1 if time.time() - event_time(out, jobs["align"], 0, "started on") < 25 else 2
    cluster.run("scontrol", "update", f"JobId={jobs['align']}", f"TimeLimit={minutes}")
    cluster.until("the warning", lambda: "ended with code 75" in events(out, jobs["align"]), 110)
    cluster.run("scontrol", "update", f"JobId={jobs['align']}", "TimeLimit=10")
    saved = [path.parent for path in out.glob("align/checkpoints/iter_*/COMMITTED")]
    assert len(saved) == 1
    verify_files(saved[0], hashes=True)
    step = int(saved[0].name[5:])
    cluster.until(
        "the next start", lambda: f"resumed from {saved[0]} at iter {step}/" in run_log(out), 60
    )
    cluster.until("its first step", lambda: f"iter {step + 1}/100000" in run_log(out), 30)

    said = cluster.hypenet("cancel", out)
    assert (
        f"cancelled job {jobs['align']} (align, RUNNING)" in said
        and f"cancelled job {jobs['finish']} (finish, PENDING)" in said
    )
    cluster.until(
        "nothing left", lambda: not any(row["live"] for row in status(cluster, out)["jobs"]), 40
    )
    assert (
        jobs_of(cluster, out)["align"]["state"] == "CANCELLED"
        and events(out, jobs["align"]).count("starting again") == 1
    )
    assert int(status(cluster, out)["last_save"]["checkpoint"][-7:]) > step
    assert "no job waits or runs" in cluster.hypenet("cancel", out)

    # every rank meets the same damage; requeue starts what is not done, and the error is shown once
    (out / "manifest.json").write_text("{")
    said = cluster.hypenet("requeue", out)
    assert all(f"({part})" in said for part in jobs)
    align = jobs_of(cluster, out)["align"]["id"]
    cluster.until("the failure", lambda: "ended with code" in events(out, align), 60)
    cluster.until(
        "nothing left", lambda: not any(row["live"] for row in status(cluster, out)["jobs"]), 40
    )
    assert "ended with code 5" in events(out, align)
    first = json.loads(cluster.hypenet("logs", out, "--first-error", "--json"))
    assert first["job"] == align and "manifest.json: not valid JSON" in first["groups"][0]["error"]
    assert jobs_of(cluster, out)["align"]["state"] == "FAILED"


def test_a_run_makes_room_for_a_more_urgent_job_and_leaves_a_node(cluster, config, folder):
    out = folder / "run_preempted"
    job = submit(cluster, config, out)["run"]
    cluster.until(
        "a save of align",
        (out / "align" / "checkpoints" / "iter_0000005" / "COMMITTED").is_file,
        60,
    )
    words = (
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 60",
    )
    urgent = cluster.run("sbatch", "--parsable", *words).strip()
    cluster.until(
        "its place",
        lambda: (
            cluster.run("squeue", "--noheader", "--jobs", urgent, "--format=%T").strip()
            == "RUNNING"
        ),
        40,
    )
    assert "ended with code 75" in events(out, job) and "starting again" in events(out, job)
    assert "saved" in run_log(out).splitlines()[-1]
    row = jobs_of(cluster, out)["run"]
    assert (row["state"], row["live"]) == ("PENDING", True)
    cluster.run("scancel", urgent)

    # a node may be taken from a job that runs
    cluster.until("the next start", lambda: events(out, job).count("started on n[1-2]") == 2, 40)
    assert f"put back into the queue: job {job} (run)" in cluster.hypenet(
        "requeue", out, "--exclude", "n2"
    )
    cluster.until("the start elsewhere", lambda: "started on n[1,3]" in events(out, job), 40)
    assert "starts again due to job requeue" in events(out, job)
    cluster.hypenet("cancel", out)


def test_a_live_run_is_not_submitted_twice_and_a_waiting_job_learns_of_a_bad_node(
    cluster, config, folder
):
    out = folder / "run_twice"
    blocker = int(
        cluster.run(
            "sbatch",
            "--parsable",
            "--nodes=3",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 60",
        )
    )
    try:
        job = submit(cluster, config, out, "cluster.nodes=1")["run"]
        assert jobs_of(cluster, out)["run"]["state"] == "PENDING"
        again = cluster.hypenet("submit", config, "--cluster", PROFILE, f"output_dir={out}", code=2)
        assert f"has jobs that are not done ({job})" in again
        assert f"told to avoid n2: job {job} (run)" in cluster.hypenet(
            "requeue", out, "--exclude", "n2"
        )
        assert "ExcNodeList=n2" in cluster.run("scontrol", "show", "job", job)
        cluster.hypenet("cancel", out)
    finally:
        cluster.run("scancel", blocker)


def test_cluster_can_be_started_again_and_leaves_nothing(tmp_path):
    folder = f"/tmp/hypenet-slurm-again-{os.getpid()}"
    command = [ROOT / "slurm" / "testcluster"]
    for _ in range(2):
        subprocess.run(
            [*command, "up", "--dir", folder], check=True, timeout=300, stdout=subprocess.DEVNULL
        )
    subprocess.run(
        [*command, "status", "--dir", folder], check=True, timeout=300, stdout=subprocess.DEVNULL
    )
    subprocess.run([*command, "down", "--dir", folder], check=True, timeout=300)
    assert not Path(folder).exists()
    environs = [path for path in Path("/proc").glob("[0-9]*/environ")]
    assert not [path for path in environs if folder.encode() in _read(path)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
