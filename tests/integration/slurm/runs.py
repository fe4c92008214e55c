"""What the tests of this folder do with a run: submit it, look at its jobs and files, and find the
processes of its tasks."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROFILE = ROOT / "configs" / "cluster" / "testcluster.yaml"
STAGES = ("align", "distill", "finetune")


def submit(cluster, config, out, *words):
    """Submit; returns job numbers by part."""
    said = cluster.hypenet("submit", config, "--cluster", PROFILE, f"output_dir={out}", *words)
    assert f"tensorboard --logdir {out}/tb" in said and "ssh -N -L 6006:localhost:6006" in said
    return {
        line.split()[2].strip("(),:"): int(line.split()[1])
        for line in said.splitlines()
        if line.startswith("job ")
    }


def status(cluster, out):
    return json.loads(cluster.hypenet("status", out, "--json"))


def jobs_of(cluster, out):
    return {row["part"]: row for row in status(cluster, out)["jobs"]}


def events(out, job):
    path = out / "logs" / f"job-{job}" / "events"
    return path.read_text() if path.is_file() else ""


def event_time(out, job, attempt, text):
    """Return the seconds since 1970 at which an attempt of a job noted something that contains
    `text`."""
    rows = [line.split(" ", 2) for line in events(out, job).splitlines()]
    return next(int(row[0]) for row in rows if row[1] == str(attempt) and text in row[2])


def run_log(out):
    path = out / "logs" / "hypenet.log"
    return path.read_text() if path.is_file() else ""


def losses(out):
    return {stage: (out / stage / "losses.jsonl").read_text() for stage in STAGES}


def processes(holds):
    """Return the numbers of the processes whose (environment, command line), as sets of bytes,
    fulfil `holds`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                variables, words = (
                    (entry / name).read_bytes().split(b"\0") for name in ("environ", "cmdline")
                )
            except OSError:
                continue
            if holds(set(variables), words):
                found.append(int(entry.name))
    return found


def task_of(cluster, job, rank):
    """Process number of a task of a job, found as `ps` would; None while there is none."""
    want = {
        f"SLURM_JOB_ID={job}".encode(),
        f"SLURM_PROCID={rank}".encode(),
        f"SLURM_CONF={cluster.folder}/slurm.conf".encode(),
    }
    return next(
        iter(processes(lambda variables, words: want <= variables and b"launchers.slurm" in words)),
        None,
    )


def slurmd_of(cluster, node):
    """Process number of the SLURM daemon of a node; None where it does not run."""
    mine = f"SLURM_CONF={cluster.folder}/slurm.conf".encode()
    return next(
        iter(
            processes(
                lambda variables, words: (
                    mine in variables and words[:3] == [b"slurmd", b"-N", node.encode()]
                )
            )
        ),
        None,
    )


def restart_slurmd(cluster, node, preexec_fn=None):
    """Start the daemon of a node anew; `preexec_fn` runs in it first, and what it sets holds for
    all tasks of the node."""
    if (old := slurmd_of(cluster, node)) is not None:
        send(signal.SIGKILL, old)
        while Path(f"/proc/{old}").exists():
            time.sleep(0.02)
    environment = {**cluster.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    subprocess.run(
        ["slurmd", "-N", node], env=environment, preexec_fn=preexec_fn, check=True, timeout=30
    )
    cluster.until(f"{node} back", lambda: state_of(cluster, node) in ("idle", "mixed"), 30)


def state_of(cluster, node):
    return cluster.run("sinfo", "--noheader", "--nodes", node, "--format=%T").strip()


def parent_of(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def send(number, *numbers):
    """Send a signal to processes of which some may have ended."""
    for process in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
