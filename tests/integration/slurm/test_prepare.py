"""A preparation of data as a job array on a real SLURM: a task that is killed goes on, and the
shares are joined to the bytes that one process makes."""

import json
import os
import signal

import pytest

from tests.integration.slurm.runs import PROFILE, processes

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
TOKENIZER = ("--tokenizer", "assets/tiny-qwen3")


def test_a_killed_task_goes_on_and_the_shares_make_the_whole(cluster, tmp_path):
    corpus = tmp_path / "text.jsonl"
    with corpus.open("w") as lines:
        for number in range(30_000):
            lines.write(json.dumps({"text": f"Text {number} of {number % 97} words. " * 9}) + "\n")
    out = tmp_path / "out"
    words = ["data", "prepare", corpus, out, *TOKENIZER]
    array = ["--slurm", "--cluster", PROFILE, "--tasks", 3, "--workers", 1]
    jobs = json.loads(cluster.hypenet(*words, *array, "--json").strip().splitlines()[-1])["jobs"]
    share = f"{out}.part-1-of-3"

    def preparing():
        started = (tmp_path / "out.part-1-of-3.preparing").is_dir()
        of_share = processes(lambda _, line: b"prepare" in line and share.encode() in line)
        return of_share if started else None

    for process in cluster.until("a share that is being prepared", preparing, 60, every=0.05):
        os.kill(process, signal.SIGKILL)
    cluster.until("the joined shares", out.with_suffix(".idx").is_file, 90)
    cluster.until("their removal", lambda: not list(tmp_path.glob("out.part-*")), 20)
    log = (tmp_path / "out.jobs" / f"{jobs['prepare']}_1.log").read_text()
    assert "ended with code 137: starting again" in log
    whole = tmp_path / "whole"
    cluster.hypenet("data", "prepare", corpus, whole, *TOKENIZER, "--workers", 1)
    for suffix in (".bin", ".idx"):
        assert out.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
