"""Runs on a real SLURM of two nodes, and what happens to runs there: a killed step, a time limit, cancelling, starting again."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_hypenet.checkpoint.load import verify_files
from tests.integration.slurm.runs import PROFILE, ROOT, events, jobs_of, losses, run_log, status, submit, task_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


def test_chained_run_whose_step_is_killed_ends_like_an_undisturbed_one(cluster, config, calm, folder):
    out = folder / "run"
    jobs = submit(cluster, config, out, "--chain")
    assert list(jobs) == ["align", "distill", "finetune", "finish"]
    assert {part: row["state"] for part, row in jobs_of(cluster, out).items() if part != "align"} == dict.fromkeys(
        list(jobs)[1:], "PENDING"
    )

    cluster.until("a save of align", (out / "align" / "checkpoints" / "iter_0000010" / "COMMITTED").is_file, 60)
    os.kill(task_of(cluster, jobs["align"], 1), signal.SIGKILL)
    cluster.until(
        "the requeue", lambda: "ended with code 137" in events(out, jobs["align"]) and "starting again" in events(out, jobs["align"]), 40
    )
    assert "rank 1 on n2: task ended by a signal: Killed" in cluster.hypenet("logs", out, "--first-error")

    cluster.until("the end of the chain", lambda: "ended with code 0" in events(out, jobs["finish"]), 200)
    assert "resumed from" in run_log(out)
    found = status(cluster, out)
    assert [row["requeues"] for row in found["jobs"]] == [1, 0, 0, 0]
    assert found["finished"][-1] == "report" and found["step"]["name"] == "report"
    assert found["last_save"]["checkpoint"].endswith("finetune/checkpoints/iter_0000004")
    assert (out / "export" / "model.safetensors").is_file() and (out / "report" / "report.json").is_file()
    assert losses(out) == losses(calm)


def test_time_limit_saves_and_starts_again_then_cancel_and_requeue(cluster, config, folder):
    out = folder / "run_limit"
    # SLURM looks at its jobs every 30 s, and warns of what ends before it looks again: 15 s to 45 s after the start here
    jobs = submit(
        cluster,
        config,
        out,
        "--chain",
        "--time",
        "00:01:00",
        "cluster.grace_seconds=15",
        "align.train_iters=450",
        "align.save_interval=450",
    )
    cluster.until("the warning", lambda: "ended with code 75" in events(out, jobs["align"]), 75)
    saved = [path.parent for path in out.glob("align/checkpoints/iter_*/COMMITTED")]
    assert len(saved) == 1 and 0 < int(saved[0].name[5:]) < 450
    verify_files(saved[0], hashes=True)
    cluster.until("the end of align", lambda: "ended with code 0" in events(out, jobs["align"]), 120)
    log = run_log(out)
    assert "stopped at iter" not in log.splitlines()[-1] and f"resumed from {saved[0]}" in log

    cluster.until("distill running", lambda: jobs_of(cluster, out)["distill"]["state"] == "RUNNING", 30)
    said = cluster.hypenet("cancel", out)
    assert f"cancelled job {jobs['distill']} (distill, RUNNING)" in said and f"cancelled job {jobs['finish']} (finish, PENDING)" in said
    cluster.until("nothing left", lambda: not any(row["live"] for row in status(cluster, out)["jobs"]), 40)
    assert jobs_of(cluster, out)["distill"]["state"] == "CANCELLED" and "starting again" not in events(out, jobs["distill"])
    assert "no job waits or runs" in cluster.hypenet("cancel", out)

    # every rank meets the same damage; requeue starts what is not done, and the error is shown once
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text("{")
    said = cluster.hypenet("requeue", out)
    assert "job" in said and "(align)" not in said and "(finish)" in said
    distill = jobs_of(cluster, out)["distill"]["id"]
    cluster.until("the failure", lambda: "ended with code" in events(out, distill), 60)
    cluster.until("nothing left", lambda: not any(row["live"] for row in status(cluster, out)["jobs"]), 40)
    assert "ended with code 5" in events(out, distill)
    first = json.loads(cluster.hypenet("logs", out, "--first-error", "--json"))
    assert first["job"] == distill and "manifest.json cannot be read" in first["groups"][0]["error"]
    assert jobs_of(cluster, out)["distill"]["state"] == "FAILED"
    (out / "manifest.json").write_text(manifest)


def test_a_live_run_is_not_submitted_twice_and_a_waiting_job_learns_of_a_bad_node(cluster, config, folder):
    out = folder / "run_twice"
    blocker = int(cluster.run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 60"))
    try:
        job = submit(cluster, config, out, "cluster.nodes=1")["run"]
        assert jobs_of(cluster, out)["run"]["state"] == "PENDING"
        again = cluster.hypenet("submit", config, "--cluster", PROFILE, f"output_dir={out}", code=2)
        assert f"has jobs that are not done ({job})" in again
        assert f"told to avoid n2: job {job} (run)" in cluster.hypenet("requeue", out, "--exclude", "n2")
        assert "ExcNodeList=n2" in cluster.run("scontrol", "show", "job", job)
        cluster.hypenet("cancel", out)
    finally:
        cluster.run("scancel", blocker)


def test_cluster_can_be_started_again_and_leaves_nothing(tmp_path):
    folder = f"/tmp/hypenet-slurm-again-{os.getpid()}"
    command = [ROOT / "slurm" / "testcluster"]
    for _ in range(2):
        subprocess.run([*command, "up", "--dir", folder], check=True, timeout=60, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "status", "--dir", folder], check=True, timeout=60, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "down", "--dir", folder], check=True, timeout=60)
    assert not Path(folder).exists()
    environs = [path for path in Path("/proc").glob("[0-9]*/environ")]
    assert not [path for path in environs if folder.encode() in _read(path)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
