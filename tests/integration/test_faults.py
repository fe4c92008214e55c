"""Real processes that are killed, stopped, fail, diverge or find the disk full: the promised exit code, a message that names the true
cause, checkpoints that stay good, and a run that goes on afterwards to the result of an undisturbed one.

Prints, for each fault, the seconds from the fault to the end of all processes and from the next start to its first step (pytest -s).
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_hypenet
from launchers import local
from launchers.local import LocalLaunch
from megatron_hypenet.checkpoint.load import resolve, verify_files
from tests.integration.test_kill_resume import assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(megatron_hypenet.__file__).parents[1]
LOSSES = Path("finetune") / "losses.jsonl"


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """launchers/local.py starts the training worker in the place of `hypenet`."""
    monkeypatch.setattr(local, "hypenet_command", lambda words: (sys.executable, "-m", "tests.integration.training_worker", *words))
    monkeypatch.chdir(ROOT)
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    ended: float
    """time.time() when the last process had ended."""
    first_step: float | None
    """Seconds from the start to the first step that was done."""


def run(capfd, out, *words, processes=2, grace=2.0):
    """The worker in several processes on this machine."""
    before = lines_of(out)
    seen: list[float] = []
    over = threading.Event()
    start = time.time()

    def look():
        while not over.wait(0.02):
            if lines_of(out) not in (before, 0) and not seen:
                seen.append(time.time() - start)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        code = local.run(LocalLaunch((str(out), *map(str, words)), processes, grace_seconds=grace))
    finally:
        over.set()
        looker.join()
    said = capfd.readouterr()
    return Outcome(code, said.err + said.out, time.time(), seen[0] if seen else None)


def lines_of(out):
    """Content of losses.jsonl, which changes with every step; 0 where there is none."""
    try:
        return (out / LOSSES).read_text()
    except FileNotFoundError:
        return 0


def step_time(out, step):
    """time.time() of the last sign of life in `step` before the fault: its line in losses.jsonl."""
    return (out / LOSSES).stat().st_mtime if step else 0.0


def record(out, rank):
    return json.loads((out / "errors" / f"rank_{rank:05d}.json").read_text())


def report(capfd, fault, seconds, outcome, again):
    with capfd.disabled():
        first = re.search(r"error: .*", outcome.said)
        print(
            f"\n{fault}: exit {outcome.code}, all processes ended {seconds:.1f} s after it, first step {again.first_step:.1f} s after the "
            f"next start; said: {first.group(0)[:160] if first else ''}"
        )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("straight")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.integration.training_worker"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*words, str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def finishes(capfd, out, straight):
    """Start the same command again: it continues from the last commit to the result of the undisturbed run."""
    again = run(capfd, out)
    assert again.code == 0 and "resumed from" in again.said, again.said
    assert_same_run(straight / "finetune", out / "finetune", 6)
    return again


def test_a_killed_rank(capfd, tmp_path, straight):
    ended = run(capfd, tmp_path, "--kill-after", 5, "--only-rank", 1)
    seconds = ended.ended - step_time(tmp_path, 5)
    assert ended.code == 137, ended.said
    assert re.search(
        r"error: rank 1 on \S+ \(pid \d+\) was killed, .* while rank 0 on \S+ waited for it in iteration 6/6 of finetune", ended.said
    ), ended.said
    assert record(tmp_path, 0)["echo"] and not (tmp_path / "errors" / "rank_00001.json").exists()
    verify_files(resolve(tmp_path / "finetune"), hashes=True)
    report(capfd, "SIGKILL of one rank", seconds, ended, finishes(capfd, tmp_path, straight))
    assert seconds < 20


def test_a_stopped_rank_is_a_hang(capfd, tmp_path, straight):
    ended = run(capfd, tmp_path, "--stop-after", 4, "--only-rank", 1, "--hang-timeout", 6)
    seconds = ended.ended - step_time(tmp_path, 4)
    assert ended.code == 8, ended.said
    assert re.search(r"error: rank 0 on \S+ hangs in iteration 5/6 of finetune, .*: it has got no further for \d+ s", ended.said), (
        ended.said
    )
    assert re.search(r"rank 1 on \S+ \(pid \d+\) does not answer: its process is stopped or dead", ended.said), ended.said
    stacks = (tmp_path / "errors" / "hang_rank_00000.txt").read_text()
    assert "rank 1 on" in stacks and "all_reduce" in stacks
    assert record(tmp_path, 0)["type"] == "HangError" and resolve(tmp_path / "finetune").name == "iter_0000003"
    report(capfd, "SIGSTOP of one rank (timeout 6 s)", seconds, ended, finishes(capfd, tmp_path, straight))
    assert seconds < 30


def test_an_exception_on_one_rank(capfd, tmp_path, straight):
    ended = run(capfd, tmp_path, "--fail-after", 4, "--only-rank", 1)
    cause = record(tmp_path, 1)
    seconds = ended.ended - cause["time"]
    assert ended.code == 1, ended.said
    assert (cause["type"], cause["phase"], cause["iteration"], cause["echo"]) == ("ValueError", "data", 4, False)
    assert 'raise ValueError("this shard cannot be read")' in cause["traceback"]
    assert re.search(r"error: rank 1 on \S+ failed in iteration 5/6 of finetune, data: ValueError: this shard cannot be read", ended.said)
    assert record(tmp_path, 0)["echo"] and record(tmp_path, 0)["time"] > cause["time"]
    report(capfd, "an exception on one rank", seconds, ended, finishes(capfd, tmp_path, straight))
    assert seconds < 20


def test_losses_that_are_not_finite(capfd, tmp_path):
    skipping = run(capfd, tmp_path / "a", "--bad-samples", 9, 17)  # steps 2 and 3: one rank each
    assert skipping.code == 0 and skipping.said.count("skipped iter") == 2, skipping.said
    ended = run(capfd, tmp_path / "b", "--bad-samples", 9, 99)
    assert ended.code == 7 and ended.said.count("skipped iter") == 3, ended.said
    assert re.search(r"error: stage finetune diverged at iter 5: the loss is nan.*after 3 skipped steps in a row", ended.said), ended.said
    assert [record(tmp_path / "b", rank)["type"] for rank in (0, 1)] == ["DivergedError"] * 2
    seconds = ended.ended - record(tmp_path / "b", 0)["time"]
    verify_files(resolve(tmp_path / "b" / "finetune"), hashes=True)
    mended = run(capfd, tmp_path / "b", "--bad-samples", 9, 17)  # somebody mended the data
    assert mended.code == 0 and "resumed from" in mended.said, mended.said
    assert_same_run(tmp_path / "a" / "finetune", tmp_path / "b" / "finetune", 6)
    report(capfd, "a loss that is not finite, four times", seconds, ended, mended)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(capfd, small_disk, straight):
    ended = run(capfd, small_disk, "--fill-disk-after", 6)
    seconds = ended.ended - step_time(small_disk, 6)
    assert ended.code == 4 and "no space left on the disk" in ended.said.lower(), ended.said
    assert resolve(small_disk / "finetune").name == "iter_0000003"
    verify_files(resolve(small_disk / "finetune"), hashes=True)
    (small_disk / "filler").unlink()
    report(capfd, "a full disk during a save", seconds, ended, finishes(capfd, small_disk, straight))


def test_a_slow_rank_is_named(capfd, tmp_path):
    ended = run(capfd, tmp_path, "--slow", 0.05, "--only-rank", 1, "--iters", 8, "--save-interval", 8)
    assert ended.code == 0, ended.said
    named = [line for line in ended.said.splitlines() if "slow: rank 1 on" in line]
    assert [line.split(" | ")[0] for line in named] == ["iter 6/8", "iter 8/8"] and "rank 0 on" not in named[0]
