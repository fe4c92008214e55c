"""Jobs on a real SLURM that are submitted from a shell full of another job's variables, into an odd
folder, where their port is taken."""

import json
import shlex

import pytest

from tests.integration.slurm.runs import PROFILE, ROOT, events, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

ONE = ("align.global_batch_size=1", "distill.global_batch_size=1", "finetune.global_batch_size=1")
SHORT = ("align.train_iters=2", "distill.train_iters=1", "finetune.train_iters=1")


def test_a_job_from_within_an_allocation_in_an_odd_folder_whose_port_is_taken(
    cluster, config, tmp_path, monkeypatch
):
    # what an allocation with memory per core would have; variables of another launcher; all of it
    # is not for the new job
    for name, value in {
        "SLURM_MEM_PER_CPU": "100",
        "SBATCH_WAIT": "1",
        "WORLD_SIZE": "7",
        "HYPENET_MASTER_PORT": "1",
    }.items():
        monkeypatch.setitem(cluster.environment, name, value)
    out = tmp_path / "a b%j%%x$(touch X)`touch X`'\"#ü"
    cluster.runs.append(out)
    words = ["submit", config, "--cluster", PROFILE, "cluster.memory=400M", "--json", *SHORT]
    hypenet = shlex.join(
        map(str, [ROOT / ".venv" / "bin" / "hypenet", *words, f"output_dir={out}"])
    )
    # the next job has the number after the allocation's: what listens at the port made from it is
    # there before the job
    listen = (
        "import os, socket, time; s = socket.create_server(('', int(os.environ['SLURM_JOB_ID']) + "
        "10001)); time.sleep(600)"
    )
    begin = f"python3 -c {shlex.quote(listen)} & {hypenet}; code=$?; "
    wait = "while squeue --noheader --format=%T | grep -q PENDING; do sleep 1; done; sleep 10; "
    said = cluster.run("salloc", "--nodes=1", "bash", "-c", f"{begin}{wait}kill %1; exit $code")
    job = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))["jobs"][0][
        "id"
    ]
    cluster.until("the end", lambda: "ended with code" in events(out, job), 120)
    assert "ended with code 0" in events(out, job)
    assert (
        f"something listens at port {10_000 + job} of n"
        in (out / "logs" / f"job-{job}.log").read_text()
    )
    assert (
        "WORLD_SIZE=2" in (out / "logs" / f"job-{job}" / "attempt-0" / "rank-0001.log").read_text()
    )
    assert sorted(path.name for path in (out / "logs").iterdir()) == [
        "hypenet.log",
        f"job-{job}",
        f"job-{job}.log",
    ]
    assert not list(tmp_path.rglob("X")) and not (ROOT / "X").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            'cluster.srun_args=["--gres=gpu:9"]',
            "first: SLURM: srun: error: Invalid generic resource",
        ),
        (
            "cluster.python=/no/such/python",
            "error: execve(): /no/such/python: No such file or directory",
        ),
    ],
)
def test_what_slurm_says_is_the_first_error_where_no_task_starts(
    cluster, config, tmp_path, setting, says
):
    out = tmp_path / "run"
    job = submit(cluster, config, out, "--nodes", "1", setting, *ONE)["run"]
    cluster.until("the end", lambda: "ended with code" in events(out, job), 60)
    assert says in cluster.hypenet("logs", out, "--first-error")
