"""Real processes that are killed, stopped, fail, diverge or find the disk full: the promised exit
code, a message that names the true cause, checkpoints that stay good, and a run that goes on
afterwards to the result of an undisturbed one.

Prints, for each fault, the seconds from the fault to the end of all processes and from the next
start to its first step (pytest -s).
"""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megatron_hypenet
from launchers import local
from launchers.local import LocalLaunch
from megatron_hypenet.checkpoint.load import resolve, verify_files
from megatron_hypenet.checkpoint.shards import ShardReader
from tests.integration.test_kill_resume import assert_same_run
from tests.losses import read_losses

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(megatron_hypenet.__file__).parents[1]
LOSSES = Path("finetune") / "losses.jsonl"


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """Start launchers/local.py with the training worker in the place of `hypenet`."""
    monkeypatch.setattr(
        local,
        "hypenet_command",
        lambda words: (sys.executable, "-m", "tests.integration.training_worker", *words),
    )
    monkeypatch.chdir(ROOT)
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
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
    """Run the worker in several processes on this machine."""
    fewest = lines_of(out)
    seen = []
    over = threading.Event()
    start = time.time()

    def look():
        nonlocal fewest
        while not over.wait(0.02):
            lines = lines_of(out)
            fewest = min(fewest, lines)  # a run that resumes drops what it will do again
            if lines > fewest and not seen:
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
    """Count the lines of losses.jsonl, one per step; 0 where there is none."""
    try:
        return (out / LOSSES).read_text().count("\n")
    except FileNotFoundError:
        return 0


def step_time(out, step):
    """Return time.time() of the last record of `step` before the fault: its line in
    losses.jsonl."""
    return (out / LOSSES).stat().st_mtime if step else 0.0


def record(out, rank):
    return json.loads((out / "errors" / f"rank_{rank:05d}.json").read_text())


def report(capfd, fault, seconds, outcome, again):
    with capfd.disabled():
        first = re.search(r"error: .*", outcome.said)
        print(
            f"\n{fault}: exit {outcome.code}, all processes ended {seconds:.1f} s after it, "
            f"first step {again.first_step:.1f} s after the "
            f"next start; said: {first.group(0)[:160] if first else ''}"
        )


def killed(capfd, out):
    ended = run(capfd, out, "--kill-after", 5, "--only-rank", 1)
    seconds = ended.ended - step_time(out, 5)
    assert ended.code == 137, ended.said
    assert re.search(
        r"error: rank 1 on \S+ \(pid \d+\) was killed, .* while rank 0 on \S+ waited for it in "
        r"iteration 6/6 of finetune",
        ended.said,
    ), ended.said
    assert record(out, 0)["echo"] and not (out / "errors" / "rank_00001.json").exists()
    return "SIGKILL of one rank", seconds, ended


def failed(capfd, out):
    ended = run(capfd, out, "--fail-after", 4, "--only-rank", 1)
    cause = record(out, 1)
    assert ended.code == 1, ended.said
    assert (cause["type"], cause["phase"], cause["iteration"], cause["echo"]) == (
        "ValueError",
        "data",
        4,
        False,
    )
    assert 'raise ValueError("this shard cannot be read")' in cause["traceback"]
    assert re.search(
        r"error: rank 1 on \S+ failed in iteration 5/6 of finetune, data: ValueError: "
        r"this shard cannot be read",
        ended.said,
    )
    assert record(out, 0)["echo"] and record(out, 0)["time"] > cause["time"]
    return "an exception on one rank", ended.ended - cause["time"], ended


def hung(capfd, out):
    ended = run(capfd, out, "--stop-after", 4, "--only-rank", 1, "--hang-timeout", 6)
    seconds = ended.ended - step_time(out, 4)
    assert ended.code == 8, ended.said
    assert re.search(
        r"error: rank 0 on \S+ hangs in iteration 5/6 of finetune, .*: it has made no progress for "
        r"\d+ s",
        ended.said,
    )
    assert re.search(
        r"rank 1 on \S+ \(pid \d+\) does not answer: its process is stopped or dead", ended.said
    ), ended.said
    stacks = (out / "errors" / "hang_rank_00000.txt").read_text()
    assert (
        "rank 1 on" in stacks and "all_reduce" in stacks and record(out, 0)["type"] == "HangError"
    )
    return "SIGSTOP of one rank (limit 6 s)", seconds, ended


def out_of_disk(capfd, out):
    ended = run(capfd, out, "--fill-disk-after", 6)
    seconds = ended.ended - step_time(out, 6)
    assert ended.code == 4 and "no space left on the disk" in ended.said.lower(), ended.said
    (out / "filler").unlink()
    return "a full disk during a save", seconds, ended


@pytest.fixture
def small_disk(tmp_path):
    """Provide a file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_one_run_goes_through_all_of_it(capfd, tmp_path, small_disk):
    """Killed, failing, stopped, out of disk: each time it ends soon and keeps its checkpoint, and
    what is finished at last is the same as without any of it. The undisturbed run has one slow
    rank, which is named."""
    straight = run(capfd, tmp_path, "--slow", 0.05, "--only-rank", 1)
    assert straight.code == 0, straight.said
    named = [line for line in straight.said.splitlines() if "slow: rank 1 on" in line]
    assert [line.split(" | ")[0] for line in named] == ["iter 6/6"] and "rank 0 on" not in named[0]
    board = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    (text,) = board.Tensors("speed/slow-ranks/text_summary")
    assert (
        text.step == 6 and text.tensor_proto.string_val[0].decode() == named[0].split("slow: ")[1]
    )
    faults = []
    for fault in (killed, failed, hung, out_of_disk):
        faults.append(fault(capfd, small_disk))
        assert resolve(small_disk / "finetune").name == "iter_0000003"
        verify_files(resolve(small_disk / "finetune"), hashes=True)
    again = run(capfd, small_disk)
    assert again.code == 0 and "resumed from" in again.said, again.said
    assert_same_run(tmp_path / "finetune", small_disk / "finetune", 6)
    following = [outcome for _, _, outcome in faults[1:]] + [again]
    for (name, seconds, ended), then in zip(faults, following, strict=True):
        report(capfd, name, seconds, ended, then)
        assert seconds < 60


def test_losses_that_are_not_finite(capfd, tmp_path):
    skipping = run(capfd, tmp_path / "a", "--bad-samples", 9, 17)  # steps 2 and 3: one rank each
    assert skipping.code == 0 and skipping.said.count("skipped iter") == 2, skipping.said
    ended = run(capfd, tmp_path / "b", "--bad-samples", 9, 99)
    assert ended.code == 7 and ended.said.count("skipped iter") == 3, ended.said
    assert re.search(
        r"error: stage finetune diverged at iter 5: the loss is nan.*after 3 skipped steps in a "
        r"row",
        ended.said,
    ), ended.said
    assert [record(tmp_path / "b", rank)["type"] for rank in (0, 1)] == ["DivergedError"] * 2
    seconds = ended.ended - record(tmp_path / "b", 0)["time"]
    verify_files(resolve(tmp_path / "b" / "finetune"), hashes=True)
    mended = run(capfd, tmp_path / "b", "--bad-samples", 9, 17)  # somebody mended the data
    assert mended.code == 0 and "resumed from" in mended.said, mended.said
    assert_same_run(tmp_path / "a" / "finetune", tmp_path / "b" / "finetune", 6)
    report(capfd, "a loss that is not finite, four times", seconds, ended, mended)


@pytest.mark.parametrize(
    "layout",
    [
        ("--pp", 2, "--dtype", "bfloat16"),
        ("--tp", 2, "--zero", 2),
        ("--zero", 3, "--dtype", "bfloat16"),
    ],
)
def test_skipped_steps_change_nothing_under_every_kind_of_update(capfd, tmp_path, layout):
    """The update comes from DeepSpeed's ZeRO optimizers or its BF16_Optimizer, after its own
    backward pass or Megatron's schedule; none of them changes weights."""
    # steps 3 and 4
    ended = run(
        capfd, tmp_path, *layout, "--bad-samples", 16, 25, "--save-interval", 1, "--keep-last", 9
    )
    assert ended.code == 0 and ended.said.count("skipped iter") == 2, ended.said
    assert [record["step"] for record in read_losses(tmp_path / LOSSES)] == [1, 2, 5, 6]
    for part in ("weights", "optimizer"):
        before, *after = (
            ShardReader(tmp_path / "finetune" / "checkpoints" / f"iter_{step:07d}" / part)
            for step in (2, 3, 4, 5)
        )
        changed = [
            {key for key in before if not torch.equal(before[key], content[key])}
            for content in after
        ]
        assert changed[:2] == [set(), set()] and changed[2], part


def test_one_rank_that_is_asked_to_leave_takes_all_with_it(capfd, tmp_path):
    ended = run(
        capfd,
        tmp_path,
        "--pp",
        2,
        "--async-save",
        "--save-interval",
        2,
        "--term-after",
        4,
        "--only-rank",
        1,
    )
    assert ended.code == 75, ended.said
    assert resolve(tmp_path / "finetune").name == "iter_0000004"
    verify_files(resolve(tmp_path / "finetune"), hashes=True)
    assert not (tmp_path / "errors").exists()
    beats = [
        json.loads((tmp_path / "heartbeat" / f"rank_{rank:05d}.json").read_text())
        for rank in (0, 1)
    ]
    assert [(beat["state"], beat["iteration"]) for beat in beats] == [("stopped", 4)] * 2


BETWEEN_STAGES = """
import os, signal, sys
from pathlib import Path
from megatron_hypenet.cli.main import report_fault
from megatron_hypenet.config.schema import GuardConfig, ParallelConfig
from megatron_hypenet.supervision.faults import watched
from megatron_hypenet.supervision.process_exit import exit_process
from megatron_hypenet.supervision.signals import leaving_at_once
from megatron_hypenet.parallel import groups
groups.init_parallel(ParallelConfig())
code = 0
try:
    with watched(Path(sys.argv[1]), GuardConfig()), leaving_at_once():
        for part in range(1000):
            groups.gather_numbers(float(part))  # as a measurement does
            if part == 5 and groups.rank() == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
except Exception as fault:
    code = report_fault(fault, debug=False)
exit_process(code)
"""


def test_between_the_stages_one_rank_that_leaves_takes_all_with_it(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(
        local, "hypenet_command", lambda words: (sys.executable, "-c", BETWEEN_STAGES, *words)
    )
    ended = run(capfd, tmp_path)
    assert ended.code == 75 and "stopped on SIGUSR2" in ended.said, ended.said
    assert not (tmp_path / "errors").exists()
